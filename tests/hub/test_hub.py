"""The package with Hub ids: the real huggingface_hub client against a Hub on 127.0.0.1.

The client reads its address and its cache folder when it is imported, so everything that talks to
the Hub runs in a fresh process; the fixtures share them, for an import of transformers takes seconds.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load, load_file
from torch import Tensor
from transformers import BertConfig, BertModel

import miracle_hub
from miracle_hub.codec.report import Report
from miracle_hub.hub.card import write_card

from .client import Client, stopped_url
from .loopback import LoopbackHub
from .loopback_parts import TOKEN

SOURCE_CARD = """---
license: cc-by-4.0
language: [de, en]
pipeline_tag: fill-mask
tags: [onnx, law]
library_name: something-else
model-index: [{name: dense, results: []}]
---
# Scores of the dense model
"""
OTHER_COPIES = (
    "pytorch_model.bin",
    "onnx/model.onnx",
    "consolidated.safetensors",
    "checkpoint-5/trainer_state.json",
)
OPTIONS: dict[str, Any] = {"bits_per_weight": 3.0, "window_bits": 8, "calibrate": None}  # also in processes
SHARD_SIZE = "12KB"


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


@dataclass(frozen=True)
class Folders:
    """Local copies of what the Hub holds."""

    dense: Path
    retrained: Path  # the branch "retrained" of the dense repository
    sharded: Path  # the retrained model, dense, in several files
    compressed: Path
    compressed_sharded: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("folders")
    names = ("dense", "retrained", "sharded", "compressed", "compressed_sharded")
    made = Folders(*(root / name for name in names))
    tiny_bert(seed=0).save_pretrained(made.dense)
    tiny_bert(seed=1).save_pretrained(made.retrained)
    tiny_bert(seed=1).save_pretrained(made.sharded, max_shard_size="100KB")
    for folder in (made.dense, made.retrained):
        (folder / "README.md").write_text(SOURCE_CARD)
        (folder / "LICENSE").write_text("Attribution.")
        for name in OTHER_COPIES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"\x80 not to be opened")
    miracle_hub.compress(made.dense, made.compressed, **OPTIONS, progress=False)
    sharded_options = OPTIONS | {"max_shard_size": SHARD_SIZE, "progress": False}
    miracle_hub.compress(made.dense, made.compressed_sharded, **sharded_options)
    assert len(list(made.compressed_sharded.glob("*.safetensors"))) > 1
    return made


def tiny_bert(seed: int) -> BertModel:
    config = BertConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(config)


UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("user/compressed")
api.upload_folder(repo_id="user/compressed", folder_path=sys.argv[1])
print('"done"')
"""


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A client of a Hub that holds the folders; the compressed one went there by `upload_folder`."""
    hub.add("user/dense", folders.dense)
    hub.add("user/dense", folders.retrained, branch="retrained")
    hub.add("user/sharded", folders.sharded)
    hub.add("user/private", folders.compressed_sharded, private=True)
    client = Client(hub.url, tmp_path_factory.mktemp("home"))
    client.python(UPLOAD, folders.compressed, HF_TOKEN=TOKEN)
    return client


LOAD = """
import sys
from transformers import AutoModel
from safetensors.torch import save_file
for repo_id in ("user/compressed", "user/private"):
    model = AutoModel.from_pretrained(repo_id)
    save_file(model.state_dict(), f"{sys.argv[1]}/{repo_id.partition('/')[2]}.safetensors")
if len(sys.argv) > 2:
    model.push_to_hub(sys.argv[2])
print('"done"')
"""


@pytest.fixture(scope="module")
def loaded(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State dicts of models that a process with transformers alone has loaded, and pushed."""
    out = tmp_path_factory.mktemp("loaded")
    client.python(LOAD, out, "user/pushed", HF_TOKEN=TOKEN)
    return out


READ = """
import json, sys
from pathlib import Path
import miracle_hub
from safetensors.torch import save_file
out = Path(sys.argv[1])
for name in ("compressed", "private"):
    save_file(miracle_hub.load_state_dict(f"user/{name}"), out / f"{name}.safetensors")
inspection = miracle_hub.inspect("user/private")
miracle_hub.decompress("user/private", out / "decompressed", progress=False)
has_transformers = "transformers" in sys.modules
miracle_hub.compress("user/sharded", out / "from_shards", **json.loads(sys.argv[2]), progress=False)
print(json.dumps({
    "transformers": has_transformers,
    "digest": inspection.digest,
    "file_bytes": inspection.file_bytes,
    "names": [tensor.name for tensor in inspection.tensors],
}))
"""


@dataclass(frozen=True)
class Read:
    out: Path
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def read(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Read:
    """What every verb of the package made of a Hub id, in one process."""
    out = tmp_path_factory.mktemp("read")
    return Read(out, client.python(READ, out, json.dumps(OPTIONS), HF_TOKEN=TOKEN))


@pytest.fixture(scope="module")
def from_hub(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A branch of a dense repository, compressed by the command line."""
    out = tmp_path_factory.mktemp("from_hub") / "out"
    options = ["--bits-per-weight", "3", "--window-bits", "8", "--revision", "retrained"]
    options += ["--calibrate", "none"]  # in a process of its own
    done = client.miracle("compress", "user/dense", out, *options)
    assert done.returncode == 0, done.stderr
    return out


def assert_bitwise_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        # As bytes: -0.0 and NaN count.
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def weights_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# Publishing, and loading with transformers alone.


def test_uploaded_weights_go_through_lfs_and_the_rest_does_not(
    hub: LoopbackHub, client: Client, folders: Folders
) -> None:
    stored = hub.repositories["user/compressed"].files()
    assert {path for path, blob in stored.items() if blob.is_lfs} == {"model.safetensors"}
    for path, blob in stored.items():
        assert blob.data == (folders.compressed / path).read_bytes()
    assert len(stored) == sum(path.is_file() for path in folders.compressed.rglob("*"))


def test_from_pretrained_of_a_hub_id_equals_load_state_dict_bitwise(loaded: Path, folders: Folders) -> None:
    expected = miracle_hub.load_state_dict(folders.compressed)
    assert_bitwise_equal(load_file(loaded / "compressed.safetensors"), expected)


def test_from_pretrained_reads_the_shards_of_a_private_repository(loaded: Path, folders: Folders) -> None:
    expected = miracle_hub.load_state_dict(folders.compressed_sharded)
    assert_bitwise_equal(load_file(loaded / "private.safetensors"), expected)


def test_push_to_hub_of_a_loaded_model_is_a_plain_checkpoint(
    hub: LoopbackHub, loaded: Path, folders: Folders
) -> None:
    pushed = hub.repositories["user/pushed"].files()
    assert "quantization_config" not in json.loads(pushed["config.json"].data)
    expected = miracle_hub.load_state_dict(folders.compressed_sharded)
    assert_bitwise_equal(load(pushed["model.safetensors"].data), expected)


# The verbs of the package with a Hub id.


def test_load_state_dict_of_a_hub_id_equals_the_local_folder_bitwise(read: Read, folders: Folders) -> None:
    expected = miracle_hub.load_state_dict(folders.compressed)
    assert_bitwise_equal(load_file(read.out / "compressed.safetensors"), expected)
    expected = miracle_hub.load_state_dict(folders.compressed_sharded)
    assert_bitwise_equal(load_file(read.out / "private.safetensors"), expected)


def test_no_verb_that_reads_imports_transformers(read: Read) -> None:
    assert read.facts["transformers"] is False


def test_inspect_of_a_hub_id_equals_the_local_folder(read: Read, folders: Folders) -> None:
    local = miracle_hub.inspect(folders.compressed_sharded)
    assert read.facts["digest"] == local.digest
    assert read.facts["file_bytes"] == local.file_bytes
    assert read.facts["names"] == [tensor.name for tensor in local.tensors]


def test_decompress_of_a_hub_id_writes_a_plain_checkpoint(read: Read, folders: Folders) -> None:
    expected = miracle_hub.load_state_dict(folders.compressed_sharded)
    assert_bitwise_equal(load_file(read.out / "decompressed" / "model.safetensors"), expected)
    config = json.loads((read.out / "decompressed" / "config.json").read_text())
    assert "quantization_config" not in config


def test_compress_of_a_sharded_hub_id_equals_the_local_folder(
    read: Read, folders: Folders, tmp_path: Path
) -> None:
    miracle_hub.compress(folders.sharded, tmp_path / "local", **OPTIONS, progress=False)
    assert weights_in(read.out / "from_shards") == weights_in(tmp_path / "local")


def test_compress_reads_the_branch_asked_for(from_hub: Path, folders: Folders, tmp_path: Path) -> None:
    miracle_hub.compress(folders.retrained, tmp_path / "local", **OPTIONS, progress=False)
    assert weights_in(from_hub) == weights_in(tmp_path / "local")
    assert weights_in(from_hub) != weights_in(folders.compressed)


def test_other_copies_of_the_weights_are_not_downloaded(hub: LoopbackHub, from_hub: Path) -> None:
    assert hub.downloads("user/dense") == {"config.json", "model.safetensors", "README.md", "LICENSE"}


# The card.


def test_card_places_the_repository_under_its_base_model(from_hub: Path) -> None:
    data = ModelCard.load(from_hub / "README.md").data.to_dict()
    assert data["base_model"] == "user/dense"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["compressed", "law", "miracle"]


def test_card_carries_license_and_languages_over_and_leaves_scores_behind(from_hub: Path) -> None:
    data = ModelCard.load(from_hub / "README.md").data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert data["language"] == ["de", "en"]
    assert data["pipeline_tag"] == "fill-mask"
    assert "model-index" not in data


def test_card_of_a_local_source_names_no_base_model(folders: Folders) -> None:
    data = ModelCard.load(folders.compressed / "README.md").data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data


@pytest.mark.parametrize(
    "broken", [b"---\nlicense: [mit\n---\n", b"---\n- mit\n---\n", b"---\nlicense: \xff"]
)
def test_broken_source_card_costs_its_license_and_not_the_compression(
    broken: bytes, folders: Folders, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "README.md").write_bytes(broken)
    shutil.copytree(folders.compressed, out, ignore=shutil.ignore_patterns("README.md"))
    with pytest.warns(UserWarning, match="license and languages do not carry over"):
        write_card(out, Report(100, 10, 25, 3.2, 1.0, "ab", "cpu"), source, "user/dense")
    data = ModelCard.load(out / "README.md").data
    assert isinstance(data, ModelCardData) and data.license is None and data.base_model == "user/dense"


# Without a server.

CACHED = """
import json, miracle_hub
tensors = miracle_hub.load_state_dict("user/private")
print(json.dumps([sorted(tensors), miracle_hub.inspect("user/private").digest]))
"""


def test_offline_mode_reads_the_cache(client: Client, loaded: Path, read: Read, tmp_path: Path) -> None:
    stopped = Client(stopped_url(), client.home)
    found = stopped.python(LOAD + CACHED, tmp_path, HF_HUB_OFFLINE="1")
    assert found == [sorted(read.facts["names"]), read.facts["digest"]]
    for name in ("compressed.safetensors", "private.safetensors"):
        assert_bitwise_equal(load_file(tmp_path / name), load_file(loaded / name))


def test_cache_is_read_when_the_server_is_gone(client: Client, read: Read) -> None:
    found = Client(stopped_url(), client.home).python(CACHED)
    assert found == [sorted(read.facts["names"]), read.facts["digest"]]
