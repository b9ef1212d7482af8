"""Text written on a CPU by a model that stays compressed, beside the dense one: time per token and memory.

    python benchmarks/kept_on_cpu.py          SmolLM2 at 2 and 4 bits, batches of 1, 4 and 16

First come products of single matrices: straight from the message, by decoded bands, and dense. Where the
first two cross is where `coding/multiply.py` leaves products to bands.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from zoo_methods import peak_mb
from zoo_models import dense_folder

import miracle_hub
from miracle_hub import MiracleConfig
from miracle_hub.code import Code
from miracle_hub.codec.feedback import band_columns
from miracle_hub.codec.packed import PackedMatrix
from miracle_hub.codec.trellis import encode_tensor
from miracle_hub.coding import multiply
from miracle_hub.coding.rotation import widest_rotation
from miracle_hub.format.payload import Segment

_WINDOW_BITS = 12
_NEW, _GIVEN, _RUNS = 32, 16, 3
_SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
_PRODUCTS = 21
_ROWS_OF_X = (1, 2, 4, 8, 16, 32, 64)


def written(folder: Path, keep_compressed: bool, batch: int, dtype: str) -> dict[str, Any]:
    """Median milliseconds per step of greedy writing, and the most memory of the process."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = (
        {"quantization_config": MiracleConfig(keep_compressed=True)} if keep_compressed else {}
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    model = loaded.eval()
    ids = torch.randint(1000, 40_000, (batch, _GIVEN), generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.inference_mode():
        for _ in range(_RUNS + 1):  # the first one compiles
            begun = time.perf_counter()
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            model.generate(**given, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False)
            seconds.append(time.perf_counter() - begun)
    milliseconds = 1000 * statistics.median(seconds[1:]) / _NEW
    return {"milliseconds_per_step": round(milliseconds, 1), "peak_mb": peak_mb()}


def packed_matrix(bits: float, shape: tuple[int, int]) -> PackedMatrix:
    """Random weights, coded in bands of columns as calibration codes them."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    segments = [Segment(shape[0], Code(_WINDOW_BITS, round(bits), 1), row_scales=True)]
    rotation, band = widest_rotation(shape[1]), band_columns(shape[1])
    raw = encode_tensor(weights, segments, rotation, where="weights", band_columns=band)
    return PackedMatrix(torch.frombuffer(bytearray(raw), dtype=torch.uint8), "weights")


def products(bits: float) -> list[dict[str, Any]]:
    """Milliseconds of x·Wᵀ in float32 by shape and by rows of x."""
    rows = list[dict[str, Any]]()
    for shape in _SHAPES:
        packed = packed_matrix(bits, shape)
        dense = packed.dense()
        for n in _ROWS_OF_X:
            x = torch.randn(n, shape[1], generator=torch.Generator().manual_seed(1))
            row = {
                "message": _milliseconds(lambda x=x, packed=packed: packed.linear(x), most_rows=n),
                "bands": _milliseconds(lambda x=x, packed=packed: packed.linear(x), most_rows=0),
                "dense": _milliseconds(lambda x=x, dense=dense: x @ dense.T, most_rows=0),
            }
            rows.append({"bits": bits, "shape": list(shape), "rows_of_x": n, "milliseconds": row})
            print(rows[-1], flush=True)
    return rows


def _milliseconds(product: Callable[[], Tensor], most_rows: int) -> float:
    """Median, with so many rows of x that are multiplied straight from the message."""
    shipped, multiply._MOST_ROWS = multiply._MOST_ROWS, most_rows
    seconds = []
    for _ in range(_PRODUCTS + 2):  # the first two compile
        begun = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - begun)
    multiply._MOST_ROWS = shipped
    return round(1000 * statistics.median(seconds[2:]), 3)


def apart(*given: Any) -> dict[str, Any]:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(written, *given).result()


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0, 4.0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    a = parser.parse_args()
    crossing = [row for bits in a.bits for row in products(bits)]
    rows = list[dict[str, Any]]()
    for bits in a.bits:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "compressed"
            options: dict[str, Any] = {"calibrate": None, "window_bits": _WINDOW_BITS, "progress": False}
            report = miracle_hub.compress(dense_folder(a.model), folder, bits_per_weight=bits, **options)
            for dtype in a.dtype:
                for batch in a.batch:
                    dense, kept = (apart(folder, is_kept, batch, dtype) for is_kept in (False, True))
                    ratio = round(kept["milliseconds_per_step"] / dense["milliseconds_per_step"], 2)
                    row = {
                        "bits": bits,
                        "file_bytes": report.compressed_bytes,
                        "dtype": dtype,
                        "batch": batch,
                    }
                    rows.append({**row, "dense": dense, "kept": kept, "times": ratio})
                    print(rows[-1], flush=True)
    record.record(f"kept-on-cpu-{a.model}", {"products": crossing, "generate": rows})


if __name__ == "__main__":
    main()
