"""Squared error of every rate and window on a unit Gaussian source, next to Shannon's bound.

The prior scale of each code is the best of a small grid around the one that the compressor uses.
"pieces" compares a search in pieces with one undivided search.
"""

import math
from typing import Any

import torch
from record import record

from miracle_hub.code import Code
from miracle_hub.codec.ladder import LADDER
from miracle_hub.coding import cpu, sliding
from miracle_hub.coding.encode import encode_stream
from miracle_hub.coding.posterior import squared_error_cost
from miracle_hub.coding.scales import prior_scale

# Enough that the standard error of the squared error is below 0.5 % of it.
_WEIGHTS = {8: 400_000, 10: 400_000, 12: 400_000, 14: 200_000, 16: 100_000}
_GRID = (0.95, 1.0, 1.05)


def gaussian(n_weights: int, seed: int) -> torch.Tensor:
    """Normal draws scaled to a mean square of exactly 1, so that errors need no correction."""
    draws = torch.randn(n_weights, generator=torch.Generator().manual_seed(seed))
    return draws / draws.square().mean().sqrt()


def squared_error(code: Code, source: torch.Tensor, scale: float) -> float:
    """Mean squared error of the decoded values."""
    message = encode_stream(squared_error_cost(source / scale), code)
    decoded = scale * cpu.decode_stream(message, code, source.numel())
    return float((decoded - source).square().mean())


def measure(code: Code, grid: tuple[float, ...] = _GRID) -> dict[str, Any]:
    """One row of the table."""
    source = gaussian(_WEIGHTS[code.window_bits], seed=2)
    scales = [prior_scale(code) * factor for factor in grid]
    error, scale = min((squared_error(code, source, scale), scale) for scale in scales)
    bound = 4.0**-code.rate
    row = {
        "window_bits": code.window_bits,
        "step_bits": code.step_bits,
        "step_weights": code.step_weights,
        "bits_per_weight": code.rate,
        "squared_error": round(error, 6),
        "bound": round(bound, 6),
        "gap_db": round(10 * math.log10(error / bound), 3),
        "scale": round(scale, 4),
    }
    print(row, flush=True)
    return row


def pieces(n_weights: int) -> dict[str, float]:
    """Squared error of the default pieces over that of one undivided search, L = 12, 2 bits."""
    code = Code(12, 2, 1)
    source = gaussian(n_weights, seed=3)
    joined = squared_error(code, source, 1.05)
    length, sliding._PIECE_STEPS = sliding._PIECE_STEPS, 1 << 30  # one piece
    memory, sliding._BACK_POINTER_BYTES = sliding._BACK_POINTER_BYTES, 1 << 40
    try:
        undivided = squared_error(code, source, 1.05)
    finally:
        sliding._PIECE_STEPS, sliding._BACK_POINTER_BYTES = length, memory
    return {"weights": n_weights, "joined": joined, "undivided": undivided, "ratio": joined / undivided}


def main() -> None:
    """Measure all tables and record them."""
    rows = [measure(Code(window, *rate)) for window in (8, 10, 12, 14, 16) for rate in LADDER if rate[0] <= 8]
    # The same seeded candidates as a block code: 16 bits choose 16 weights.
    rows.append(measure(Code(16, 16, 16), (0.95, 0.97, 1.0, 1.03)))
    # The ladder takes 1 bit as 2 bits for 2 weights, which is faster; one for one is a little better.
    rows += [measure(Code(window, 1, 1), (1.0, 1.02, 1.04, 1.06)) for window in (12, 16)]
    record("rate_distortion", {"codes": rows, "pieces": [pieces(8192), pieces(60_000)]})


if __name__ == "__main__":
    main()
