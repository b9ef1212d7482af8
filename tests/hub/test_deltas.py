"""Differences to a base through plain from_pretrained: the sum, exactly, from two repositories of a Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertModel, PreTrainedModel

import miracle_hub
from miracle_hub import MiracleConfig
from miracle_hub.codec.repository import open_repository
from miracle_hub.codec.trellis import decode_payload
from miracle_hub.errors import BaseModelError, OptionError, SourceError

from .client import Client
from .loopback import LoopbackHub
from .loopback_parts import TOKEN
from .test_loading import assert_same

if TYPE_CHECKING:
    from .conftest import Repository

OPTIONS: dict[str, Any] = {"window_bits": 8, "progress": False, "calibrate": None}


def moved(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A fine-tune of most of a model: every second parameter moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if i % 2 == 0:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def make_delta(repository: Repository, folder: Path, base: str | Path | None = None, **options: Any) -> Path:
    """Of a fine-tune of a repository's source."""
    moved(repository.auto.from_pretrained(repository.source)).save_pretrained(folder / "tuned")
    given: dict[str, Any] = {"bits_per_weight": 1.5, "base": base or repository.source, **OPTIONS, **options}
    miracle_hub.compress(folder / "tuned", folder / "delta", **given)
    return folder / "delta"


@pytest.fixture(scope="module")
def delta(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_delta(repository, tmp_path_factory.mktemp("delta"))


def expected_sum(delta: Path, base: Path) -> dict[str, Tensor]:
    """Base and decoded difference, added here."""
    theirs = {k: v for path in base.glob("*.safetensors") for k, v in load_file(path).items()}
    held = {k: v for path in delta.glob("*.safetensors") for k, v in load_file(path).items()}
    found = dict(theirs)
    for name, entry in held.items():
        assert entry.dtype == torch.uint8, name
        found[name] = (theirs[name].float() + decode_payload(entry, name)[0]).to(theirs[name].dtype)
    return found


def test_what_is_loaded_is_base_and_decoded_difference(repository: Repository, delta: Path) -> None:
    found = miracle_hub.load_state_dict(delta, base=repository.source)
    expected = expected_sum(delta, repository.source)
    assert_same(found, {name: expected[name] for name in found})
    assert set(found) == set(expected)


def test_from_pretrained_equals_the_decompressed_folder(
    repository: Repository, delta: Path, tmp_path: Path
) -> None:
    miracle_hub.decompress(delta, tmp_path / "dense", base=repository.source, progress=False)
    config = MiracleConfig(base=repository.source)
    ours, info = repository.auto.from_pretrained(delta, quantization_config=config, output_loading_info=True)
    twin, twin_info = repository.auto.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert_same(ours.state_dict(), twin.state_dict())
    assert_same(dict(ours.named_buffers()), dict(twin.named_buffers()))
    assert info == twin_info
    assert not any(info.values())
    assert not hasattr(ours.config, "quantization_config")


def test_a_delta_in_memory_saves_as_an_ordinary_model(
    repository: Repository, delta: Path, tmp_path: Path
) -> None:
    model = repository.auto.from_pretrained(delta, quantization_config=MiracleConfig(base=repository.source))
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert_same(repository.auto.from_pretrained(tmp_path / "again").state_dict(), model.state_dict())


@pytest.fixture
def classifier(repositories: Callable[..., Repository]) -> Repository:
    return repositories("bert-classifier")


def test_16_bits_and_shards_are_loaded_too(repositories: Callable[..., Repository], tmp_path: Path) -> None:
    repository = repositories("llama", torch.bfloat16, "20KB", "8KB")
    delta = make_delta(repository, tmp_path, max_shard_size="1KB")
    assert len(list(delta.glob("*.safetensors"))) > 1
    config = MiracleConfig(base=repository.source)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = repository.auto.from_pretrained(delta, quantization_config=config, dtype=dtype)
        state = miracle_hub.load_state_dict(delta, base=repository.source)
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], state[name].to(dtype)) for name in state)


def test_a_head_on_a_base_without_one(classifier: Repository, tmp_path: Path) -> None:
    """The base is the encoder alone, whose names lack the prefix."""
    whole = classifier.auto.from_pretrained(classifier.source)
    whole.bert.save_pretrained(tmp_path / "encoder")
    moved(whole).save_pretrained(tmp_path / "tuned")
    report = miracle_hub.compress(
        tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "encoder", bits_per_weight=1.5, **OPTIONS
    )
    assert report.n_same + report.n_differing == len(
        BertModel.from_pretrained(tmp_path / "encoder").state_dict()
    )
    config = MiracleConfig(base=tmp_path / "encoder")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "delta", quantization_config=config, output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(model.classifier.weight, whole.classifier.weight)


def test_layers_of_a_delta_do_not_stay_compressed(classifier: Repository, tmp_path: Path) -> None:
    delta = make_delta(classifier, tmp_path)
    config = MiracleConfig(base=classifier.source, keep_compressed=True)
    with pytest.raises(OptionError, match="which is a difference to a base"):
        classifier.auto.from_pretrained(delta, quantization_config=config)


def test_another_base_is_refused_by_from_pretrained(classifier: Repository, tmp_path: Path) -> None:
    delta = make_delta(classifier, tmp_path)
    moved(classifier.auto.from_pretrained(classifier.source), seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseModelError, match="expected the base's tensor of digest"):
        classifier.auto.from_pretrained(delta, quantization_config=MiracleConfig(base=tmp_path / "other"))
    with pytest.raises(BaseModelError, match="expected to be told where the base is"):
        classifier.auto.from_pretrained(delta)


def test_a_path_in_config_json_is_not_taken_for_the_readers_choice(
    classifier: Repository, tmp_path: Path
) -> None:
    delta = make_delta(classifier, tmp_path)
    config = json.loads((delta / "config.json").read_text())
    config["quantization_config"]["base"] = str(classifier.source)
    config["quantization_config"].pop("guard")
    assert MiracleConfig.from_dict(config["quantization_config"]).base is None


COMPRESS = """
import json, sys, miracle_hub
report = miracle_hub.compress(sys.argv[1], sys.argv[2], base="user/base", bits_per_weight=1.5, window_bits=8,
                              calibrate=None, progress=False)
print(json.dumps(report.base))
"""
LOAD = """
import json, sys
from transformers import AutoModelForSequenceClassification as Auto
model = Auto.from_pretrained(sys.argv[1])
print(json.dumps(sum(p.detach().double().sum().item() for p in model.parameters())))
"""


PUSH = f"""
import json, sys, miracle_hub
done = miracle_hub.push(sys.argv[1], sys.argv[2], token={TOKEN!r})
print(json.dumps(done.digest))
"""


@pytest.fixture
def hub(classifier: Repository, tmp_path: Path) -> Iterator[tuple[LoopbackHub, Client]]:
    """A Hub with a base and a delta of it, made by a client."""
    moved(classifier.auto.from_pretrained(classifier.source)).save_pretrained(tmp_path / "tuned")
    with LoopbackHub() as running:
        running.add("user/base", classifier.source)
        client = Client(running.url, tmp_path / "writer")
        said = client.python(COMPRESS, tmp_path / "tuned", tmp_path / "delta")
        assert said.startswith("user/base at ")
        running.add("user/delta", tmp_path / "delta")
        yield running, client


def total(folder: Path, base: Path) -> float:
    config = MiracleConfig(base=base)
    model = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config)
    return sum(p.detach().double().sum().item() for p in model.parameters())


def test_from_pretrained_fetches_the_base_at_its_commit(
    hub: tuple[LoopbackHub, Client], classifier: Repository, tmp_path: Path
) -> None:
    running, _ = hub
    expected = total(tmp_path / "delta", classifier.source)
    moved(classifier.auto.from_pretrained(classifier.source), seed=3).save_pretrained(tmp_path / "later")
    running.add("user/base", tmp_path / "later")  # main moves; the commit stays
    client = Client(running.url, tmp_path / "reader")
    assert client.python(LOAD, "user/delta") == expected
    assert "model.safetensors" in running.downloads("user/base")
    running.requests.clear()
    assert client.python(LOAD, tmp_path / "delta", HF_HUB_OFFLINE="1") == expected
    assert not running.requests


def test_deltas_of_one_base_share_it(hub: tuple[LoopbackHub, Client], tmp_path: Path) -> None:
    running, _ = hub
    running.add("user/second", tmp_path / "delta")
    client = Client(running.url, tmp_path / "reader")
    client.python(LOAD, "user/delta")
    running.requests.clear()
    client.python(LOAD, "user/second")
    assert "model.safetensors" in running.downloads("user/second")
    assert "model.safetensors" not in running.downloads("user/base")


def test_a_base_that_cannot_be_had_is_named(hub: tuple[LoopbackHub, Client], tmp_path: Path) -> None:
    running, _ = hub
    client = Client(running.url, tmp_path / "reader")
    done = client.run(LOAD, tmp_path / "delta", HF_HUB_OFFLINE="1")
    assert "expected its base user/base at" in done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stderr
    running.repositories.pop("user/base")
    done = client.run(LOAD, tmp_path / "delta")
    assert "BaseModelError" in done.stderr
    assert "the Hub has no such repository" in done.stderr


def test_the_command_line_compresses_verifies_inspects_decompresses_and_pushes(
    hub: tuple[LoopbackHub, Client], tmp_path: Path
) -> None:
    running, client = hub
    options = ("--base", "user/base", "--bits-per-weight", "1.5", "--window-bits", "8", "--calibrate", "none")
    done = client.miracle("compress", tmp_path / "tuned", tmp_path / "again", *options)
    assert "added to user/base at" in done.stdout, done.stderr
    assert "added to user/base at" in client.miracle("inspect", tmp_path / "again").stdout
    verified = client.miracle("verify", tmp_path / "again", "--dense", tmp_path / "tuned")
    assert "every byte agrees" in verified.stdout, verified.stderr
    assert client.miracle("decompress", tmp_path / "again", tmp_path / "dense").returncode == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "base_model: user/base" in card
    assert "base_model_relation: finetune" in card


def test_a_delta_is_pushed_with_its_base_in_the_card(
    hub: tuple[LoopbackHub, Client], classifier: Repository, tmp_path: Path
) -> None:
    running, client = hub
    done = client.run(PUSH, tmp_path / "delta", "user/pushed")
    assert done.returncode == 0, done.stderr
    card = running.repositories["user/pushed"].files("main")["README.md"].data.decode()
    assert "base_model: user/base" in card
    assert "A fine-tune, stored as its difference to user/base at" in card
    reader = Client(running.url, tmp_path / "reader")
    assert reader.python(LOAD, "user/pushed") == total(tmp_path / "delta", classifier.source)


def test_a_delta_of_a_folder_is_not_pushed(classifier: Repository, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="a difference to a base on the Hub, found one to a folder"):
        miracle_hub.push(make_delta(classifier, tmp_path), "user/never")


def test_every_repository_loads_without_its_base_only_loudly(classifier: Repository, tmp_path: Path) -> None:
    """Without the plug-in, what is stored of a tensor has another shape than the tensor."""
    delta = make_delta(classifier, tmp_path)
    copy = shutil.copytree(delta, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config.pop("quantization_config")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        classifier.auto.from_pretrained(copy)
    assert all(tensor.base is not None for tensor in open_repository(delta, base=classifier.source).tensors)
