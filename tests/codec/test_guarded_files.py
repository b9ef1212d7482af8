"""What is written has its guards, to the byte of the budget; what is read is compared with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import miracle_hub
from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.guard import GUARD, GUARD_ALONE, read_contents, with_own_guard
from miracle_hub.codec.network import network_entries, network_file, write_network
from miracle_hub.codec.report import Report
from miracle_hub.codec.repository import OutputFile
from miracle_hub.errors import ChecksumError, FormatError, SourceError
from miracle_hub.files import container
from miracle_hub.options import CompressOptions

OPTIONS: dict[str, Any] = {"bits_per_weight": 5, "window_bits": 8, "progress": False}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(params=[{}, {"max_shard_size": "2kB"}, {"stages": 2, "max_shard_size": "2kB"}], ids=str)
def written(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> tuple[Path, Report]:
    """A repository of one file, of shards, and of stages."""
    out = tmp_path / "out"
    return out, compress_folder(model, out, CompressOptions(**OPTIONS | request.param))


def test_every_file_states_its_guard_and_the_size_is_the_promised_one(written: tuple[Path, Report]) -> None:
    folder, report = written
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        contents = read_contents(file)
        assert contents.stated == contents.guard == metadata(file)[GUARD]
    assert sum(file.stat().st_size for file in files) == report.compressed_bytes


def test_indices_and_config_state_the_guard_of_every_number_of_stages(written: tuple[Path, Report]) -> None:
    folder, _ = written
    guards = config_of(folder)["quantization_config"]["guard"]["tensors"]
    assert len(guards) == config_of(folder).get("stages", 1)
    indices = sorted(folder.glob("*.index.json"), key=lambda path: path.name.startswith("model.safe"))
    found = [json.loads(index.read_text())["metadata"][GUARD] for index in indices]
    assert found == (guards if indices else [])


def test_a_decompressed_model_has_no_guards(written: tuple[Path, Report], tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    miracle_hub.decompress(written[0], dense, max_shard_size="2kB", progress=False)
    assert "quantization_config" not in config_of(dense)
    (index,) = dense.glob("*.index.json")
    assert GUARD not in json.loads(index.read_text())["metadata"]
    assert all(metadata(file) == {"format": "pt"} for file in dense.glob("*.safetensors"))


def test_a_folder_without_config_is_written_with_guards_and_read(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    out = tmp_path / "out"
    compress_folder(model, out, CompressOptions(**OPTIONS))
    assert GUARD in metadata(out / "model.safetensors") and not (out / "config.json").exists()
    assert miracle_hub.load_state_dict(out) and not miracle_hub.verify(out).defects


def test_verify_reads_every_byte_of_a_weight_file_once(
    written: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards take the bytes that hashes take: nothing reads a plain tensor for them alone."""

    def second_read(path: Path) -> Any:
        raise AssertionError(f"{path} is read for its guard alone")

    monkeypatch.setattr(container, "raw_entries", second_read)
    monkeypatch.setattr("miracle_hub.codec.guard.raw_entries", second_read)
    found = miracle_hub.verify(written[0])
    assert not found.defects
    assert all("guard agrees" in file.found for file in found.files if file.name.endswith(".safetensors"))


# Networks' files.


def test_the_size_of_a_networks_file_is_known_with_its_guard(tmp_path: Path) -> None:
    plain, coded = {"mean": torch.randn(5)}, {"miracle": b"MRCN" + bytes(40)}
    n_bytes = write_network(tmp_path / "a.safetensors", coded, plain)
    planned = network_file("", network_entries(plain, {"miracle": 44}))
    assert planned.n_bytes == n_bytes == (tmp_path / "a.safetensors").stat().st_size
    assert metadata(tmp_path / "a.safetensors").keys() == {GUARD_ALONE}


def test_a_stream_alone_pays_for_no_guard(tmp_path: Path) -> None:
    write_network(tmp_path / "a.safetensors", {"miracle": b"MRCN" + bytes(40)}, {})
    assert metadata(tmp_path / "a.safetensors") == {}
    assert (tmp_path / "a.safetensors").stat().st_size == OutputFile(
        "", network_entries({}, {"miracle": 44}), {}
    ).n_bytes


def stray(folder: Path, **more: torch.Tensor) -> Path:
    """A folder with a network's stream under another name."""
    folder.mkdir()
    stream = torch.frombuffer(bytearray(b"MRCN" + bytes(60)), dtype=torch.uint8)
    save_file({"miraclf": stream, **more}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "read",
    [
        miracle_hub.load_state_dict,
        miracle_hub.inspect,
        lambda folder: miracle_hub.verify(folder).require(),
        lambda folder: miracle_hub.load_state_dict(folder / "model.safetensors"),
    ],
)
def test_a_stream_under_another_name_is_refused(read: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = stray(tmp_path / "folder", other=torch.ones(3))
    with pytest.raises(FormatError, match="miraclf: expected a network's stream to be named miracle"):
        read(folder)


def test_a_source_whose_tensor_readers_would_take_for_a_stream_is_refused(tmp_path: Path) -> None:
    source = stray(tmp_path / "source", weight=torch.randn(64, 64))
    with pytest.raises(SourceError, match=r"miraclf: expected plain numbers, found .* \(MRCN\)"):
        compress_folder(source, tmp_path / "out", CompressOptions(**OPTIONS))


# Changes on purpose, and old files.


def test_a_file_that_tools_wrote_anew_is_refused_beside_its_config(model: Path, tmp_path: Path) -> None:
    """It lost its guard, and config.json knows what it held."""
    out = tmp_path / "out"
    compress_folder(model, out, CompressOptions(**OPTIONS))
    file = out / "model.safetensors"
    kept = {key: value for key, value in metadata(file).items() if key != GUARD}
    save_file(load_file(file), file, kept)
    assert miracle_hub.load_state_dict(out)  # the same tensors: order and places do not count
    changed = load_file(file)
    name = next(name for name, tensor in changed.items() if tensor.is_floating_point())
    save_file(changed | {name: changed[name] * 2}, file, kept)
    with pytest.raises(ChecksumError, match=r"quantization_config\.guard: expected files of digest"):
        miracle_hub.load_state_dict(out)


def test_config_may_change_without_its_own_guard(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress_folder(model, out, CompressOptions(**OPTIONS))
    config = config_of(out)
    (out / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    with pytest.raises(ChecksumError, match="remove config from quantization_config.guard"):
        miracle_hub.load_state_dict(out)
    (defect,) = miracle_hub.verify(out).defects
    assert "remove config from quantization_config.guard" in defect
    del config["quantization_config"]["guard"]["config"]
    (out / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    assert miracle_hub.load_state_dict(out) and not miracle_hub.verify(out).defects


def test_a_nested_networks_config_is_verified_too(tmp_path: Path) -> None:
    """A mixin's repository may hold several networks, each in a folder with its own arguments."""
    write_network(tmp_path / "model.safetensors", {}, {"weight": torch.ones(2)})
    nested = tmp_path / "nested"
    nested.mkdir()
    shutil.copy(tmp_path / "model.safetensors", nested)
    (nested / "config.json").write_text(json.dumps(with_own_guard({"width": 5})))
    assert not miracle_hub.verify(tmp_path).defects
    (nested / "config.json").write_text(json.dumps(with_own_guard({"width": 5}) | {"width": 6}))
    (defect,) = miracle_hub.verify(tmp_path).defects
    assert defect.startswith(f"{nested / 'config.json'}: expected what guard ")


def test_a_networks_file_with_a_damaged_buffer_is_refused_by_load(tmp_path: Path) -> None:
    net, path = nn.BatchNorm1d(4), tmp_path / "a.safetensors"
    write_network(path, {}, net.state_dict())
    assert miracle_hub.load(path, nn.BatchNorm1d(4))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match="expected what guard"):
        miracle_hub.load(path, nn.BatchNorm1d(4))
