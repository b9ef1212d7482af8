"""Guards: everything that a file, a repository and its config.json say changes them, and order does not."""

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
    GUARD_ALONE,
    Contents,
    Line,
    Sealing,
    config_guard,
    guards_of_stages,
    is_stream_alone,
    line_of,
    placeholder,
    read_contents,
    repository_guard,
    with_guard,
    with_own_guard,
)
from miracle_hub.codec.guarded import (
    check_config,
    check_files,
    check_index,
    check_own_guard,
    stated_guard,
    unguarded,
)
from miracle_hub.errors import ChecksumError, FormatError
from miracle_hub.files import container
from miracle_hub.files.container import write_file
from miracle_hub.format.spec import TensorSpec

PAYLOAD = b"MRCL" + bytes([1]) + bytes(range(40))
RAW = {"a.weight": b"\x00\x3c" * 6, 'größe."b"': bytes(8), "coded": PAYLOAD, "empty": b""}
ENTRIES = [
    TensorSpec("a.weight", "F16", (2, 3)),
    TensorSpec('größe."b"', "I64", ()),
    TensorSpec("coded", "U8", (len(PAYLOAD),)),
    TensorSpec("empty", "F32", (0, 4)),
]
METADATA = {"format": "pt", "narrowed_from_F32": "*"}
CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "layer_norm_eps": 1e-12,
    "lone": "\ud800",
    "quantization_config": {"quant_method": "miracle", "format_version": 1, "digest": "0" * 64},
}


def write(path: Path, key: str = GUARD, entries: list[TensorSpec] = ENTRIES) -> Contents:
    """A guarded file, as writers write it."""
    sealing = Sealing(METADATA, key)
    data = sealing.noting(lambda entry: RAW[entry.name])
    write_file(path, entries, METADATA | placeholder(key), data, lambda: sealing.metadata)
    return sealing.contents(path)


@pytest.fixture
def file(tmp_path: Path) -> Contents:
    return write(tmp_path / "model.safetensors")


def with_line(contents: Contents, number: int, **changes: Any) -> Contents:
    lines = list(contents.lines)
    lines[number] = replace(lines[number], **changes)
    return replace(contents, lines=tuple(lines))


# Files.


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


# Repositories.


def folder_of(tmp_path: Path, key: str = GUARD) -> tuple[Path, list[Contents], dict[str, Any]]:
    """Two files, and the config.json that goes with them."""
    files = [write(tmp_path / f"{i}.safetensors", key, ENTRIES[i::2]) for i in range(2)]
    config = with_guard(CONFIG, [repository_guard(file.digest for file in files)])
    return tmp_path / "config.json", files, config


def test_a_whole_repository_passes_in_any_order(tmp_path: Path) -> None:
    path, files, config = folder_of(tmp_path)
    check_config(path, config)
    check_files(files, path, config)
    check_files(files[::-1], path, config)
    check_files(files, path, None)


@pytest.mark.parametrize("change", ["missing", "twice", "another", "unguarded and damaged"])
def test_files_together_are_what_config_promises(change: str, tmp_path: Path) -> None:
    path, files, config = folder_of(tmp_path)
    wrong = {
        "missing": files[:1],
        "twice": [*files, files[1]],
        "another": [files[0], write(tmp_path / "2.safetensors", entries=ENTRIES[:1])],
        "unguarded and damaged": [files[0], replace(files[1], metadata={**METADATA, "x": ""})],
    }[change]
    with pytest.raises(ChecksumError, match=r"quantization_config\.guard: expected files of digest"):
        check_files(wrong, path, config)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path, files, config = folder_of(tmp_path)
    with pytest.raises(ChecksumError, match=r"1\.safetensors: expected what guard"):
        check_files([files[0], with_line(files[1], 0, dtype="F8")], path, config)


def quantization(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, "quantization_config": {**config["quantization_config"], **changes}}


@pytest.mark.parametrize("lost", ["all", "guard", "method"])
def test_a_config_that_lost_its_guard_is_refused(lost: str, tmp_path: Path) -> None:
    path, files, config = folder_of(tmp_path)
    damaged = {
        "all": {"model_type": "bert"},
        "guard": CONFIG,
        "method": quantization(config, quant_method="x"),
    }
    with pytest.raises(FormatError, match=r"expected a quantization_config with a guard, as 0\.safetensors"):
        check_files(files, path, damaged[lost])


def test_files_that_stand_alone_or_are_old_need_no_config(tmp_path: Path) -> None:
    path, files, _ = folder_of(tmp_path, GUARD_ALONE)
    check_files(files, path, {"width": 5})
    check_files([replace(file, metadata=METADATA) for file in files], path, CONFIG)
    with pytest.raises(ChecksumError):
        check_files([with_line(files[0], 0, name="x")], path, {"width": 5})


@pytest.mark.parametrize(
    "guard",
    [5, [], {}, {"tensors": "0" * 64}, {"tensors": []}, {"tensors": [5]}, {"tensors": ["0" * 63]}],
    ids=str,
)
def test_what_is_no_guard_is_refused(guard: Any, tmp_path: Path) -> None:
    path, files, config = folder_of(tmp_path)
    with pytest.raises(FormatError, match=r"config\.json: quantization_config\.guard: expected"):
        check_files(files, path, quantization(config, guard=guard))


def test_stages_have_guards_of_their_own(tmp_path: Path) -> None:
    path, files, _ = folder_of(tmp_path)
    config = with_guard(CONFIG, guards_of_stages([files[:1], files[1:]]))
    check_files(files[:1], path, config, 1)
    check_files(files, path, config, 2)
    for found, stages in ((files, 1), (files[:1], 2), (files[1:], 2)):
        with pytest.raises(ChecksumError):
            check_files(found, path, config, stages)
    with pytest.raises(FormatError, match="expected 3 or more SHA-256 digests"):
        check_files(files, path, config, 3)


# config.json.


def stated(config: dict[str, Any]) -> dict[str, Any]:
    """The guard that a config.json states."""
    return config["quantization_config"]["guard"]


def test_layout_and_order_of_a_config_do_not_count() -> None:
    config = with_guard(CONFIG, ["0" * 64])
    again = json.loads(json.dumps(dict(reversed(config.items())), indent=7))
    assert config_guard(again) == config["quantization_config"]["guard"]["config"]
    check_config(Path("config.json"), again)


def test_the_guard_of_a_config_is_what_the_format_says() -> None:
    config = with_guard({"ß": 1.0, "a": [None, True], "quantization_config": {"quant_method": "miracle"}}, [])
    text = (
        '{"a":[null,true],"quantization_config":{"guard":{"tensors":[]},"quant_method":"miracle"},'
        '"\\u00df":1.0}'
    )
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert config["quantization_config"]["guard"] == {"tensors": [], "config": expected}


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config | {"layer_norm_eps": 1e-11},
        lambda config: config | {"model_typf": "bert"},
        lambda config: {key: value for key, value in config.items() if key != "lone"},
        lambda config: quantization(config, seed=0),
        lambda config: quantization(config, digest=None),
        lambda config: quantization(config, guard=stated(config) | {"tensors": ["1" * 64]}),
        lambda config: quantization(config, guard=stated(config) | {"config": "1"}),
        lambda config: quantization(config, guard=stated(config) | {"config": None}),
        lambda config: quantization(config, guard=stated(config) | {"more": 1}),
    ],
)
def test_every_field_of_a_config_is_covered(change: Any) -> None:
    config = with_guard(CONFIG, ["0" * 64])
    with pytest.raises(ChecksumError, match=r"^config\.json: expected what guard .* remove config from"):
        check_config(Path("config.json"), change(config))


def test_who_changes_a_config_on_purpose_removes_its_guard_and_keeps_the_tensors(
    tmp_path: Path,
) -> None:
    path, files, config = folder_of(tmp_path)
    only_tensors = {"tensors": stated(config)["tensors"]}
    changed = quantization(config | {"layer_norm_eps": 1e-11}, guard=only_tensors)
    check_config(path, changed)
    check_files(files, path, changed)
    with pytest.raises(ChecksumError):
        check_files(files[:1], path, changed)


def test_old_configs_state_no_guard() -> None:
    for config in (CONFIG, {}, {"quantization_config": None}, {"quantization_config": []}):
        assert stated_guard(Path("config.json"), config) is None
        check_config(Path("config.json"), config)


def test_a_network_s_arguments_are_covered_too() -> None:
    arguments = with_own_guard({"width": 10, "activation": "tanh"})
    check_own_guard(Path("config.json"), arguments)
    check_own_guard(Path("config.json"), {"width": 10})
    for change in ({"activation": "tan"}, {"more": 1}, {GUARD: "0" * 64}, {GUARD: None}):
        with pytest.raises(
            ChecksumError, match=r"^config\.json: .* on purpose, remove miracle_guard from it$"
        ):
            check_own_guard(Path("config.json"), arguments | change)


# Indices, and files without guards.


def test_an_index_guards_its_files(tmp_path: Path) -> None:
    _, files, _ = folder_of(tmp_path)
    index = tmp_path / "model.safetensors.index.json"

    def check(metadata: Any, files: list[Contents] = files) -> None:
        index.write_text(json.dumps({"metadata": metadata, "weight_map": {}}))
        check_index(index, files)

    right = {"total_size": 5, GUARD: repository_guard(file.digest for file in files)}
    check(right)
    check({}, [replace(file, metadata=METADATA) for file in files])
    with pytest.raises(ChecksumError, match=r"index\.json: metadata\.miracle_guard: expected files of"):
        check(right, files[:1])
    for metadata in ({"total_size": 5}, None, []):
        with pytest.raises(FormatError, match=r"expected miracle_guard in its metadata, as 0\.safetensors"):
            check(metadata)
    with pytest.raises(FormatError, match="expected 1 or more SHA-256 digests"):
        check({GUARD: 5})


def test_unguarded_tensors_are_told(file: Contents) -> None:
    assert unguarded(file) == ""
    old = replace(file, metadata=METADATA)
    assert unguarded(old) == 'without a guard, so that these are unguarded: a.weight, größe."b", empty'
    assert unguarded(replace(old, lines=[line for line in old.lines if line.is_framed])) == ""
