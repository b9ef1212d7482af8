"""The backend of the CPU: numba, parallel by threads over rows and pieces."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miracle_hub.coding import cpu
from miracle_hub.coding.encode import encode_stream
from miracle_hub.coding.matrix import CodedRows, MatrixLayout
from miracle_hub.coding.posterior import Cost
from miracle_hub.config import Code

_TASK_WEIGHTS = 1 << 17


class NumbaBackend:
    """See `backend.Backend`."""

    name = "cpu"
    device = torch.device("cpu")

    def encode_stream(
        self, cost: Cost, code: Code, selection: str, generator: torch.Generator | None
    ) -> Tensor:
        return encode_stream(cost, code, selection, generator)

    def decode_stream(self, message: Tensor, code: Code, n_weights: int) -> Tensor:
        return cpu.decode_stream(message, code, n_weights)

    def hadamard(self, values: Tensor, width: int) -> Tensor:
        return cpu.hadamard(values, width)

    def decode_matrix(
        self, parts: Sequence[CodedRows], layout: MatrixLayout, dtype: torch.dtype
    ) -> tuple[Tensor, int]:
        """Decoded in parallel bands of rows."""
        out = np.empty((sum(part.rows for part in parts), layout.columns), np.float32)
        tasks, top = [], 0
        for part in parts:
            tasks += _tasks(part, layout, out, top)
            top += part.rows
        digests: list[int] = []

        def decode(*task: Any) -> None:
            digests.append(_decode_band(layout.rotation, *task))

        cpu.in_threads(decode, tasks)
        return torch.from_numpy(out).to(dtype), sum(digests) % 2**64


def _tasks(part: CodedRows, layout: MatrixLayout, out: np.ndarray, top: int) -> list[tuple]:
    """Arguments of `_decode_band`: a part, what to decode it from, and some of its rows."""
    padded, order = cpu.pad_message(part.message.numpy()), layout.order(part.rows, part.code)
    z = None
    if order is not None:
        n_weights = part.rows * layout.columns
        z = np.empty(n_weights, np.float32)
        z[order.numpy()] = cpu.decode_stream(part.message, part.code, n_weights)
    scales, step = part.scales.float().numpy(), max(1, _TASK_WEIGHTS // layout.columns)
    return [
        (part.code, padded, z, scales, row, out[top + row : top + min(row + step, part.rows)], top)
        for row in range(0, part.rows, step)
    ]


def _decode_band(
    rotation: int,
    code: Code,
    padded: np.ndarray,
    z: np.ndarray | None,
    scales: np.ndarray,
    row: int,
    rows: np.ndarray,
    top: int,
) -> int:
    """Fill `rows`, those of a part from `row` on, and return their digest; `top` is the part's first row."""
    flat, first = rows.reshape(-1), row * rows.shape[1]
    if z is None:
        cpu.decode_range(padded, code, first, flat)
    else:
        flat[:] = z[first : first + flat.size]
    rows *= scales[row : row + len(rows), None] if scales.size > 1 else scales[0]
    if rotation > 1:
        cpu.hadamard_rows(flat, rotation)
    return int(cpu.digest_words(flat.view(np.uint32), top * rows.shape[1] + first))
