"""Hostile files and repositories: each is refused with its reason before anything is allocated."""

import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import miracle_hub
from miracle_hub.code import Code
from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.inspection import inspect_folder
from miracle_hub.codec.network import write_network
from miracle_hub.codec.report import Report
from miracle_hub.errors import (
    FormatError,
    MiracleError,
    MissingWeightsError,
    OptionError,
    SourceError,
    TruncatedPayloadError,
)
from miracle_hub.files import container
from miracle_hub.files.container import write_file
from miracle_hub.format.payload import Header, Segment, encode_header, encode_payload
from miracle_hub.format.spec import bytes_entry
from miracle_hub.names import matches
from miracle_hub.options import CompressOptions, DecompressOptions
from miracle_hub.plugin.config import MiracleConfig

DAMAGED = "; the file is truncated or damaged: download it again"


def readers(folder: Path) -> list[Callable[[], object]]:
    """Everything that reads a repository."""
    out = folder.with_name("dense")
    return [
        lambda: load_state_dict(folder),
        lambda: inspect_folder(folder),
        lambda: decompress_folder(folder, out, DecompressOptions(overwrite=True, progress=False)),
    ]


def refused(folder: Path, kind: type[MiracleError] = FormatError) -> str:
    """The text with which every reader refuses a repository."""
    texts = []
    for read in readers(folder):
        with pytest.raises(MiracleError) as raised:
            read()
        assert type(raised.value) is kind
        texts.append(str(raised.value))
    assert len(set(texts)) == 1 and not folder.with_name("dense").exists()
    return texts[0]


@contextmanager
def cheap() -> Iterator[None]:
    """What happens inside takes less than a megabyte."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header: object, data: bytes = b"", n_bytes: int | None = None) -> bytes:
    """A safetensors file with any header, or header length, whatsoever."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if n_bytes is None else n_bytes).to_bytes(8, "little") + text + data


FOUR = entry("U8", [4], 0, 4)
CONTAINERS = {
    "no bytes at all": (b"", "header too small"),
    "a header length and no header": (file_of(b"", n_bytes=2), "invalid header length"),
    "a header longer than the file": (file_of({"a": FOUR}, n_bytes=99), "invalid header length"),
    "a header of 8 exabytes": (file_of(b"{}", n_bytes=2**63), "header too large"),
    "a header of 200 MB": (file_of(b"{}", n_bytes=200_000_000), "header too large"),
    "data cut off": (file_of({"a": FOUR}, bytes(3)), "incomplete metadata"),
    "data behind the end": (file_of({"a": FOUR}, bytes(5)), "incomplete metadata"),
    "tensors that overlap": (file_of({"a": FOUR, "b": entry("U8", [4], 2, 6)}, bytes(6)), "invalid offset"),
    "a hole between tensors": (file_of({"a": FOUR, "b": entry("U8", [1], 5, 6)}, bytes(6)), "invalid offset"),
    "an end before its start": (file_of({"a": entry("U8", [4], 4, 0)}, bytes(4)), "invalid"),
    "offsets beyond 64 bits": (file_of({"a": entry("U8", [4], 0, 2**64 + 4)}, bytes(4)), "invalid"),
    "fewer bytes than the shape": (
        file_of({"a": entry("F32", [4], 0, 4)}, bytes(4)),
        "doesn't match|invalid",
    ),
    "2^62 × 4 weights": (file_of({"a": entry("F32", [2**62, 4], 0, 0)}), "overflow"),
    "2^62 × 4 bytes": (file_of({"a": entry("F64", [2**62], 0, 0)}), "overflow"),
    "a dimension of 2^64": (file_of({"a": entry("U8", [2**64, 0], 0, 0)}), "invalid type"),
    "a negative dimension": (file_of({"a": entry("U8", [-4], 0, 4)}, bytes(4)), "invalid value"),
    "a list for a header": (file_of([]), "invalid type"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "UTF-8"),
    "no JSON": (file_of(b"{'a': 1}"), "invalid JSON"),
    "JSON a million levels deep": (file_of(b'{"a":' + b"[" * 10**6), "recursion limit"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "invalid type"),
    "a dtype that there is not": (file_of({"a": entry("Q4", [4], 0, 4)}, bytes(4)), "unknown variant"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_that_is_no_sound_container_is_refused(name: str, folder: Path) -> None:
    """The clause in the middle is the safetensors library's."""
    data, clause = CONTAINERS[name]
    path = folder / "model.safetensors"
    path.write_bytes(data)
    found = refused(folder)
    assert found.startswith(f"{path}: expected a safetensors file, found {len(data)} bytes that are not: ")
    assert found.endswith(DAMAGED)
    with pytest.raises(FormatError, match=clause):
        load_state_dict(folder)
    with pytest.raises(FormatError, match=clause):
        miracle_hub.load(path, nn.Linear(2, 2))


def test_a_dimension_that_torch_cannot_count_is_refused(folder: Path) -> None:
    """safetensors allows it beside a dimension of 0."""
    path = folder / "model.safetensors"
    path.write_bytes(file_of({"a": entry("F32", [2**63, 0], 0, 0)}))
    text = (
        f"{path}: a: expected dimensions below 2^63, found shape [9223372036854775808, 0]; the file is "
        "hostile or damaged"
    )
    assert refused(folder) == text
    with pytest.raises(FormatError) as raised:
        miracle_hub.load(path, nn.Linear(2, 2))
    assert str(raised.value) == text


def test_a_dtype_that_torch_lacks_is_named_by_load(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(file_of({"a": entry("F6_E2M3", [4], 0, 3)}, bytes(3)))
    with pytest.raises(SourceError, match=f"^{path}: a: expected a dtype that torch knows, found F6_E2M3 "):
        miracle_hub.load(path, nn.Linear(2, 2))


def test_metadata_nested_a_million_levels_deep_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(file_of({"__metadata__": {"narrowed_from_F32": "[" * 10**6}}))
    assert refused(folder) == (
        f"{path}: metadata narrowed_from_F32: expected '*' or a JSON list of names, found {'[' * 80!r}; the "
        "file is damaged: download it again"
    )


def sealed(payload: bytes) -> bytes:
    return payload[:5] + zlib.crc32(payload[9:]).to_bytes(4, "little") + payload[9:]


def save_payload(folder: Path, payload: bytes) -> None:
    save_file({"w": torch.frombuffer(bytearray(payload), dtype=torch.uint8)}, folder / "model.safetensors")


ONE_BIT = Code(1, 1, 256)
BOMBS = {
    "2^40 weights": Header("F32", (2**20, 2**20), 2**20, 1, (Segment(2**20, ONE_BIT, False),)),
    "2^40 scales": Header("F32", (2**40, 1), 1, 1, (Segment(2**40, ONE_BIT, True),)),
    "64 segments of 2^34 weights": Header("F32", (2**40,), 2**34, 1, (Segment(1, ONE_BIT, False),) * 64),
    "a permuted stream in bands": Header("F32", (2**40,), 2**40, 1, (Segment(1, ONE_BIT, False),), 1, True),
    "long windows": Header("F32", (2**40,), 2**40, 1, (Segment(1, Code(24, 24, 1), False),)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_that_claim_a_trillion_weights_are_refused_at_once(name: str, folder: Path) -> None:
    header = BOMBS[name]
    assert header.n_weights == 2**40 and header.payload_bytes > 2**29
    bomb = sealed(encode_header(header) + bytes(200))
    save_payload(folder, bomb)
    with cheap():
        found = refused(folder, TruncatedPayloadError)
    n_bytes = header.payload_bytes
    assert found == f"w: the header announces a payload of {n_bytes} bytes, found {len(bomb)}{DAMAGED}"


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (
            Header("F32", (2**40, 2**40), 2**40, 1, (Segment(2**40, ONE_BIT, False),)),
            "(1099511627776, 1099511627776)",
        ),
        (
            Header("F32", (2**40,) * 8, 2**40, 1, (Segment(1, ONE_BIT, False),)),
            f"({', '.join([str(2**40)] * 8)})",
        ),
    ],
)
def test_a_shape_whose_product_overflows_is_refused(header: Header, found: str, folder: Path) -> None:
    bomb = sealed(encode_header(header) + bytes(200))
    save_payload(folder, bomb)
    assert refused(folder) == (
        f"w: byte {len(encode_header(header))} of the payload header: expected {header.rows} rows × "
        f"{header.columns} columns to fill the shape, found {found}; the file is damaged or was not written "
        "by miracle-hub"
    )


def test_narrow_bands_of_a_sound_payload_cost_no_more_than_its_weights(folder: Path) -> None:
    """A million bands of one column: 555 bytes that took 11 seconds and 1.3 GB."""
    header = Header("F32", (2**20,), 2**20, 1, (Segment(1, ONE_BIT, False),), 1)
    save_payload(folder, encode_payload(header, bytes(2 + sum(header.message_bytes))))
    tracemalloc.start()
    try:
        assert load_state_dict(folder, verify=False)["w"].shape == (2**20,)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_a_file_of_many_tensors_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor used to open it again: 4,000 of them, 0.4 MB, took 27 seconds."""
    header = Header("F32", (1,), 1, 1, (Segment(1, Code(4, 1, 1), False),))
    payload = encode_payload(header, bytes(2 + sum(header.message_bytes)))
    entries = [bytes_entry(f"layer.{i}", len(payload)) for i in range(300)]
    write_file(folder / "model.safetensors", entries, {}, lambda entry: payload)
    real, opens = container._open, []
    monkeypatch.setattr(container, "_open", lambda path: opens.append(path) or real(path))
    assert len(inspect_folder(folder).tensors) == len(load_state_dict(folder, verify=False)) == 300
    assert len(opens) == 2


def test_a_payload_of_another_shape_than_the_modules_is_not_decoded(tmp_path: Path) -> None:
    header = Header("F32", (2**22,), 2**22, 1, (Segment(1, ONE_BIT, False),))
    payload = encode_payload(header, bytes(2 + sum(header.message_bytes)))
    write_network(tmp_path / "f", {"weight": payload}, {"bias": torch.zeros(2)})
    with cheap(), pytest.raises(FormatError) as raised:
        miracle_hub.load(tmp_path / "f", nn.Linear(2, 2))
    assert str(raised.value) == (
        f"{tmp_path / 'f'}: weight: expected shape (2, 2), found (4194304,); load it into the module that it "
        "was made from"
    )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.uint8, torch.bool])
def test_numbers_of_another_kind_than_the_modules_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2, dtype=dtype), "bias": torch.zeros(2)}, tmp_path / "f")
    with pytest.raises(FormatError) as raised:
        miracle_hub.load(tmp_path / "f", nn.Linear(2, 2))
    assert str(raised.value) == (
        f"{tmp_path / 'f'}: weight: expected torch.float32, found {dtype}; load it into the module that it "
        "was made from"
    )
    save_file({"weight": torch.ones(2, 2).double(), "bias": torch.zeros(2).half()}, tmp_path / "f")
    loaded = miracle_hub.load(tmp_path / "f", nn.Linear(2, 2)).state_dict()
    assert torch.equal(loaded["weight"], torch.ones(2, 2))


@pytest.mark.parametrize("nested", ["[" * 10**5, '{"a":' * 101 + "1" + "}" * 101])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_nested_too_deep_is_refused(nested: str, name: str, folder: Path) -> None:
    if name == "config.json":
        save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    (folder / name).write_text(nested)
    found = refused(folder, SourceError if name == "config.json" else FormatError)
    assert found.startswith(f"{folder / name}: expected ")
    if name == "config.json" and nested[0] == "{":
        assert found == (
            f"{folder / name}: expected at most 100 levels of JSON, found more; the file is hostile or "
            "damaged"
        )


def test_json_of_as_many_levels_as_allowed_comes_through(folder: Path) -> None:
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    facts = {
        "quantization_config": {"quant_method": "miracle"},
        "a": json.loads('{"a":' * 99 + "1" + "}" * 99),
    }
    (folder / "config.json").write_text(json.dumps(facts))
    for read in readers(folder):
        read()


def test_a_config_that_is_a_folder_is_refused(folder: Path) -> None:
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").mkdir()
    assert refused(folder, SourceError) == (
        f"{folder / 'config.json'}: expected a file, found something else; download it again"
    )


@pytest.mark.parametrize("names", [5, [5], "layer", {"a": 1}])
def test_modules_that_are_no_list_of_names_are_refused(names: object, folder: Path) -> None:
    save_file({"w": torch.zeros(3, dtype=torch.uint8)}, folder / "model.safetensors")
    facts = {"quant_method": "miracle", "modules_to_not_convert": names}
    (folder / "config.json").write_text(json.dumps({"quantization_config": facts}))
    with pytest.raises(FormatError) as raised:
        inspect_folder(folder)
    assert str(raised.value) == (
        f"{folder / 'config.json'}: modules_to_not_convert: expected a list of names, found {str(names)!r}; "
        "download it again"
    )


@pytest.mark.parametrize("name", ["to_dict", "from_dict", "get_loading_attributes", "__class__"])
def test_a_figure_of_a_config_replaces_no_method(name: str) -> None:
    figures: dict[str, Any] = {name: 1}
    with pytest.raises(OptionError) as raised:
        MiracleConfig(**figures)
    assert str(raised.value) == (
        f"MiracleConfig: expected figures and options, found {name!r}, the name of a method; config.json is "
        "hostile or damaged: download it again"
    )


def test_a_figure_of_a_config_may_have_any_other_name() -> None:
    figures: dict[str, Any] = {"self": 1, "größe": 2}
    assert MiracleConfig(**figures).to_dict().items() >= figures.items()


def test_a_strangers_regular_expression_is_never_run() -> None:
    facts: dict[str, Any] = {"quant_method": "miracle", "modules_to_not_convert": "(a+)+b"}
    with pytest.raises(OptionError, match="^config.json: modules_to_not_convert: expected a list of names, "):
        MiracleConfig.from_dict(facts)
    facts["modules_to_not_convert"] = ["layer[0", "(a+)+b"]
    assert MiracleConfig.from_dict(facts).modules_to_not_convert == ["layer[0", "(a+)+b"]
    assert matches("layer[0.query", ["layer[0"]) and not matches("a" * 40, ["(a+)+b"])


def test_inspection_refuses_scales_that_no_reader_takes(folder: Path) -> None:
    header = Header("F32", (4,), 4, 1, (Segment(1, ONE_BIT, False),))
    save_payload(folder, encode_payload(header, b"\xc0\x7f" + bytes(sum(header.message_bytes))))
    start = len(encode_header(header))
    assert refused(folder) == (
        f"w: scale 0 at byte {start} of the payload: expected 0 or a number from 2^-64 to 2^64, found nan; "
        "the file is damaged: download it again"
    )


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b", "..", ".", "", 5, None])
def test_an_index_never_leaves_its_folder(name: object, folder: Path) -> None:
    save_file({"w": torch.zeros(3)}, folder.with_name("secret.safetensors"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    assert refused(folder) == (
        f"{index}: expected file names without folders, found {name!r}; the index is hostile or damaged"
    )


def test_an_index_that_names_a_folder_or_a_file_with_a_null_is_refused(folder: Path) -> None:
    (folder / "sub").mkdir()
    index = folder / "model.safetensors.index.json"
    for name in ("sub", "a\0b", "x" * 5000):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        assert refused(folder, MissingWeightsError) == (
            f"{folder}: {index.name} names {name[:100]}, which is missing; download the folder again"
        )


NAMES = ["../../escaped", "/tmp/escaped", "..", "a/b/c", "\0", "C:\\escaped", "[/red]", "\x1b[31m", "a\nb"]


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_names_of_tensors_never_become_paths(tmp_path: Path) -> None:
    (tmp_path / "in" / "model").mkdir(parents=True)
    source = tmp_path / "in" / "model"
    tensors = {name: torch.randn(32, 40) for name in NAMES}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "bert"}')
    small, dense = tmp_path / "in" / "small", tmp_path / "in" / "dense"
    options = CompressOptions(bits_per_weight=6.0, window_bits=8, max_shard_size="1kB", progress=False)
    compress_folder(source, small, options)
    decompress_folder(small, dense, DecompressOptions(max_shard_size="1kB", progress=False))
    assert load_state_dict(dense).keys() == load_state_dict(small).keys() == tensors.keys()
    assert everything(tmp_path) == sorted(
        ["in", *(path for path in everything(tmp_path) if path.startswith("in/"))]
    )
    allowed = {"config.json", "model.safetensors.index.json", "model.safetensors"}
    for folder in (small, dense):
        assert all(name in allowed or name.startswith("model-000") for name in everything(folder))


def test_names_that_command_a_terminal_are_printed_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from miracle_hub import cli

    tensors = {name: torch.zeros(2) for name in NAMES} | {"w": torch.randn(64, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    out = tmp_path.with_name(f"{tmp_path.name}-out")
    miracle_hub.compress(tmp_path, out, bits_per_weight=6, window_bits=8, progress=False)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["miracle", "inspect", str(out)])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    out = capsys.readouterr().out
    assert not raised.value.code and "\x1b" not in out and "\0" not in out
    for shown in ("[/red]", "\\x1b[31m", "\\x00", "a\\nb"):
        assert f" {shown} " in out


@pytest.mark.parametrize("target", ["../secret.txt", "/etc/passwd"])
def test_a_link_that_leaves_the_folder_is_not_copied(
    target: str, folder: Path, tensors: dict[str, Tensor], compress: Callable[..., Report], tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    save_file(tensors, folder / "model.safetensors")
    (folder / "vocab.txt").symlink_to(target)
    for write in (lambda: compress(folder, tmp_path / "out"), readers(folder)[2]):
        with pytest.raises(SourceError) as raised:
            write()
        assert str(raised.value) == (
            f"{folder / 'vocab.txt'}: expected a file of the folder, found a link that leaves it, to "
            f"{(folder / 'vocab.txt').resolve()}; replace the link by the file if it is to be copied, or "
            "else remove it"
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "dense").exists()


def test_links_inside_the_folder_and_those_of_the_hubs_cache_are_copied(
    tensors: dict[str, Tensor], compress: Callable[..., Report], tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "0", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(tensors, blobs / "1")
    (blobs / "2").write_text("words")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "vocab.txt").symlink_to("../../blobs/2")
    (snapshot / "again.txt").symlink_to("vocab.txt")
    compress(snapshot, tmp_path / "out")
    assert [(tmp_path / "out" / name).read_text() for name in ("vocab.txt", "again.txt")] == ["words"] * 2
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
