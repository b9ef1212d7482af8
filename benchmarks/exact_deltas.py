"""Lossless differences: bytes and seconds beside general compressors, in 32 and in 16 bits.

    python benchmarks/exact_deltas.py                       Gaussian moves: rows of results/exact-deltas.json
    python benchmarks/exact_deltas.py --folder deltas-work  the tune that benchmarks/deltas.py makes

What a size should be is predicted by the mean size of every tensor's moves alone, as if they were Gaussian
and every bit that is no news were spared. Ours are whole files, and what config.json states of the
base; general compressors get all tensors in one string, in whose place another one may be:

    xor               of the bit patterns of tune and base
    planes            the first bytes of all numbers, then the second ones, and so on
    minus             the numbers' difference in their own dtype: added to the base it may lack the last bits
"""

import argparse
import json
import lzma
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, record
from safetensors.torch import load_file, save_file
from torch import Tensor

import miracle_hub

# Of weights of deviation 0.05, and what a fine-tuning moves them by.
_DEVIATION, _MOVES, _SIDE = 0.05, (3e-5, 3e-4, 3e-3), 1024
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_FRACTION_BITS = {torch.float32: 23, torch.bfloat16: 7}
_BIAS = 127
# A tensor of the tune, and the base's if it has one of that shape.
Pairs = dict[str, tuple[Tensor, Tensor | None]]


def pairs_of(tuned: Path, base: Path) -> Pairs:
    """Names of a base may lack a prefix."""
    own, theirs = (load_file(folder / "model.safetensors") for folder in (tuned, base))
    found: Pairs = {}
    for name, tensor in own.items():
        other = theirs.get(name, theirs.get(name.partition(".")[2]))
        found[name] = tensor, other if other is not None and other.shape == tensor.shape else None
    return found


def patterns(tensor: Tensor) -> np.ndarray:
    """Of any dtype."""
    flat = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return flat.view(f"<u{tensor.dtype.itemsize}")


def predicted_bits(own: Tensor, base: Tensor | None) -> float:
    """By the mean size of moves alone, which rounding leaves as it is where they are less than a unit."""
    if base is None or own.dtype not in _FRACTION_BITS:
        return 8 * own.numel() * own.dtype.itemsize
    base = base.to(own.dtype)
    moved = float((own.double() - base.double()).abs().mean()) * math.sqrt(math.pi / 2)
    fraction_bits = _FRACTION_BITS[own.dtype]
    exponents = patterns(base) >> fraction_bits & 255
    counts = np.bincount(exponents.astype(np.int64), minlength=256)
    units = [2.0 ** (max(1, e) - _BIAS - fraction_bits) for e in range(256)]
    return sum(n * entropy(moved / unit) for n, unit in zip(counts.tolist(), units, strict=True) if n)


def entropy(ratio: float) -> float:
    """Bits of a Gaussian move, of so many units of a number that was rounded before and is rounded after."""
    if ratio > 50:
        return math.log2(ratio * math.sqrt(2 * math.pi * math.e))
    if ratio == 0:
        return 0.0
    moves = np.linspace(-8 * ratio, 8 * ratio, 2001)
    weights = np.exp(-0.5 * (moves / ratio) ** 2)
    units = np.arange(-math.ceil(8 * ratio) - 1, math.ceil(8 * ratio) + 2)[:, None]
    chances = (np.clip(1 - np.abs(moves - units), 0, None) * weights).sum(1) / weights.sum()
    chances = chances[chances > 0]
    return float(-(chances * np.log2(chances)).sum())


def strings(pairs: Pairs) -> Iterator[tuple[str, bytes]]:
    """What general compressors get."""
    dense = [own for own, _ in pairs.values()]
    yield "", b"".join(patterns(own).tobytes() for own in dense)
    xor = [
        patterns(own) ^ patterns(base.to(own.dtype)) if base is not None else patterns(own)
        for own, base in pairs.values()
    ]
    yield "xor", b"".join(each.tobytes() for each in xor)
    yield "xor, planes", b"".join(each.view(np.uint8).reshape(len(each), -1).T.tobytes() for each in xor)
    minus = [own - base.to(own.dtype) if base is not None else own for own, base in pairs.values()]
    yield "minus", b"".join(patterns(each).tobytes() for each in minus)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and seconds of the processor, whatever else runs on it."""
    started = time.process_time()
    return work(), time.process_time() - started


def peers(pairs: Pairs) -> Iterator[dict[str, Any]]:
    """Compressors of the standard library."""
    for what, raw in strings(pairs):
        for name, pack, unpack in (
            ("zlib 6", lambda raw=raw: zlib.compress(raw, 6), zlib.decompress),
            ("xz 1", lambda raw=raw: lzma.compress(raw, preset=1), lzma.decompress),
        ):
            packed, encode = timed(pack)
            _, decode = timed(lambda packed=packed, unpack=unpack: unpack(packed))
            yield {"method": f"{name} of {what or 'the tune'}", "bytes": len(packed)} | seconds(
                encode, decode
            )


def seconds(encode: float, decode: float) -> dict[str, float]:
    """Rounded."""
    return {"encode": round(encode, 2), "decode": round(decode, 2)}


def ours(tuned: Path, base: Path, out: Path) -> dict[str, Any]:
    """A whole file; every bit is compared."""
    given: dict[str, Any] = {"base": base, "exact": True, "overwrite": True, "progress": False}
    _, encode = timed(lambda: miracle_hub.compress(tuned, out, **given))
    found, decode = timed(lambda: miracle_hub.load_state_dict(out, base=base))
    dense = load_file(tuned / "model.safetensors")
    assert found.keys() == dense.keys()
    assert all((patterns(found[name]) == patterns(tensor)).all() for name, tensor in dense.items())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    n_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    n_bytes += len(json.dumps(config["base_model"], separators=(",", ":")))
    return {"method": "ours", "bytes": n_bytes} | seconds(encode, decode)


def measured(what: str, dtype: str, tuned: Path, base: Path) -> dict[str, Any]:
    """One fine-tune."""
    pairs = pairs_of(tuned, base)
    predicted = round(sum(predicted_bits(*pair) for pair in pairs.values()) / 8)
    n_weights = sum(own.numel() for own, _ in pairs.values())
    print(what, dtype, f"{n_weights:,} weights; predicted {predicted:,} bytes", flush=True)
    rows = []
    for row in chain([ours(tuned, base, tuned.with_name("out"))], peers(pairs)):
        rows.append(row | {"bits_per_weight": round(8 * row["bytes"] / n_weights, 3)})
        print(row, flush=True)
    dense = sum(own.numel() * own.dtype.itemsize for own, _ in pairs.values())
    facts = {"n_weights": n_weights, "dense_bytes": dense, "predicted_bytes": predicted}
    return {"what": what, "dtype": dtype, **facts, "rows": rows}


def save(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype, config: str) -> Path:
    """What `save_pretrained` leaves of them, in a dtype."""
    folder.mkdir(parents=True)
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(cast, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(config)
    return folder


def synthetic(work: Path) -> Iterator[dict[str, Any]]:
    """A matrix of Gaussian weights that Gaussian moves have moved."""
    generator = torch.Generator().manual_seed(0)
    base = _DEVIATION * torch.randn(_SIDE, _SIDE, generator=generator)
    for move in _MOVES:
        own = base + move * torch.randn(_SIDE, _SIDE, generator=generator)
        for name, dtype in _DTYPES.items():
            folders = [work / f"{move}-{name}-{which}" for which in ("tuned", "base")]
            for folder, tensor in zip(folders, (own, base), strict=True):
                save(folder, {"weight": tensor}, dtype, '{"model_type": "bert"}')
            yield measured(f"Gaussian, moved by {move / _DEVIATION:g} of its deviation", name, *folders)


def real(folder: Path, steps: int, work: Path) -> Iterator[dict[str, Any]]:
    """The fine-tune of benchmarks/deltas.py, as it is and cast to 16 bits."""
    from sst2 import source

    found = {"tuned": folder / "tuned", "base": Path(source())}
    for name, dtype in _DTYPES.items():
        folders = [
            save(
                work / f"{name}-{which}",
                load_file(path / "model.safetensors"),
                dtype,
                (path / "config.json").read_text(),
            )
            for which, path in found.items()
        ]
        yield measured(f"all-MiniLM-L6-v2, {steps} steps on SST-2", name, *folders)


def main() -> None:
    """Rows of other fine-tunes that were measured before stay."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path)
    p.add_argument("--steps", type=int, default=1200, help="that the tune in the folder took")
    a = p.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    work = Path(tempfile.mkdtemp(prefix="exact-deltas-"))
    path = RESULTS / "exact-deltas.json"
    try:
        rows = list(synthetic(work) if a.folder is None else real(a.folder, a.steps, work))
    finally:
        shutil.rmtree(work)
    before = json.loads(path.read_text())["results"] if path.exists() else []
    new = {(row["what"], row["dtype"]) for row in rows}
    record("exact-deltas", [*(row for row in before if (row["what"], row["dtype"]) not in new), *rows])


if __name__ == "__main__":
    main()
