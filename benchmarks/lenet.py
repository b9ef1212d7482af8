"""LeNet-5 (Caffe) on MNIST within a budget of bits: fit, code with refits, save, load, test.

    python benchmarks/lenet.py --bits 12420 --seed 0
    python benchmarks/lenet.py --fit-only --parametrization mean-var --steps 20000
    python benchmarks/lenet.py --report        # all runs so far → results/lenet.json

The last 5,000 training images (of a fixed permutation) are for validation; the test images are read once, at
the end. Every run is one file in results/lenet/, every fit without coding one in results/lenet-fit/.
"""

import argparse
import copy
import gzip
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from record import DATA, RESULTS, record
from torch import Tensor, nn

import miracle_hub
from miracle_hub.training.model import variational_of

VALIDATION = 5000


class LeNet5(nn.Module):
    """The network of Havasi et al. 2019: 431,080 weights.

    Args:
        rectifies: whether convolutions have ReLUs too; in Caffe's own example only a linear layer has.
    """

    def __init__(self, rectifies: bool = True) -> None:
        super().__init__()
        self.rectifies = rectifies
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in (self.conv1, self.conv2):
            x = F.max_pool2d(convolution(x), 2)
            x = F.relu(x) if self.rectifies else x
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images, bytes `[n, 1, 28, 28]`, and labels."""
    images, labels = (
        gzip.open(DATA / "mnist" / f"{split}-{what}-ubyte.gz").read()
        for what in ("images-idx3", "labels-idx1")
    )
    x = torch.from_numpy(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy())
    y = torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))
    return x, y


def normalized(images: Tensor) -> Tensor:
    """0 to 255 → float32 around 0, in channels-last memory."""
    return (images.float() / 255 - 0.1307).contiguous(memory_format=torch.channels_last)


def distorted(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Every image by an affine map of its own: the six entries of the identity, changed by up to `amount`.

    Of 0.1, that turns and shears by up to 6 degrees, scales by 10 % and moves by 1.4 pixels.
    """
    change = torch.empty(len(images), 2, 3).uniform_(-amount, amount, generator=generator)
    grid = F.affine_grid(torch.eye(2, 3) + change, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of wrong answers, in float32."""
    was_training = model.training
    model.eval()
    wrong = sum(
        int((model(normalized(a)).argmax(1) != b).sum())
        for a, b in zip(x.split(1000), y.split(1000), strict=True)
    )
    model.train(was_training)
    return 100 * wrong / len(y)


class Run:
    """One network: data, model and the batches of a seed."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        torch.manual_seed(a.seed)
        x, y = mnist("train")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        self.train, self.held = order[:-VALIDATION], order[-VALIDATION:]
        self.x, self.y = x, y
        self.model = LeNet5().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.curve: list[dict] = []
        self.seconds: dict[str, float] = {}

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The same for every seed, which is that of first weights, noise, shared values and candidates."""
        generator = torch.Generator().manual_seed(number)
        at = self.train[torch.randint(len(self.train), (self.a.batch,), generator=generator)]
        x = distorted(self.x[at], self.a.distort, generator) if self.a.distort else self.x[at]
        return normalized(x), self.y[at]

    def loss(self, number: int) -> Tensor:
        x, y = self.batch(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(self.a.bfloat16)):
            return F.cross_entropy(self.model(x).float(), y)

    def validation(self) -> float:
        return error(self.model, self.x[self.held], self.y[self.held])

    def fit(self) -> None:
        """Adam; the rate falls linearly to a fiftieth, after a share of steps at its height."""
        a, started = self.a, time.monotonic()
        variational = variational_of(self.model)
        optimizer = torch.optim.Adam(self.model.parameters(), a.lr)
        running = 0.0
        for step in range(a.steps):
            for group in optimizer.param_groups:
                group["lr"] = a.lr * min(1.0, max(0.02, (1 - step / a.steps) / (1 - a.hold)))
            loss = self.loss(step)
            optimizer.zero_grad()
            (loss + variational.penalty()).backward()
            optimizer.step()
            variational.after_step()
            running += (loss.item() - running) * max(0.01, 1 / (step + 1))
            if (step + 1) % a.every == 0:
                self.note(step + 1, running)
        self.seconds["fit"] = time.monotonic() - started

    def note(self, step: int, loss: float) -> None:
        row = dict(
            step=step,
            loss=round(loss, 4),
            validation=self.validation(),
            kl_bits=variational_of(self.model).kl_bits(),
        )
        self.curve.append(row)
        print(json.dumps(row), flush=True)

    def code(self) -> list[dict]:
        a, started = self.a, time.monotonic()
        options = miracle_hub.CodingOptions(a.groups, a.refit, a.refit_lr, a.order)
        journal = miracle_hub.code_model(
            self.model, self.loss, options=options, validate=self.validation, progress=False
        )
        self.seconds["code"] = time.monotonic() - started
        return [dict(vars(row)) for row in journal.rows]


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bits", type=int, default=12420)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--parametrization", default="mean-kl")
    p.add_argument("--code", default="sliding")
    p.add_argument("--window-bits", type=int, default=16)
    p.add_argument("--kl-block", type=int, default=64)
    p.add_argument("--conv2", type=float, default=6.25)
    p.add_argument("--fc2", type=float, default=1.0)
    p.add_argument("--fc1", type=float, default=172.5)
    p.add_argument("--steps", type=int, default=60_000)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--hold", type=float, default=0.05)
    p.add_argument("--beta-rate", type=float, default=5e-5)
    p.add_argument("--groups", type=int, default=120)
    p.add_argument("--refit", type=int, default=250)
    p.add_argument("--refit-lr", type=float, default=7e-4)
    p.add_argument("--order", default="random")
    p.add_argument("--distort", type=float, default=0.0)
    p.add_argument("--every", type=int, default=2000)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--bfloat16", type=int, default=1)
    p.add_argument("--sharing", default="hash")
    p.add_argument("--fit-only", action="store_true")
    p.add_argument("--name", default="")
    p.add_argument("--report", action="store_true")
    return p.parse_args()


def pruned(model: nn.Module, share: float) -> nn.Module:
    """A copy without the smallest weights of every tensor."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            limit = parameter.abs().flatten().kthvalue(max(1, int(share * parameter.numel()))).values
            parameter.mul_(parameter.abs() > limit)
    return twin


def config_of(a: argparse.Namespace) -> dict[str, Any]:
    """Options of `make_variational`."""
    return dict(
        message_bits=a.bits, streams="network", parametrization=a.parametrization, code=a.code,
        window_bits=a.window_bits, kl_block_weights=a.kl_block, beta_rate=a.beta_rate, seed=a.seed,
        sharing={"conv2.weight": a.conv2, "fc1.weight": a.fc1, "fc2.weight": a.fc2}, sharing_kind=a.sharing,
    )  # fmt: skip


def one(a: argparse.Namespace) -> None:
    """Fit, code, save, load into a new network, and test that."""
    run = Run(a)
    miracle_hub.make_variational(run.model, **config_of(a))
    stream = variational_of(run.model).streams[0]
    print(stream.code, stream.n_values, stream.code.message_bits(stream.n_values), flush=True)
    name = a.name or f"{a.parametrization}-{a.bits}-{a.seed}"
    run.fit()
    if a.fit_only:
        record(
            f"lenet-fit/{name}-{a.steps}", {"curve": run.curve, "seconds": run.seconds, "options": vars(a)}
        )
        return
    before = run.curve[-1]["validation"]
    rows = run.code()
    path = RESULTS / "lenet" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    n_bytes = miracle_hub.save(run.model, path)
    loaded = miracle_hub.load(path, LeNet5()).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x, y = mnist("t10k")
    found = {
        "test_error": error(loaded, x, y),
        "validation_error": error(loaded, run.x[run.held], run.y[run.held]),
        "validation_error_before_coding": before,
        "file_bytes": n_bytes,
        "message_bits": stream.code.message_bits(stream.n_values),
        "values": stream.n_values,
        "seconds": run.seconds,
        "pruned": {share: error(pruned(loaded, share / 100), x, y) for share in range(10, 70, 10)},
        "curve": run.curve,
        "coding": rows,
        "options": vars(a),
    }
    record(f"lenet/{name}", found)
    print(json.dumps({key: found[key] for key in list(found)[:8]}), flush=True)


def found_in(folder: str) -> list[dict[str, Any]]:
    """Results of all runs so far in a folder of results."""
    return [json.loads(p.read_text())["results"] for p in sorted((RESULTS / folder).glob("*.json"))]


def coded() -> list[dict[str, Any]]:
    """Means over seeds of all runs in results/lenet/."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in found_in("lenet"):
        groups.setdefault((run["options"]["parametrization"], run["options"]["bits"]), []).append(run)
    return [
        {
            "parametrization": parametrization,
            "bits": bits,
            "steps": runs[0]["options"]["steps"],
            "distort": runs[0]["options"].get("distort", 0.0),
            "seeds": [run["options"]["seed"] for run in runs],
            "test_errors": [run["test_error"] for run in runs],
            "test_error": statistics.mean(run["test_error"] for run in runs),
            "message_bits": max(run["message_bits"] for run in runs),
            "file_bytes": max(run["file_bytes"] for run in runs),
            "minutes": statistics.mean(sum(run["seconds"].values()) for run in runs) / 60,
            "pruned": {s: statistics.mean(r["pruned"][s] for r in runs) for s in runs[0]["pruned"]},
        }
        for (parametrization, bits), runs in groups.items()
    ]


def fits() -> list[dict[str, Any]]:
    """Where every fit ended, and its first step within 1.2 % of validation error and 1 % of the budget."""
    names = ("parametrization", "bits", "steps", "lr", "beta_rate", "seed")
    found = []
    for run in found_in("lenet-fit") + found_in("lenet"):
        budget = 1.01 * run["options"]["bits"]
        good = [p["step"] for p in run["curve"] if p["validation"] <= 1.2 and p["kl_bits"] <= budget]
        chosen = {name: run["options"][name] for name in names}
        found.append({**chosen, "steps_to_1.2_percent": min(good, default=None), **run["curve"][-1]})
    return found


def main() -> None:
    """One run, or the report of all."""
    a = arguments()
    torch.set_num_threads(a.threads)
    record("lenet", {"coded": coded(), "fits": fits()}) if a.report else one(a)


if __name__ == "__main__":
    main()
