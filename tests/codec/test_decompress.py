"""Back to a dense checkpoint or a state dict: the same tensors either way, and no damage goes unnoticed."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.report import Report
from miracle_hub.errors import (
    ChecksumError,
    FormatError,
    MissingWeightsError,
    SourceError,
    UnsupportedVersionError,
)
from miracle_hub.files.container import opened
from miracle_hub.format.payload import decode_header
from miracle_hub.options import DecompressOptions

Compress = Callable[..., Report]
SaveModel = Callable[..., Path]


def decompress(source: Path, out: Path, **options: Any) -> int:
    return decompress_folder(source, out, DecompressOptions(**{"progress": False, **options}))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(raw(a[n]), raw(b[n])) for n in a
    )


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def payload_span(file: Path, name: str) -> tuple[int, int]:
    """Where a tensor's bytes lie in a safetensors file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + start, 8 + length + stop


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file, {"format": "pt", "narrowed_from_F32": "*"})


def test_the_dense_checkpoint_holds_exactly_the_state_dict(
    save_model: SaveModel, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    tensors |= {
        "bf": tensors["first.weight"].bfloat16(),
        "half": tensors["first.weight"].half(),
        "double": tensors["first.weight"].double(),
        "ids": torch.arange(3),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    source = save_model(tensors, shards=3, config={"model_type": "bert", "dtype": "float32", "x": 1})
    compress(source, tmp_path / "small", max_shard_size="4kB")
    n_bytes = decompress(tmp_path / "small", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert same(dense, load_state_dict(tmp_path / "small"))
    assert {n: (t.dtype, t.shape) for n, t in dense.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }
    assert n_bytes == (tmp_path / "dense" / "model.safetensors").stat().st_size
    for name in ("config.json",):
        assert json.loads((tmp_path / "dense" / name).read_text()) == json.loads((source / name).read_text())


def test_a_sharded_checkpoint_comes_with_its_index(compressed: Path, tmp_path: Path) -> None:
    decompress(compressed, tmp_path / "dense", max_shard_size="30kB")
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    held: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(tmp_path / "dense" / file)
        assert all(index["weight_map"][name] == file for name in shard)
        held |= shard
    assert same(held, load_state_dict(compressed))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    assert same(held, load_state_dict(tmp_path / "dense"))


def test_other_files_come_along_but_not_the_card(compressed: Path, tmp_path: Path) -> None:
    (compressed / "README.md").write_text("compressed")
    (compressed / "tokenizer.json").write_text("{}")
    decompress(compressed, tmp_path / "dense")
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip


def test_compressing_the_dense_checkpoint_again_is_possible(
    compressed: Path, compress: Compress, tmp_path: Path
) -> None:
    decompress(compressed, tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "again")
    assert load_state_dict(tmp_path / "again").keys() == load_state_dict(compressed).keys()


def test_a_single_file_is_read_like_its_folder(compressed: Path) -> None:
    assert same(load_state_dict(compressed / "model.safetensors"), load_state_dict(str(compressed)))


def test_any_flipped_bit_of_a_payload_is_an_error_that_names_the_tensor(compressed: Path) -> None:
    file = compressed / "model.safetensors"
    data = file.read_bytes()
    start, stop = payload_span(file, "second.weight")
    positions = [*range(start, start + 50), *range(start + 50, stop, 97), stop - 1]
    for at in positions:
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"second\.weight"):
            load_state_dict(compressed)


def test_a_damaged_magic_is_noticed_by_every_reader(compressed: Path, tmp_path: Path) -> None:
    expected = inspect_folder(compressed).digest
    file = compressed / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[payload_span(file, "first.weight")[0]] ^= 1
    file.write_bytes(data)
    for read in (load_state_dict, inspect_folder, lambda path: decompress(path, tmp_path / "dense")):
        with pytest.raises(ChecksumError) as raised:
            read(compressed)
        message = str(raised.value)
        assert message.startswith(
            f"{compressed}: config.json promises compressed tensors of digest {expected}, found "
        )
        assert message.endswith(
            "; not compressed, though they look it: first.weight; tensors are damaged, missing or from "
            "another version: download the folder again"
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {name: tensor for name, tensor in t.items() if name != "first.weight"},
        lambda t: {name.replace("first", "third"): tensor for name, tensor in t.items()},
        lambda t: {**t, "first.weight": t["second.weight"], "second.weight": t["first.weight"]},
        lambda t: {**t, "third.weight": t["second.weight"].clone()},
    ],
    ids=["lost", "renamed", "swapped", "added"],
)
def test_payloads_that_are_sound_but_not_those_of_the_repository_are_noticed(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], compressed: Path
) -> None:
    rewrite(compressed / "model.safetensors", change)
    with pytest.raises(ChecksumError, match=r"config\.json promises compressed tensors of digest"):
        load_state_dict(compressed)
    rewrite(compressed / "model.safetensors", lambda tensors: tensors)


def test_a_wrong_digest_inside_a_payload_is_skipped_only_when_asked(compressed: Path) -> None:
    (compressed / "config.json").unlink()
    right = load_state_dict(compressed)["first.weight"]

    def forge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        payload = bytearray(tensors["first.weight"].numpy().tobytes())
        _, length = decode_header(bytes(payload), "w")
        payload[length - 1] ^= 1
        payload[5:9] = zlib.crc32(bytes(payload[9:])).to_bytes(4, "little")
        return {**tensors, "first.weight": torch.frombuffer(payload, dtype=torch.uint8)}

    rewrite(compressed / "model.safetensors", forge)
    with pytest.raises(ChecksumError, match=r"^first\.weight: the decoded weights have digest"):
        load_state_dict(compressed)
    assert torch.equal(load_state_dict(compressed, verify=False)["first.weight"], right)


@pytest.mark.parametrize("text", ["", "{", "5", '"norm.weight"', '{"a": 1}', "[1]", '[["a"]]', "**"])
def test_metadata_that_names_no_tensors_is_an_error(text: str, compressed: Path) -> None:
    file = compressed / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"narrowed_from_F32": text})
    with pytest.raises(FormatError) as raised:
        load_state_dict(compressed)
    assert str(raised.value) == (
        f"{file}: metadata narrowed_from_F32: expected '*' or a JSON list of names, found {text!r}; the file "
        "is damaged: download it again"
    )


def test_a_list_of_narrowed_tensors_leaves_the_others_in_float16(compressed: Path) -> None:
    file = compressed / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"narrowed_from_F32": '["norm.weight"]'})
    decoded = load_state_dict(file)
    assert (decoded["norm.weight"].dtype, decoded["second.bias"].dtype) == (torch.float32, torch.float16)


def test_truncated_and_missing_files_are_named(compressed: Path, tmp_path: Path) -> None:
    file = compressed / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        FormatError, match=f"^{file}: expected a safetensors file, found {len(data) // 2} bytes"
    ):
        decompress(compressed, tmp_path / "dense")
    file.unlink()
    with pytest.raises(MissingWeightsError):
        decompress(compressed, tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_a_repository_of_a_newer_format_says_to_upgrade(compressed: Path) -> None:
    config = json.loads((compressed / "config.json").read_text())
    config["quantization_config"]["format_version"] = 5
    (compressed / "config.json").write_text(json.dumps(config))
    for read in (load_state_dict, inspect_folder):
        with pytest.raises(UnsupportedVersionError) as raised:
            read(compressed)
        assert str(raised.value) == (
            f"{compressed / 'config.json'}: this miracle-hub reads format versions up to 4, found 5; "
            "upgrade: pip install -U miracle-hub"
        )


def test_a_config_whose_quantization_is_no_object_is_named(compressed: Path) -> None:
    (compressed / "config.json").write_text('{"quantization_config": [1]}')
    with pytest.raises(SourceError, match=r"quantization_config: expected a JSON object, found '\[1\]'"):
        load_state_dict(compressed)


def test_what_is_no_folder_is_called_by_its_kind(
    compress: Compress, save_model: SaveModel, tmp_path: Path
) -> None:
    source = save_model({"w": torch.randn(64, 64), "v": torch.randn(64, 64)})
    compress(source, tmp_path / "out", bits_per_weight=8)
    file, nowhere = tmp_path / "out" / "model.safetensors", tmp_path / "nowhere"
    with pytest.raises(MissingWeightsError) as raised:
        decompress(file, tmp_path / "dense")
    assert str(raised.value) == (
        f"{file}: expected a folder with model.safetensors, found a file; give the folder that it is in"
    )
    for path, found in ((nowhere, "none"), (tmp_path, "a folder")):
        with pytest.raises(FormatError) as defect, opened(path):
            pass
        assert str(defect.value) == (
            f"{path}: expected a safetensors file, found {found}; check the path, or download it again"
        )


def test_a_networks_stream_is_not_handed_out_as_a_tensor(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "network_1.safetensors"
    (tmp_path / "source").mkdir()
    shutil.copy(golden, tmp_path / "source" / "model.safetensors")
    for read in (load_state_dict, lambda path: decompress(path, tmp_path / "dense")):
        with pytest.raises(FormatError) as raised:
            read(tmp_path / "source")
        assert str(raised.value) == (
            f"{tmp_path / 'source' / 'model.safetensors'}: expected tensors by name, found a network's "
            "stream, whose names and shapes are its module's; read it with miracle_hub.load(path, module)"
        )
    assert not (tmp_path / "dense").exists()
