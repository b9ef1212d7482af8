"""What is written is read again, whatever its shapes, dtypes, codes and names, here and by other decoders."""

import math
import re
import runpy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.compress import compress_folder
from miracle_hub.codec.decompress import decompress_folder, load_state_dict
from miracle_hub.codec.dtypes import raw_bytes
from miracle_hub.codec.network import decode_stream_entry, encode_stream_entry, read_network, write_network
from miracle_hub.codec.trellis import DTYPE_NAMES, TORCH_DTYPES, decode_payload, encode_tensor, matrix_columns
from miracle_hub.coding.scales import rounded_scales
from miracle_hub.errors import BudgetError
from miracle_hub.files.container import opened, write_file
from miracle_hub.format.network import NetworkHeader, SharedSpec
from miracle_hub.format.payload import DTYPES, Segment
from miracle_hub.format.spec import TensorSpec
from miracle_hub.options import CompressOptions, DecompressOptions

GOLDEN = Path(__file__).parents[1] / "golden"
PAYLOADS, NETWORKS, REPOSITORIES = (
    runpy.run_path(str(GOLDEN / f"{name}_decoder.py")) for name in ("payload", "network", "repository")
)
SETTINGS = settings(deadline=None, derandomize=True, database=None)
AWKWARD = [
    "",
    ".",
    "a.b.weight",
    "../../x",
    "/etc/passwd",
    "C:\\x",
    "größe",
    "\0",
    "a\nb",
    "層.weight",
    "x" * 5000,
]

names = st.sampled_from(AWKWARD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
seeds = st.integers(0, 2**64 - 1)
dtypes = st.sampled_from([TORCH_DTYPES[name] for name in DTYPES])


@st.composite
def shapes(draw: st.DrawFn, least: int = 1, most: int = 3000) -> tuple[int, ...]:
    """None, one or many dimensions, long and flat ones among them, of at most `most` weights."""
    shape: list[int] = []
    for _ in range(draw(st.integers(0, 5))):
        room = most // max(1, math.prod(shape))
        shape.append(min(room, draw(st.integers(least, 9) | st.sampled_from([1, 32, 48, 100, 1024, most]))))
    return tuple(draw(st.permutations(shape)))


@st.composite
def codes(draw: st.DrawFn, window: int, step_weights: int) -> Code:
    """Short windows, so that encoding takes a moment."""
    bits = draw(st.integers(1, window))
    return Code(bits, draw(st.integers(1, bits)), draw(st.integers(1, step_weights)), draw(seeds), 0)


def gaussian(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    """To the bit."""
    alike = found.dtype == expected.dtype and found.shape == expected.shape
    return alike and raw_bytes(found) == raw_bytes(expected)


@given(st.lists(st.tuples(names, shapes(0), dtypes), unique_by=lambda entry: entry[0], max_size=6), names)
@SETTINGS
def test_a_file_gives_back_every_entry(drawn: list[tuple[str, Any, torch.dtype]], note: str) -> None:
    tensors = {name: gaussian(shape, dtype, 0) for name, shape, dtype in drawn}
    entries = [TensorSpec(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        write_file(path, entries, {"note": note}, lambda entry: raw_bytes(tensors[entry.name]))
        with opened(path) as file:
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            assert file.metadata() == {"note": note}
    assert found.keys() == tensors.keys() and all(same(found[name], tensors[name]) for name in tensors)


@given(st.data())
@settings(SETTINGS, max_examples=60)
def test_a_payload_decodes_to_the_same_bits_here_and_apart(data: st.DataObject) -> None:
    shape, dtype = data.draw(shapes()), data.draw(dtypes)
    columns = matrix_columns(shape)
    rows, code = math.prod(shape) // columns, data.draw(codes(9, 20))
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    segments = [
        Segment(
            b - a, replace(data.draw(codes(6, 9)) if i else code, seed=code.seed), data.draw(st.booleans())
        )
        for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
    ]
    rotation = 2 ** data.draw(st.integers(0, min(7, (columns & -columns).bit_length() - 1)))
    options = {"band_columns": data.draw(st.integers(0, columns + 1)), "permuted": data.draw(st.booleans())}
    weights = gaussian(shape, dtype, 1)
    payload = encode_tensor(weights, segments, rotation, where="w", **options)
    decoded, header = decode_payload(torch.frombuffer(bytearray(payload), dtype=torch.uint8), "w")
    number, expected, error, digest = PAYLOADS["decode"](payload)
    assert decoded.shape == weights.shape and raw_bytes(decoded) == expected.tobytes()
    assert (DTYPES[number], error) == (DTYPE_NAMES[dtype], header.relative_error)
    assert (digest, len(payload)) == (header.digest, header.payload_bytes)


@given(st.data())
@settings(SETTINGS, max_examples=60)
def test_a_networks_file_decodes_to_the_same_bits_here_and_apart(data: st.DataObject) -> None:
    specs = []
    for name in data.draw(st.lists(names, unique=True, min_size=1, max_size=5)):
        shape, kind = data.draw(shapes(most=200)), data.draw(st.integers(0, 2))
        n_values = data.draw(st.integers(1, math.prod(shape))) if kind else math.prod(shape)
        specs.append(SharedSpec(name, DTYPE_NAMES[data.draw(dtypes)], shape, kind, n_values))
    header = NetworkHeader(data.draw(codes(24, 256)), tuple(specs))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    message = rng.integers(0, 256, header.code.message_bytes(header.n_values)).astype(np.uint8)
    message[-1] &= 0xFF << (-header.code.message_bits(header.n_values) % 8) & 0xFF
    scales = rounded_scales(torch.from_numpy(rng.random(len(specs))).float())
    stream, _ = encode_stream_entry(header, scales, torch.from_numpy(message))
    plain = {"plain": torch.tensor(3)} if "plain" not in {spec.name for spec in specs} else {}
    with tempfile.TemporaryDirectory() as folder:
        write_network(Path(folder) / "f", {"miracle": stream}, plain)
        found, others = read_network(Path(folder) / "f")
    assert found == stream and others.keys() == plain.keys()
    decoded = decode_stream_entry(
        stream, tuple(replace(s, sharing=0, n_values=s.n_weights) for s in specs), "f"
    )
    expected = NETWORKS["decode"](stream, [(s.name, s.dtype, s.shape) for s in specs])
    assert decoded.keys() == expected.keys()
    for spec in specs:
        weights = torch.from_numpy(expected[spec.name].copy()).to(TORCH_DTYPES[spec.dtype])
        assert same(decoded[spec.name], weights.view(spec.shape))


def compressed(source: Path, out: Path, extra_bytes: int, **options: Any) -> None:
    """Some bytes above the least size, which the error for asking less says."""
    try:
        compress_folder(source, out, CompressOptions(size=1, **options))
    except BudgetError as error:
        match = re.search(r"least possible is ([\d,]+) bytes", str(error))
        assert match
        size = int(match[1].replace(",", "")) + extra_bytes
        compress_folder(source, out, CompressOptions(size=size, **options))


@given(st.data())
@settings(SETTINGS, max_examples=12)
def test_a_folder_loads_to_the_same_bits_here_and_apart(data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.tuples(names, shapes(0), dtypes), max_size=5, unique_by=lambda t: t[0]))
    tensors = {name: gaussian(shape, dtype, i) for i, (name, shape, dtype) in enumerate(drawn)}
    tensors["some.weight"] = gaussian((33, 40), data.draw(dtypes), 9)
    tensors |= {"norm.weight": gaussian((40,), torch.float32, 8), "half": gaussian((3,), torch.float16, 7)}
    options = {"window_bits": 8, "progress": False, "seed": data.draw(seeds)}
    options["max_shard_size"] = data.draw(st.sampled_from([1, 3000, "5GB"]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "dense").mkdir()
        save_file(tensors, folder / "dense" / "model.safetensors")
        (folder / "dense" / "config.json").write_text("{}" if data.draw(st.booleans()) else '{"a": "é"}')
        compressed(folder / "dense", folder / "small", data.draw(st.integers(0, 300)), **options)
        found = {name: t.clone() for name, t in load_state_dict(folder / "small").items()}
        if (folder / "small" / "config.json").read_text() != "{}":
            apart = REPOSITORIES["read"](folder / "small")
            assert {n: (DTYPE_NAMES[t.dtype], list(t.shape), raw_bytes(t)) for n, t in found.items()} == apart
        decompress_folder(folder / "small", folder / "again", DecompressOptions(progress=False))
        again = load_state_dict(folder / "again")
        assert again.keys() == found.keys() and all(same(again[name], found[name]) for name in found)
        written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert not [
        path for path in written if not re.fullmatch(r"(dense|small|again)(/(config|model)[\w.-]*)?", path)
    ]
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }
    for name, tensor in tensors.items():
        is_coded = not torch.equal(found[name], tensor) and not torch.equal(
            found[name], tensor.half().to(tensor.dtype)
        )
        assert not is_coded or tensor.numel() >= 1024
