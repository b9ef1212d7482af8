"""The backend of the CPU: numba, parallel by threads over rows and pieces."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding import cpu
from miracle_hub.coding.matrix import CodedRows, MatrixLayout
from miracle_hub.coding.posterior import Cost

_TASK_WEIGHTS = 1 << 17
# One task per processor and band: with two per processor they wait for the threads of the matrix
# product, which spin (4096 × 4096 at 2 bits on 2 cores: 0.37 s instead of 0.05 s).
_MOST_TASKS = 8
# Below this a thread costs more than it saves.
_FEWEST_WEIGHTS = 1 << 16
_MULTIPLIED = (torch.float32, torch.bfloat16, torch.float16)


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
        from miracle_hub.coding.encode import encode_stream  # whoever decodes needs no encoder

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
        from miracle_hub.coding.encode import check_selection, encode_states

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
            digests.append(_decode_band(*task))

        cpu.in_threads(decode, tasks)
        return torch.from_numpy(out).to(dtype), sum(digests) % 2**64

    def decode_rows(self, out: Tensor, part: CodedRows, layout: MatrixLayout, first_row: int) -> None:
        """See `backend.Backend`."""
        target = out.numpy()
        step = len(target) if target.size < _FEWEST_WEIGHTS else -(-len(target) // _n_tasks())
        padded = cpu.pad_message(part.message.numpy()) if layout.is_banded else None
        tasks = [
            (part, layout, padded, first_row + row, target[row : row + step])
            for row in range(0, len(target), step)
        ]
        cpu.in_threads(_decode_rows, tasks)

    def multiply(self, x: Tensor, part: CodedRows, layout: MatrixLayout) -> Tensor | None:
        """See `backend.Backend`."""
        if x.device.type != "cpu" or x.dtype not in _MULTIPLIED:
            return None
        from miracle_hub.coding.multiply import multiply  # whoever decodes all weights needs no products

        return multiply(x, part, layout)


def _n_tasks() -> int:
    return min(cpu.n_threads(), _MOST_TASKS)


def _decode_rows(
    part: CodedRows, layout: MatrixLayout, padded: np.ndarray | None, row: int, out: np.ndarray
) -> None:
    """Rows `row`, `row` + 1, … from their part of the message, or from bands of the whole, padded one."""
    if padded is None:
        _decode_whole_rows(part, row, out)
    else:
        cpu.decode_banded(padded, part.code, part.rows, row, layout.band_columns, out)
    scales = part.scales if part.scales.numel() == 1 else part.scales[row : row + len(out)]
    out *= scales.float().numpy()[:, None]
    if layout.rotation > 1:
        cpu.hadamard_rows(out.reshape(-1), layout.rotation)


def _decode_whole_rows(part: CodedRows, row: int, out: np.ndarray) -> None:
    code, first, flat = part.code, row * out.shape[1], out.reshape(-1)
    # Eight steps are a whole number of bytes: what is copied and padded starts at one.
    step = first // code.step_weights // 8 * 8
    low, high = step * code.step_bits // 8, code.message_bytes(first + flat.size)
    padded = cpu.pad_message(part.message[low:high].numpy())
    cpu.decode_range(padded, code, first - step * code.step_weights, flat)


def _tasks(part: CodedRows, layout: MatrixLayout, out: np.ndarray, top: int) -> list[tuple]:
    """Arguments of `_decode_band`: a part, what to decode it from, and some of its rows."""
    padded, z = cpu.pad_message(part.message.numpy()), None
    if layout.permuted and (order := layout.order(part.rows, part.code)) is not None:
        n_weights = part.rows * layout.columns
        z = np.empty(n_weights, np.float32)
        z[order.numpy()] = cpu.decode_stream(part.message, part.code, n_weights)
    scales, step = part.scales.float().numpy(), max(1, _TASK_WEIGHTS // layout.columns)
    return [
        (layout, part, padded, z, scales, row, out[top + row : top + min(row + step, part.rows)], top)
        for row in range(0, part.rows, step)
    ]


def _decode_band(
    layout: MatrixLayout,
    part: CodedRows,
    padded: np.ndarray,
    z: np.ndarray | None,
    scales: np.ndarray,
    row: int,
    rows: np.ndarray,
    top: int,
) -> int:
    """Fill `rows`, those of a part from `row` on, and return their digest; `top` is the part's first row."""
    flat, first = rows.reshape(-1), row * rows.shape[1]
    if z is not None:
        flat[:] = z[first : first + flat.size]
    elif layout.is_banded:
        cpu.decode_banded(padded, part.code, part.rows, row, layout.band_columns, rows)
    else:
        cpu.decode_range(padded, part.code, first, flat)
    rows *= scales[row : row + len(rows), None] if scales.size > 1 else scales[0]
    if layout.rotation > 1:
        cpu.hadamard_rows(flat, layout.rotation)
    return int(cpu.digest_words(flat.view(np.uint32), top * rows.shape[1] + first))
