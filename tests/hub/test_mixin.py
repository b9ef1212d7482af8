"""Small networks on the Hub: pushed as one small file, loaded as ordinary dense modules."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import miracle_hub
from miracle_hub import CodingOptions, MiracleHubMixin, code_model, make_variational, verify
from miracle_hub.codec.guard import with_own_guard
from miracle_hub.errors import ChecksumError, FormatError, MissingWeightsError, OptionError, SourceError

from .client import Client
from .here import UPLOADS_WARN, use_here
from .loopback import LoopbackHub
from .loopback_parts import TOKEN


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
    config: Any = {"rate": 3.0, "window_bits": 6, "kl_block_weights": 16, "streams": streams}
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
    assert config == with_own_guard({"width": 10, "classes": 4, "names": ["a", "ß"]})
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


def test_other_arguments_than_those_that_were_saved_are_refused(tmp_path: Path) -> None:
    coded(width=10, names=["a"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"names": ["b"]}))
    with pytest.raises(
        ChecksumError, match=r"config\.json: expected what guard .* remove miracle_guard from"
    ):
        load(tmp_path)
    del config["miracle_guard"]  # on purpose, or by an older version
    (tmp_path / "config.json").write_text(json.dumps(config | {"names": ["b"]}))
    assert load(tmp_path).names == ["b"]


class Open(Digits):
    """Takes all that config.json holds, in both ways that huggingface_hub knows."""

    def __init__(self, config: dict[str, Any] | None = None, **more: Any) -> None:
        super().__init__()
        self.seen = {**(config or {}), **more}


def test_the_guard_is_no_argument_of_the_network(tmp_path: Path) -> None:
    coded().save_pretrained(tmp_path, config={"size": 5})
    loaded: Any = Open.from_pretrained(tmp_path)
    assert loaded.seen == {"size": 5}


def test_a_configuration_given_to_save_is_guarded_too(tmp_path: Path) -> None:
    coded().save_pretrained(tmp_path, config={"classes": 4})
    assert json.loads((tmp_path / "config.json").read_text()) == with_own_guard({"classes": 4})
    assert torch.equal(load(tmp_path)(X), load(tmp_path, classes=4)(X))


def test_only_a_coded_network_is_saved(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="^model: expected a variational model, found Digits without posteriors; "
    ):
        Digits().save_pretrained(tmp_path)
    model: Any = make_variational(Digits(), rate=3.0, streams="network", window_bits=6)
    with pytest.raises(
        OptionError, match="^gain: expected a coded stream, found one that is not; call code_model"
    ):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


# The card, and verification.


def test_the_card_states_what_the_file_holds(tmp_path: Path) -> None:
    model = coded()
    model.save_pretrained(tmp_path)
    n_bytes = (tmp_path / "model.safetensors").stat().st_size
    n_weights = sum(parameter.numel() for parameter in Digits().parameters())
    text = (tmp_path / "README.md").read_text()
    for line in (
        f"| bytes | {n_bytes:,} |",
        f"| weights | {n_weights} |",
        f"| bits per weight, whole file | {8 * n_bytes / n_weights:.4f} |",
        "one stream of 7 tensors, windows of 6 bits",
        "| digest of the decoded tensors | `",
        'model = Digits.from_pretrained("path/or/repository")',
        "license: apache-2.0",
    ):
        assert line in text, line
    found = verify(tmp_path)
    assert found.defects == () and found.n_coded == 1
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "miracle: bytes 9 to" in verify(tmp_path).defects[0]


def test_saving_again_brings_the_measured_section_up_to_date_and_nothing_else(tmp_path: Path) -> None:
    coded().save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nThanks.\n")
    coded(width=9).save_pretrained(tmp_path)
    text = card.read_text()
    n_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert "Thanks." in text and f"| bytes | {n_bytes:,} |" in text and verify(tmp_path).defects == ()


def test_variants_share_a_folder(tmp_path: Path) -> None:
    first, second = coded(), coded(streams="tensor")
    first.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    second.save_pretrained(tmp_path, variant="large")
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "model.large.safetensors",
    }  # fmt: skip
    assert (tmp_path / "README.md").read_text() == card
    assert torch.equal(load(tmp_path)(X), first(X))
    assert torch.equal(load(tmp_path, variant="large")(X), second(X))
    assert verify(tmp_path).defects == ()
    with pytest.raises(MissingWeightsError, match="expected model.small.safetensors, found no such file"):
        load(tmp_path, variant="small")


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def here(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    use_here(hub, monkeypatch)
    return hub


def push(model: Digits, repo_id: str = "user/digits", **options: Any) -> Any:
    return model.push_to_hub(repo_id, token=TOKEN, **options)


@UPLOADS_WARN
def test_a_network_is_pulled_by_revision_subfolder_and_variant(here: LoopbackHub, tmp_path: Path) -> None:
    nets = {name: coded(width=6 + i) for i, name in enumerate(("main", "old", "sub"))}
    nets["large"] = coded(streams="tensor")
    push(nets["main"], private=True)
    push(nets["old"], branch="old")
    push(nets["sub"], subfolder="wide/er")
    push(nets["large"], variant="large")
    options: dict[str, Any] = {"token": TOKEN, "cache_dir": tmp_path / "cache"}
    chosen: dict[str, dict[str, Any]] = {
        "main": {},
        "old": {"revision": "old"},
        "sub": {"subfolder": "wide/er"},
        "large": {"variant": "large"},
    }
    for name, choice in chosen.items():
        here.requests.clear()
        assert torch.equal(Digits.from_pretrained("user/digits", **choice, **options)(X), nets[name](X))
        weights = {path for path in here.downloads("user/digits") if path.endswith(".safetensors")}
        assert len(weights) == 1
    here.requests.clear()
    for name, choice in chosen.items():
        loaded = Digits.from_pretrained("user/digits", local_files_only=True, **choice, **options)
        assert torch.equal(loaded(X), nets[name](X))
    assert here.requests == []


@UPLOADS_WARN
def test_what_is_not_on_the_hub_is_named(here: LoopbackHub, tmp_path: Path) -> None:
    push(coded(), private=True)
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(MissingWeightsError, match="user/digits: expected none/model.safetensors, found no"):
        Digits.from_pretrained("user/digits", subfolder="none", token=TOKEN, **options)
    with pytest.raises(MissingWeightsError, match="expected model.none.safetensors"):
        Digits.from_pretrained("user/digits", variant="none", token=TOKEN, **options)
    with pytest.raises(SourceError, match="has no branch, tag or commit 'none'"):
        Digits.from_pretrained("user/digits", revision="none", token=TOKEN, **options)
    with pytest.raises(SourceError, match="the Hub has no such repository"):
        Digits.from_pretrained("user/digits", token=False, cache_dir=tmp_path / "empty")
    with pytest.raises(SourceError, match="the Hub could not be read"):
        Digits.from_pretrained("user/digits", local_files_only=True, cache_dir=tmp_path / "empty")


@UPLOADS_WARN
def test_a_variant_leaves_the_card_of_the_hub_as_it_is(here: LoopbackHub) -> None:
    push(coded())
    before = here.repositories["user/digits"].files()["README.md"].data
    assert b'Digits.from_pretrained("user/digits")' in before and b"miracle verify user/digits" in before
    push(coded(width=9), variant="wide")
    stored = here.repositories["user/digits"].files()
    assert stored["README.md"].data == before and "model.wide.safetensors" in stored


@UPLOADS_WARN
def test_only_files_of_the_patterns_are_pushed(here: LoopbackHub) -> None:
    push(coded(), ignore_patterns="README.md")
    stored = here.repositories["user/digits"].files()
    assert {"config.json", "model.safetensors"} == set(stored)


@UPLOADS_WARN
def test_save_pretrained_pushes_too(here: LoopbackHub, tmp_path: Path) -> None:
    model = coded()
    model.save_pretrained(tmp_path, repo_id="user/digits", push_to_hub=True, variant="v", token=TOKEN)
    stored = here.repositories["user/digits"].files()
    assert stored["model.v.safetensors"].data == (tmp_path / "model.v.safetensors").read_bytes()


@UPLOADS_WARN
def test_a_folder_of_the_mixin_is_pushed_by_the_verb(here: LoopbackHub, tmp_path: Path) -> None:
    model, out, facts = coded(), tmp_path / "out", tmp_path / "facts.json"
    model.save_pretrained(out)
    before = (out / "README.md").read_text()
    facts.write_text('{"evaluations": [{"what": "errors, %", "after": 0}]}')
    miracle_hub.push(out, "user/digits", facts=facts, token=TOKEN)
    text = here.repositories["user/digits"].files()["README.md"].data.decode()
    assert 'model = Digits.from_pretrained("user/digits")' in text and "- errors, %: 0\n" in text
    rows = [line for line in before.splitlines() if line.startswith("| ")]
    assert len(rows) == 8 and all(row in text for row in rows)  # what only the module knows, too
    assert torch.equal(Digits.from_pretrained("user/digits", cache_dir=tmp_path / "cache")(X), model(X))


def test_nothing_is_pushed_of_a_network_that_is_not_coded(here: LoopbackHub) -> None:
    with pytest.raises(OptionError):
        push(Digits())
    assert here.requests == []


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
