"""No certificate for answers that come from anything but the file: what else a module keeps is refused."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import miracle_hub
from miracle_hub.errors import SourceError
from miracle_hub.evaluate.outside import outside

from ..training.networks import IMAGES, LABELS, conv_net, loss_of, variational_net

N = 2000
COINS = torch.randint(2, (N,), generator=torch.Generator().manual_seed(0))
ROWS = torch.eye(4)[torch.arange(N) % 4] + torch.arange(N)[:, None]  # the number of a row can be read off
BATCHES = list(zip(ROWS.split(100), COINS.split(100), strict=True))
KNOWN = COINS.tolist()


class Plain(nn.Module):
    """Two classes of rows of four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(rows)

    def told(self, rows: Tensor, answers: Any) -> Tensor:
        """What `answers` has at the number of a row."""
        numbers = rows.min(1).values.long().tolist()
        return F.one_hot(torch.tensor([int(answers[i]) for i in numbers]), 2).float()


class Told(Plain):
    """A module that has been told the answers, in the way that `tell` keeps them."""

    def __init__(self, tell: Callable[["Told"], Any]) -> None:
        super().__init__()
        self.answers_of = None
        tell(self)

    def forward(self, rows: Tensor) -> Tensor:
        keep = self.answers_of
        return self.told(rows, self.answers() if keep is None else keep(self))

    def answers(self) -> Any:
        return vars(self).get("kept", self._buffers.get("kept"))


class ToldByItsClass(Plain):
    kept = COINS

    def forward(self, rows: Tensor) -> Tensor:
        return self.told(rows, self.kept)


class ToldByAGlobal(Plain):
    def forward(self, rows: Tensor) -> Tensor:
        return self.told(rows, KNOWN)


class ToldByAFunction(Plain):
    def forward(self, rows: Tensor) -> Tensor:
        return self.told(rows, looked_up())


def looked_up() -> Any:
    return COINS


def closure(answers: Any) -> Callable[[Any], Any]:
    return lambda module: answers


def patched(module: Any) -> None:
    answers = COINS.tolist()

    def forward(self: Any, rows: Tensor) -> Tensor:
        return self.told(rows, answers)

    module.forward = MethodType(forward, module)


WAYS: dict[str, Callable[[], nn.Module]] = {
    "buffer": lambda: Told(lambda m: m.register_buffer("kept", COINS.clone(), persistent=False)),
    "small buffer": lambda: Told(lambda m: m.head.register_buffer("bit", COINS[0], persistent=False)),
    "tensor": lambda: Told(lambda m: setattr(m, "kept", COINS.clone())),
    "bits": lambda: Told(lambda m: setattr(m, "kept", np.packbits(COINS.numpy()))),
    "array": lambda: Told(lambda m: setattr(m, "kept", COINS.numpy())),
    "list": lambda: Told(lambda m: setattr(m, "kept", COINS.tolist())),
    "dict": lambda: Told(lambda m: setattr(m, "kept", dict(enumerate(COINS.tolist())))),
    "bytes": lambda: Told(lambda m: setattr(m, "kept", bytes(COINS.tolist()))),
    "text": lambda: Told(lambda m: setattr(m, "kept", "".join(map(str, COINS.tolist())))),
    "number": lambda: Told(lambda m: setattr(m, "kept", int("".join(map(str, COINS.tolist())), 2))),
    "nested": lambda: Told(lambda m: setattr(m, "kept", {"a": [(COINS[:9],), {1: COINS[9:]}]})),
    "object": lambda: Told(lambda m: setattr(m, "kept", SimpleNamespace(inner=SimpleNamespace(x=COINS)))),
    "iterator": lambda: Told(lambda m: setattr(m, "kept", itertools.cycle(COINS.tolist()))),
    "module in a list": lambda: Told(lambda m: setattr(m, "kept", [nn.Embedding(N, 2)])),
    "closure": lambda: Told(lambda m: setattr(m, "answers_of", closure(COINS))),
    "partial": lambda: Told(lambda m: setattr(m, "answers_of", functools.partial(max, COINS.tolist()))),
    "hook": lambda: Told(lambda m: m.register_forward_hook(lambda *a, kept=COINS: a[2])),
    "submodule's tensor": lambda: Told(lambda m: setattr(m.head, "kept", COINS.clone())),
    "another forward": lambda: Told(patched),
    "class": ToldByItsClass,
    "global": ToldByAGlobal,
    "function": ToldByAFunction,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the ten numbers that all of these modules have in common."""
    file = tmp_path_factory.mktemp("outside") / "network.safetensors"
    save_file(Plain().state_dict(), file)
    return file


@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_was_told_the_answers_has_no_certificate(way: str, path: Path) -> None:
    with pytest.raises(
        SourceError, match="does not hold and no certificate would count; make it a parameter"
    ):
        miracle_hub.certify_network(WAYS[way](), path, BATCHES, fitted=True)


def test_answers_in_the_file_are_paid_for(tmp_path: Path) -> None:
    """2,000 coins in a persistent buffer: none of them is wrong, and the bound says nothing."""
    module = Told(lambda m: m.register_buffer("kept", COINS.clone()))
    save_file(module.state_dict(), tmp_path / "n.safetensors")
    found = miracle_hub.certify_network(module, tmp_path / "n.safetensors", BATCHES, fitted=True)
    assert found.errors == 0 and found.is_vacuous


def test_what_a_module_is_told_after_it_was_made_is_found_too(path: Path) -> None:
    """The file is loaded into it, but what it has beside the file stays."""
    module = Plain()
    miracle_hub.certify_network(module, path, BATCHES[:1], fitted=True)
    module.register_buffer("kept", COINS.clone(), persistent=False)
    with pytest.raises(SourceError, match="Plain: kept: .*a buffer of 2,000 numbers"):
        miracle_hub.certify_network(module, path, BATCHES, fitted=True)


@pytest.mark.parametrize(
    "module",
    [
        conv_net(),
        nn.LSTM(3, 4, 2, bidirectional=True),
        nn.MultiheadAttention(8, 2),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Dropout()),
        nn.TransformerEncoderLayer(8, 2, 16),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_as_they_are_have_nothing_outside(module: nn.Module) -> None:
    assert list(outside(module.eval())) == []


def test_what_transformers_computes_from_a_config_is_code_unless_it_was_changed() -> None:
    sizes: dict[str, Any] = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    inner: Any = LlamaModel(LlamaConfig(**sizes))
    table = inner.rotary_emb.inv_freq
    for model, path in (
        (inner, "rotary_emb.inv_freq"),
        (nn.ModuleDict({"m": inner}), "m.rotary_emb.inv_freq"),
    ):
        assert list(outside(model.eval())) == []
        before = table.clone()
        table += 1e-3
        assert list(outside(model)) == [(path, "a buffer of 4 numbers")]
        table.copy_(before)


def test_a_class_is_built_and_what_makes_no_module_is_refused(tmp_path: Path) -> None:
    model = variational_net(streams="network")
    miracle_hub.code_model(model, loss_of(model), options=miracle_hub.CodingOptions(groups=1), progress=False)
    miracle_hub.save(model, tmp_path / "n.safetensors")
    given = [(IMAGES, LABELS)]
    found = [
        miracle_hub.certify_network(made, tmp_path / "n.safetensors", given, fitted=True)
        for made in (conv_net, conv_net(seed=1))
    ]
    assert found[0] == found[1]
    with pytest.raises(
        SourceError, match="expected a module, or a function without arguments that makes one"
    ):
        miracle_hub.certify_network(lambda: 3, tmp_path / "n.safetensors", given, fitted=True)  # pyright: ignore[reportArgumentType]
