"""Pieces of bands: what matrices cost with feedback, and how long it takes, by margins and by pieces.

    python benchmarks/bands.py          matrices of the zoo's language models: a few minutes

Each matrix is coded in bands of columns on one thread, with moments of columns that are correlated with
their neighbors; costs are beside those of the same matrix with margins of 16 windows. Without feedback it is
one stream.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from record import record
from safetensors import safe_open
from torch import Tensor
from zoo_models import dense_folder

from miracle_hub.code import Code
from miracle_hub.codec.feedback import BandCoder
from miracle_hub.coding import cpu, sliding
from miracle_hub.coding.backend import choose
from miracle_hub.format.payload import Segment

_LAYER = "model.layers.10"
_MATRICES = {
    "smollm2": (f"{_LAYER}.self_attn.k_proj", f"{_LAYER}.self_attn.q_proj", f"{_LAYER}.mlp.up_proj"),
    "stories260k": ("model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj"),
    "minilm": ("encoder.layer.3.attention.self.query", "encoder.layer.3.output.dense"),
}
_RATES = ((1, 2), (2, 1), (5, 2), (3, 1), (4, 1))
_WINDOWS = (16, 8, 6, 4)
_WINDOW_BITS = 14


@dataclass(frozen=True)
class Result:
    """Of one matrix at one rate."""

    seconds: float
    cost: float


def upper_factor(columns: int) -> Tensor:
    """U, with U·Uᵀ the moments of columns that are correlated with their neighbors."""
    inputs = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(0))
    inputs[:, 1:] += 0.7 * inputs[:, :-1].clone()
    moments = (inputs.T @ inputs / len(inputs)).double()
    return torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1)


def coded(matrix: Tensor, code: Code, factor: Tensor, has_feedback: bool) -> Result:
    """With feedback in bands; without, in a band of all columns."""
    coder = BandCoder(
        matrix,
        [Segment(len(matrix), code, True)],
        factor if has_feedback else None,
        choose("cpu"),
    )
    if not has_feedback:
        coder.width = matrix.shape[1]
    found, begun = matrix.clone(), time.perf_counter()
    coder.code(found, 0, matrix.shape[1])
    seconds = time.perf_counter() - begun
    error, whole = (found - matrix).double() @ factor, matrix.double() @ factor
    return Result(seconds, float(error.square().sum() / whole.square().sum()))


def rows_of(model: str, name: str) -> list[dict[str, Any]]:
    """Of one matrix at all rates."""
    with safe_open(dense_folder(model) / "model.safetensors", "pt") as file:
        matrix = file.get_tensor(f"{name}.weight").float()
    factor, rows = upper_factor(matrix.shape[1]), []
    for step_bits, weights in _RATES:
        code, found = Code(_WINDOW_BITS, step_bits, weights), dict[int, Result]()
        coded(matrix[:, :32], code, factor[:32, :32], True)  # compiles
        plain = coded(matrix, code, factor, False)
        for windows in _WINDOWS:
            sliding._BAND_MERGE_WINDOWS = windows
            found[windows] = coded(matrix, code, factor, True)
        first = found[_WINDOWS[0]]
        row = {"model": model, "matrix": name, "shape": list(matrix.shape), "rate": step_bits / weights}
        row["windows"] = {
            str(windows): {
                "cost_ratio": round(each.cost / first.cost, 4),
                "time_ratio_to_one_stream": round(each.seconds / plain.seconds, 2),
            }
            for windows, each in found.items()
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measure and record."""
    torch.set_num_threads(1)
    cpu.n_threads = lambda: 1
    sliding._WHOLE_BAND_STEPS = 0  # what it would cost to cut all
    rows = [row for model, names in _MATRICES.items() for name in names for row in rows_of(model, name)]
    record("bands", {"window_bits": _WINDOW_BITS, "rows": rows})


if __name__ == "__main__":
    main()
