"""What each of two processes does in test_processes.py, started by torchrun: it prints what it found as JSON.

Arguments: a folder.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))

import miracle_hub
from miracle_hub.files.sealed import crc_of
from miracle_hub.training.checkpoint import Checkpoint
from miracle_hub.training.coder import CodingOptions, code_model
from miracle_hub.training.journal import Journal
from miracle_hub.training.model import kl_penalty
from tests.training.networks import IMAGES, conv_net, loss_of, variational_net
from tests.workers import caught

OPTIONS = CodingOptions(groups=3, refit_steps=2, learning_rate=1e-3)
FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])


def coded(model: nn.Module, loss: Callable[[int], Tensor] | None = None, **options: Any) -> Journal:
    return code_model(
        model, loss or loss_of(model), options=options.pop("options", OPTIONS), progress=False, **options
    )


def crc(model: nn.Module) -> str:
    state = {n: t.contiguous() for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    return crc_of(state, {})


def kinds_of_posteriors() -> dict[str, Any]:
    """Processes that begin with different models, and random states, end with one, which the file holds."""
    found = {}
    for kind, streams in (("mean-kl", "network"), ("mean-var", "tensor"), ("test-channel", "tensor")):
        torch.manual_seed(RANK)
        model = variational_net(RANK, parametrization=kind, streams=streams, kl_block_weights=32)
        numbers: list[int] = []
        journal = coded(model, lambda i, model=model, n=numbers: n.append(i) or loss_of(model)(i))
        n_bytes = miracle_hub.save(model, path := FOLDER / f"{kind}.safetensors")
        loaded = miracle_hub.load(path, conv_net(3)).eval()
        is_same = torch.equal(loaded(IMAGES), model.eval()(IMAGES)) and n_bytes == path.stat().st_size
        rows = [row.loss for row in journal.rows]
        found[kind] = [crc(model), rows[1:], is_same, numbers]
    return found


def gradients_are_means() -> list[float]:
    """Losses of refits, of two processes, and of one that has the mean of both batches."""
    shared, alone = (variational_net(parametrization="test-channel", dropout=0.0) for _ in range(2))
    one = loss_of(alone)
    found = coded(shared).rows
    wanted = coded(alone, lambda i: (one(2 * i) + one(2 * i + 1)) / 2, alone=True).rows
    return [abs(a.loss - b.loss) for a, b in zip(found[1:], wanted[1:], strict=True)]


def wrapped() -> dict[str, Any]:
    """DistributedDataParallel before, around and after."""
    found: dict[str, Any] = {}
    for kind in ("mean-var", "mean-kl"):
        for unused in (False, True):
            model = variational_net(RANK, parametrization=kind, dropout=0.0)
            shared = DistributedDataParallel(model, find_unused_parameters=unused)
            for step in range(3):
                shared.zero_grad()
                (loss_of(shared)(step + RANK) + kl_penalty(shared)).backward()
            coded(shared if unused else model, loss_of(shared))
            path = FOLDER / f"wrapped-{kind}-{unused}.safetensors"
            miracle_hub.save(shared, path)
            loaded = miracle_hub.load(path, conv_net(3)).eval()
            is_same = torch.equal(loaded(IMAGES), shared.eval()(IMAGES))
            found[f"{kind} {unused}"] = [crc(model), is_same]
    found["after"] = caught(lambda: loss_of(shared.train())(0))  # pyright: ignore
    kl = DistributedDataParallel(variational_net(parametrization="mean-kl"))
    coded(kl.module, options=CodingOptions(groups=1, refit_steps=0))
    found["coded since"] = caught(lambda: loss_of(kl)(0))
    plain = DistributedDataParallel(conv_net())
    config = {"rate": 3.0, "window_bits": 6}
    found["before"] = caught(lambda: miracle_hub.make_variational(plain, **config))
    miracle_hub.make_variational(plain.module, **config)
    found["inside"] = caught(lambda: loss_of(plain)(0))
    return found


def errors() -> dict[str, Any]:
    """What each process raises when one of them cannot go on."""

    def failing(rank: int, error: Exception | None) -> Callable[[], Any]:
        model = variational_net(parametrization="test-channel")

        def loss(number: int) -> Tensor:
            if error is not None and RANK == rank and number > 4:
                raise error
            return loss_of(model)(number) * (float("nan") if RANK == rank and number > 4 else 1)

        def run() -> None:
            before = crc(model)
            coded(model, loss)
            assert crc(model) == before

        return run

    other = variational_net(sharing={"hidden.weight": 4} if RANK else {}, streams="network")
    path = FOLDER / "file" / "state"
    if not RANK:
        path.parent.write_text("")
    return {
        "value": caught(failing(1, ValueError("no such row\nhere"))),
        "nan": caught(failing(0, None)),
        "models": caught(lambda: coded(other)),
        "disk": caught(lambda: coded(variational_net(), checkpoint=Checkpoint(path, 0))),
        "alone": coded(variational_net(), alone=True).rows[-1].coded_values if RANK else 0,
    }


def checkpoints() -> list[Any]:
    """A run that is stopped and goes on with other models ends as the whole one; the journal is written."""
    torch.manual_seed(RANK)
    whole = variational_net(selection="sample")
    coded(whole)
    ends = []
    for at in (2, 6):
        torch.manual_seed(RANK)
        path = FOLDER / f"state-{at}"

        def stopped(number: int, at: int = at) -> Tensor:
            if number == at:
                raise ValueError("stop")
            return loss_of(model)(number)  # noqa: B023

        model = variational_net(selection="sample")
        caught(lambda: coded(model, stopped, checkpoint=Checkpoint(path, 0)))  # noqa: B023
        torch.manual_seed(5)
        model = variational_net(1, selection="sample")
        coded(model, checkpoint=Checkpoint(path, 0), journal=Journal(FOLDER / f"log-{at}"))
        ends.append(crc(model))
    return [crc(whole), *ends]


def validated() -> list[float]:
    journal = coded(variational_net(), validate=lambda: float(RANK))
    return [row.validation for row in journal.rows]


def left_alone() -> str:
    """What a process raises when the other one is gone."""
    model = variational_net()

    def loss(number: int) -> Tensor:
        if RANK == 1:
            os._exit(3)
        return loss_of(model)(number)

    return caught(lambda: coded(model, loss))


distributed.init_process_group("gloo")
torch.set_num_threads(1)
claims = (kinds_of_posteriors, gradients_are_means, wrapped, errors, checkpoints, validated)
found = {claim.__name__: claim() for claim in claims}
(FOLDER / f"found-{RANK}.json").write_text(json.dumps(found))
distributed.barrier()
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends those that are left
(FOLDER / "left-alone.json").write_text(json.dumps(left_alone()))
sys.exit(3)
