"""Small networks on the Hub: pushed as one small file, loaded as ordinary dense modules."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from miracle_hub import CodingOptions, MiracleHubMixin, code_model, make_variational
from miracle_hub.errors import FormatError, OptionError

from .client import Client
from .loopback import TOKEN, LoopbackHub


class Digits(nn.Module, MiracleHubMixin, library_name="digits", tags=["small"], license="apache-2.0"):
    """A parameter of its own, so that the class of the whole network is exchanged for a while."""

    def __init__(self, width: int = 6, classes: int = 4, names: list[str] | None = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.body, self.norm = nn.Linear(8, width), nn.BatchNorm1d(width)
        self.head, self.names = nn.Linear(width, classes), names

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.body(x)) * self.gain))


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def coded(streams: str = "network", **arguments: Any) -> Digits:
    model: Any = Digits(**arguments)
    config: Any = {"bits_per_weight": 3.0, "window_bits": 6, "kl_block_weights": 16, "streams": streams}
    make_variational(model, **config, target_modules="all")
    options = CodingOptions(groups=2, refit_steps=2)
    code_model(model, lambda number: model(X + number).square().mean(), options=options, progress=False)
    return model.eval()


def load(folder: Path, **arguments: Any) -> Any:
    return Digits.from_pretrained(folder, **arguments)


@pytest.mark.parametrize("streams", ["network", "tensor"])
def test_a_network_goes_through_a_folder_with_its_arguments_and_buffers(streams: str, tmp_path: Path) -> None:
    model = coded(streams, width=10, names=["a", "ß"])
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"width": 10, "classes": 4, "names": ["a", "ß"]}
    loaded = load(tmp_path)
    assert type(loaded) is Digits and not loaded.training and loaded.names == ["a", "ß"]
    assert torch.equal(loaded(X), model(X))
    found, expected = loaded.norm.state_dict(), model.norm.state_dict()
    assert torch.equal(found["running_var"], expected["running_var"])
    assert int(found["num_batches_tracked"]) > 0 and float(found["running_mean"].abs().sum()) > 0
    # An ordinary module, whose parameters learn.
    loaded(X).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    card = (tmp_path / "README.md").read_text()
    assert "library_name: digits" in card and "small" in card


def test_arguments_of_the_call_come_before_those_of_the_file(tmp_path: Path) -> None:
    coded(width=10).save_pretrained(tmp_path)
    assert load(tmp_path, names=["x"]).names == ["x"]
    with pytest.raises(
        FormatError, match="the module's coded tensors have other names, dtypes or shapes than"
    ):
        load(tmp_path, width=11)


def test_only_a_coded_network_is_saved(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="^model: expected a variational model, found Digits without posteriors; "
    ):
        Digits().save_pretrained(tmp_path)
    model: Any = make_variational(Digits(), bits_per_weight=3.0, streams="network", window_bits=6)
    with pytest.raises(
        OptionError, match="^gain: expected a coded stream, found one that is not; call code_model"
    ):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


PUSH_AND_LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import save_file
from tests.hub.test_mixin import Digits, X, coded
torch.manual_seed(0)
model = coded(width=7)
model.push_to_hub("user/digits")
loaded = Digits.from_pretrained("user/digits")
assert type(loaded) is Digits and loaded.body.out_features == 7
save_file({"found": loaded(X), "expected": model(X)}, sys.argv[2])
print('"done"')
"""


def test_a_network_goes_through_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    client = Client(hub.url, tmp_path / "home")
    root = Path(__file__).parents[2]
    client.python(PUSH_AND_LOAD, root, tmp_path / "outputs", HF_TOKEN=TOKEN)
    assert hub.downloads("user/digits") == {"config.json", "model.safetensors"}
    outputs = load_file(tmp_path / "outputs")
    assert torch.equal(outputs["found"], outputs["expected"])
