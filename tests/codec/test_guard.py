"""Guards of files: everything that a file says changes its guard, and order does not."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miracle_hub.codec.guard import (
    GUARD,
    Contents,
    Line,
    is_stream_alone,
    line_of,
    placeholder,
    read_contents,
)
from miracle_hub.codec.guarded import unguarded
from miracle_hub.errors import ChecksumError
from miracle_hub.files import container
from miracle_hub.files.container import write_file
from miracle_hub.format.spec import TensorSpec
from tests.codec.guards import ENTRIES, METADATA, PAYLOAD, RAW, with_line, write


@pytest.fixture
def file(tmp_path: Path) -> Contents:
    return write(tmp_path / "model.safetensors")


def test_a_guard_is_what_the_format_says(file: Contents) -> None:
    halves = hashlib.sha256(RAW["a.weight"]).hexdigest()[:32]
    zeros, nothing = (hashlib.sha256(raw).hexdigest()[:32] for raw in (bytes(8), b""))
    text = (
        '"format" "pt"\n'
        '"narrowed_from_F32" "*"\n'
        f'"a.weight" F16 [2,3] {halves}\n'
        '"coded" U8 [45] 4d52434c0100010203\n'
        f'"empty" F32 [0,4] {nothing}\n'
        f'"gr\\u00f6\\u00dfe.\\"b\\"" I64 [] {zeros}\n'
    )
    assert file.digest == hashlib.sha256(text.encode()).hexdigest()
    assert file.stated == file.guard == file.digest[:32] and file.is_part


def test_what_is_written_says_its_guard_and_is_read_by_the_library(file: Contents) -> None:
    assert read_contents(file.path) == replace(file, lines=read_contents(file.path).lines)
    assert sorted(line.text for line in read_contents(file.path).lines) == sorted(
        line.text for line in file.lines
    )
    assert torch.equal(load_file(file.path)["a.weight"], torch.ones(2, 3).half())
    read_contents(file.path).check()


def test_the_size_of_a_guarded_file_is_known_before_it_is_written(file: Contents) -> None:
    planned = container.encode_file_header(ENTRIES, METADATA | placeholder(GUARD))
    assert file.path.stat().st_size == len(planned) + sum(map(len, RAW.values()))


def test_a_seal_of_another_length_is_a_bug_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"planned a header of \d+ bytes, got \d+"):
        write_file(tmp_path / "a", ENTRIES[:1], {}, lambda e: RAW[e.name], lambda: {"much": "x" * 80})


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    "change",
    [{"name": "other"}, {"name": "a.weighu"}, {"dtype": "BF16"}, {"shape": (3, 2)}, {"content": "0" * 32}],
    ids=str,
)
def test_everything_of_an_entry_is_covered(file: Contents, number: int, change: dict[str, Any]) -> None:
    with pytest.raises(
        ChecksumError, match=r"model\.safetensors: expected what guard .* one of its 4 tensors"
    ):
        with_line(file, number, **change).check()


@pytest.mark.parametrize(
    "metadata",
    [{"format": "np"}, {"narrowed_from_F32": "[]"}, {"more": ""}, {GUARD: "0" * 32}, {GUARD: ""}],
    ids=str,
)
def test_metadata_are_covered(file: Contents, metadata: dict[str, str]) -> None:
    with pytest.raises(ChecksumError):
        replace(file, metadata={**file.metadata, **metadata}).check()


def test_lost_and_added_entries_are_found(file: Contents) -> None:
    for lines in (file.lines[1:], [*file.lines, Line("more", "F32", (), "0" * 32)]):
        with pytest.raises(ChecksumError):
            replace(file, lines=lines).check()


def test_two_tensors_that_changed_places_are_found(file: Contents) -> None:
    first, second = file.lines[0], file.lines[1]
    swapped = with_line(with_line(file, 0, content=second.content), 1, content=first.content)
    with pytest.raises(ChecksumError):
        swapped.check()


@given(st.permutations(range(4)))
def test_order_does_not_count(order: list[int]) -> None:
    lines = [line_of(entry, [RAW[entry.name]]) for entry in ENTRIES]
    found = Contents(Path("f"), dict(reversed(METADATA.items())), [lines[i] for i in order])
    assert found.digest == Contents(Path("f"), METADATA, lines).digest


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(NAMES, NAMES, st.sampled_from(["F32", "U8"]), st.lists(st.integers(0, 9), max_size=3))
def test_no_two_entries_or_items_have_one_line(name: str, value: str, dtype: str, shape: list[int]) -> None:
    line = Line(name, dtype, tuple(shape), "0" * 32)
    assert line.text.isascii() and line.text.count("\n") == 1
    quoted, end = json.JSONDecoder().raw_decode(line.text)
    assert quoted == name and line.text[end:].split() == [dtype, str(shape).replace(" ", ""), "0" * 32]
    item = Contents(Path("f"), {name: value}, [])
    assert item.digest != Contents(Path("f"), {}, [line]).digest


def test_the_single_entry_of_a_file_is_named(tmp_path: Path) -> None:
    alone = write(tmp_path / "m.safetensors", entries=ENTRIES[:1])
    with pytest.raises(ChecksumError, match=r"found [0-9a-f]{32}: a\.weight, a name"):
        with_line(alone, 0, content="1").check()


def test_pieces_and_payloads() -> None:
    """Plain bytes may come in any pieces; of a payload only the frame counts, which covers the rest."""
    whole = line_of(TensorSpec("w", "F32", (6,)), [bytes(24)])
    assert (
        whole == line_of(TensorSpec("w", "F32", (6,)), [bytes(10), bytes(0), bytes(14)])
        and not whole.is_framed
    )
    coded = line_of(TensorSpec("coded", "U8", (45,)), [PAYLOAD])
    assert coded.is_framed and coded == line_of(TensorSpec("coded", "U8", (45,)), [PAYLOAD[:-1] + b"x"])
    for other in (b"MRCX" + PAYLOAD[4:], PAYLOAD[:5] + b"x" + PAYLOAD[6:]):
        assert line_of(TensorSpec("coded", "U8", (45,)), [other]) != coded


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "raw"),
    [
        ("w", "I8", (45,), PAYLOAD),
        ("w", "U8", (5, 9), PAYLOAD),
        ("w", "U8", (8,), PAYLOAD[:8]),
        ("w", "U8", (45,), b"MRCN" + PAYLOAD[4:]),
    ],
)
def test_what_only_looks_like_a_payload_is_covered_whole(
    name: str, dtype: str, shape: tuple[int, ...], raw: bytes
) -> None:
    line = line_of(TensorSpec(name, dtype, shape), [raw])
    assert not line.is_framed and line.content == hashlib.sha256(raw).hexdigest()[:32]


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "PIECE_BYTES", 16)
    weights = torch.arange(100.0)
    save_file({"w": weights}, tmp_path / "w.safetensors")
    expected = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:32]
    assert [line.content for line in read_contents(tmp_path / "w.safetensors").lines] == [expected]


def test_dtypes_that_torch_has_not_are_covered(tmp_path: Path) -> None:
    entry = TensorSpec("six", "F6_E2M3", (4,))
    write_file(tmp_path / "a.safetensors", [entry], {}, lambda _: b"abc")
    found = read_contents(tmp_path / "a.safetensors").lines
    assert [line.content for line in found] == [hashlib.sha256(b"abc").hexdigest()[:32]]


def test_a_stream_alone_needs_no_guard() -> None:
    assert is_stream_alone([TensorSpec("miracle", "U8", (9,))])
    assert not is_stream_alone([TensorSpec("miracle", "U8", (9,)), ENTRIES[0]])
    assert not is_stream_alone(ENTRIES[:1]) and not is_stream_alone([])


def test_unguarded_tensors_are_told(file: Contents) -> None:
    assert unguarded(file) == ""
    old = replace(file, metadata=METADATA)
    assert unguarded(old) == 'without a guard, so that these are unguarded: a.weight, größe."b", empty'
    assert unguarded(replace(old, lines=[line for line in old.lines if line.is_framed])) == ""
