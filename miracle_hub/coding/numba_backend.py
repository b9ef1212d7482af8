"""The backend of the CPU: numba, parallel by threads over rows and pieces."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding import cpu
from miracle_hub.coding.encode import check_selection, encode_states, encode_stream
from miracle_hub.coding.matrix import CodedRows, MatrixLayout
from miracle_hub.coding.posterior import Cost

_TASK_WEIGHTS = 1 << 17
# One task per processor and band: with two per processor they wait for the threads of the matrix
# product, which spin (4096 × 4096 at 2 bits on 2 cores: 0.37 s instead of 0.05 s).
_MOST_TASKS = 8
# Below this a thread costs more than it saves.
_FEWEST_WEIGHTS = 1 << 16


class NumbaBackend:
    """See `backend.Backend`."""

    name = "cpu"
    device = torch.device("cpu")

    @property
    def band_weights(self) -> int:
        """See `backend.Backend`."""
        return _TASK_WEIGHTS * _n_tasks()

    def encode_stream(
        self, cost: Cost, code: Code, selection: str, generator: torch.Generator | None
    ) -> Tensor:
        """See `backend.Backend`."""
        return encode_stream(cost, code, selection, generator)

    def encode_states(
        self,
        cost: Cost,
        code: Code,
        selection: str,
        generator: torch.Generator | None,
        entry: int | None = None,
    ) -> Tensor:
        """See `backend.Backend`."""
        check_selection(selection, generator)
        there = cost.to(self.device)
        return torch.from_numpy(encode_states(there, code, selection, generator, entry))

    def candidates(self, states: Tensor, code: Code) -> Tensor:
        """See `backend.Backend`."""
        return torch.from_numpy(cpu.candidates(states.numpy(), code))

    def decode_stream(self, message: Tensor, code: Code, n_weights: int) -> Tensor:
        """See `backend.Backend`."""
        return cpu.decode_stream(message, code, n_weights)

    def hadamard(self, values: Tensor, width: int) -> Tensor:
        """See `backend.Backend`."""
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

    def decode_rows(self, out: Tensor, part: CodedRows, layout: MatrixLayout, first_row: int) -> None:
        """See `backend.Backend`."""
        target = out.numpy()
        step = len(target) if target.size < _FEWEST_WEIGHTS else -(-len(target) // _n_tasks())
        tasks = [
            (part, first_row + row, target[row : row + step], layout.rotation)
            for row in range(0, len(target), step)
        ]
        cpu.in_threads(_decode_rows, tasks)

    def multiply(self, x: Tensor, part: CodedRows, layout: MatrixLayout) -> None:
        """See `backend.Backend`."""
        return None


def _n_tasks() -> int:
    return min(cpu.n_threads(), _MOST_TASKS)


def _decode_rows(part: CodedRows, row: int, out: np.ndarray, rotation: int) -> None:
    """Rows `row`, `row` + 1, … from their part of the message."""
    code, first, flat = part.code, row * out.shape[1], out.reshape(-1)
    # Eight steps are a whole number of bytes: what is copied and padded starts at one.
    step = first // code.step_weights // 8 * 8
    low, high = step * code.step_bits // 8, code.message_bytes(first + flat.size)
    padded = cpu.pad_message(part.message[low:high].numpy())
    cpu.decode_range(padded, code, first - step * code.step_weights, flat)
    scales = part.scales if part.scales.numel() == 1 else part.scales[row : row + len(out)]
    out *= scales.float().numpy()[:, None]
    if rotation > 1:
        cpu.hadamard_rows(flat, rotation)


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
