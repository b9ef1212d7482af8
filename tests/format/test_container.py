"""safetensors files: ours read by the library, the library's errors read by people."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from miracle_hub.errors import FormatError, OutputExistsError, OutputWriteError
from miracle_hub.files.container import encode_file_header, opened, write_file
from miracle_hub.files.whole import writing
from miracle_hub.format.spec import TensorSpec

ENTRIES = [
    TensorSpec('größe."weight"', "F32", (2, 3)),
    TensorSpec("empty", "F16", (0, 4)),
    TensorSpec("scalar", "I64", ()),
    TensorSpec("bytes", "U8", (5,)),
]


def data(entry: TensorSpec) -> bytes:
    return bytes(range(entry.n_bytes))


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_file(path, ENTRIES, {"format": "pt", "k": "v"}, data)
    tensors = load_file(path)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {e.name: e.shape for e in ENTRIES}
    assert torch.equal(tensors["bytes"], torch.arange(5, dtype=torch.uint8))
    assert torch.equal(
        tensors['größe."weight"'].view(torch.uint8).flatten(), torch.arange(24, dtype=torch.uint8)
    )
    with opened(path) as file:
        assert file.metadata() == {"format": "pt", "k": "v"}


def test_the_header_is_compact_and_ends_on_eight_bytes() -> None:
    header = encode_file_header(ENTRIES, {"format": "pt"})
    assert len(header) % 8 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    table = json.loads(header[8:])
    assert [e["data_offsets"] for n, e in table.items() if n != "__metadata__"] == [
        [0, 24],
        [24, 24],
        [24, 32],
        [32, 37],
    ]


def test_tensors_are_asked_for_one_at_a_time_in_order(tmp_path: Path) -> None:
    asked: list[str] = []

    def recorded(entry: TensorSpec) -> bytes:
        asked.append(entry.name)
        return data(entry)

    write_file(tmp_path / "a.safetensors", ENTRIES, {}, recorded)
    assert asked == [entry.name for entry in ENTRIES]


def test_data_of_another_length_than_planned_is_a_bug_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="bytes: planned 5 bytes, got 4"):
        write_file(tmp_path / "a.safetensors", ENTRIES[3:], {}, lambda entry: bytes(4))


def test_a_full_disk_names_the_file_and_says_what_to_do() -> None:
    with pytest.raises(OutputWriteError) as raised, writing(Path("/models/out")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(raised.value) == (
        "/models/out: cannot be written: No space left on device; free some space and run it again"
    )


def test_a_full_disk_is_named_when_safetensors_writes() -> None:
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OutputWriteError, match=r"^/models/out: .* \(os error 28\); free some space"):
        with writing(Path("/models/out")):
            raise SafetensorError(said)


def test_errors_of_our_own_pass_through_unchanged() -> None:
    with pytest.raises(OutputExistsError, match="^mine$"), writing(Path("/models/out")):
        raise OutputExistsError("mine")


@pytest.mark.parametrize("kept", [0, 7, 8, 60, -1])
def test_a_truncated_file_is_named_with_its_size(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(6.0)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    size = path.stat().st_size
    with pytest.raises(FormatError) as raised, opened(path):
        pass
    message = str(raised.value)
    assert message.startswith(f"{path}: expected a safetensors file, found {size} bytes that are not: ")
    assert message.endswith("the file is truncated or damaged: download it again")


def test_pickle_under_the_name_of_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(FormatError, match="expected a safetensors file"), opened(path):
        pass
