"""The backend of GPUs: the kernels of miracle_kernels. On a CPU, Triton's interpreter runs them for tests."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding.encode import check_selection, encode_states, pack_states
from miracle_hub.coding.matrix import CodedRows, MatrixLayout
from miracle_hub.coding.posterior import Cost
from miracle_hub.coding.quantiles import quantiles_on
from miracle_hub.coding.rotation import hadamard
from miracle_hub.errors import BackendError, TruncatedPayloadError
from miracle_kernels.checks import MAX_COLUMNS
from miracle_kernels.codebook import codebook_triton
from miracle_kernels.decode import decode_triton
from miracle_kernels.decode_linear import MAX_BATCH, decode_linear_triton
from miracle_kernels.digest import digest_torch
from miracle_kernels.select import MAX_STEP_WEIGHTS, select_triton
from miracle_kernels.slide import MAX_WINDOW_BITS, slide_triton

# Longer windows have no table: candidates are generated where they are used.
_LARGEST_TABLE_BITS = 16
# Bounds the coefficients of blocks in memory: 28 bytes per weight, 235 MB.
_WEIGHTS_AT_ONCE = 1 << 23
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonBackend:
    """See `backend.Backend`."""

    name = "triton"
    band_weights = 1 << 24  # 64 MiB of float32: a few milliseconds of decoding and far more than a launch

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def encode_stream(
        self, cost: Cost, code: Code, selection: str, generator: torch.Generator | None
    ) -> Tensor:
        """
        Raises:
            OptionError: an unknown selection, or "sample" without a generator.
            BackendError: a code that the kernels do not encode.
        """
        check_selection(selection, generator)
        if cost.linear.numel() == 0:
            return torch.zeros(0, dtype=torch.uint8, device=self.device)
        seed = int(torch.randint(2**62, (), generator=generator)) if generator else 0
        encode = self._slide if code.overlap_bits else self._select
        return encode(cost, code, selection, seed)

    def encode_states(
        self,
        cost: Cost,
        code: Code,
        selection: str,
        generator: torch.Generator | None,
        entry: int | None = None,
    ) -> Tensor:
        """See `backend.Backend`. On the CPU, for there is no kernel that serves posteriors as fits have them.

        That of overlapping windows cannot begin with given bits, as the next steps of a message must. That of
        blocks compares importance weights in float16 products, too coarse for a posterior that is nearly a
        point.
        """
        check_selection(selection, generator)
        there = cost.to(torch.device("cpu"))
        return torch.from_numpy(encode_states(there, code, selection, generator, entry))

    def candidates(self, states: Tensor, code: Code) -> Tensor:
        """See `backend.Backend`."""
        there = states.to(self.device, torch.int32)
        stream = (code.step_weights, _signed(code.seed), code.stream_id)
        return codebook_triton(there, quantiles_on(self.device), *stream).float()

    def _slide(self, cost: Cost, code: Code, selection: str, seed: int) -> Tensor:
        if code.window_bits > MAX_WINDOW_BITS:
            raise BackendError(
                f"code: the GPU encodes overlapping windows of up to {MAX_WINDOW_BITS} bits, found "
                f"{code.window_bits}; use backend='cpu'"
            )
        # One entry stands for equal quadratic terms, which `expand` makes of one entry too.
        quadratic = cost.quadratic[:1] if cost.quadratic.stride() == (0,) else cost.quadratic
        table, bits = candidate_table(code, self.device), (code.window_bits, code.step_bits)
        return slide_triton(
            quadratic.contiguous(), cost.linear.contiguous(), table, *bits, code.step_weights, selection, seed
        )[0]

    def _select(self, cost: Cost, code: Code, selection: str, seed: int) -> Tensor:
        if code.step_weights > MAX_STEP_WEIGHTS:
            raise BackendError(
                f"code: the GPU encodes blocks of up to {MAX_STEP_WEIGHTS} weights, found "
                f"{code.step_weights}; use backend='cpu'"
            )
        stream = (quantiles_on(self.device), code.window_bits, _signed(code.seed), code.stream_id, selection)
        step = _WEIGHTS_AT_ONCE // code.step_weights * code.step_weights
        n_weights, indices = cost.linear.numel(), []
        for start in range(0, n_weights, step):
            part = slice(start, min(start + step, n_weights))
            blocks = [_blocks(values[part], code.step_weights) for values in (cost.quadratic, cost.linear)]
            indices.append(select_triton(*blocks, *stream, seed + len(indices))[0].cpu())
        return pack_states(torch.cat(indices).numpy(), code).to(self.device)

    def decode_stream(self, message: Tensor, code: Code, n_weights: int) -> Tensor:
        """See `backend.Backend`."""
        if message.numel() < code.message_bytes(n_weights):
            raise TruncatedPayloadError(
                f"message: {n_weights} weights need {code.message_bytes(n_weights)} bytes, found "
                f"{message.numel()}; pass the whole message"
            )
        # A stream is one row, unless that is longer than a row may be.
        columns = n_weights if n_weights <= MAX_COLUMNS else math.gcd(n_weights, 2**20)
        out = torch.empty(n_weights // max(columns, 1), max(columns, 1), device=self.device)
        one = torch.ones(1, dtype=torch.bfloat16, device=self.device)
        part = CodedRows(out.shape[0], code, one, message[: code.message_bytes(n_weights)])
        self._decode(out, part, MatrixLayout(out.shape[1]), 0)
        return out.view(-1)

    def hadamard(self, values: Tensor, width: int) -> Tensor:
        """See `backend.Backend`."""
        return hadamard(values, width)

    def decode_matrix(
        self, parts: Sequence[CodedRows], layout: MatrixLayout, dtype: torch.dtype
    ) -> tuple[Tensor, int]:
        """One kernel per part; permuted streams take a detour."""
        kernel_dtype = dtype if dtype in _KERNEL_DTYPES else torch.float32
        shape = (sum(part.rows for part in parts), layout.columns)
        out = torch.empty(shape, dtype=kernel_dtype, device=self.device)
        digest = torch.zeros((), dtype=torch.int64, device=self.device)
        top = 0
        for part in parts:
            decode = self._decode_permuted if layout.permuted else self._decode
            digest += decode(out[top : top + part.rows], part, layout, top * layout.columns)
            top += part.rows
        return out.to(dtype), int(digest) % 2**64

    def _decode(self, out: Tensor, part: CodedRows, layout: MatrixLayout, first_index: int) -> Tensor:
        """Fill `out` and return the digest, int64 `[]`."""
        scales, message, *numbers = self._coded(part, layout)
        coded = (message, candidate_table(part.code, self.device), scales, None, part.rows, 0, *numbers)
        return decode_triton(out, *coded, first_index, True)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def _decode_permuted(
        self, out: Tensor, part: CodedRows, layout: MatrixLayout, first_index: int
    ) -> Tensor:
        """Where weights are scattered over the matrix, scale and rotation follow as torch operations."""
        order = layout.order(part.rows, part.code)
        assert order is not None
        z = self.decode_stream(part.message.to(self.device), part.code, out.numel())
        z = torch.empty_like(z).index_copy_(0, order.to(self.device), z)
        weights = hadamard(z.view(out.shape) * part.scales.to(self.device).float()[:, None], layout.rotation)
        out.copy_(weights)
        return digest_torch(weights, first_index)

    def decode_rows(self, out: Tensor, part: CodedRows, layout: MatrixLayout, first_row: int) -> None:
        """See `backend.Backend`."""
        scales, message, *numbers = self._coded(part, layout)
        coded = (message, candidate_table(part.code, self.device), scales, None, part.rows, first_row)
        decode_triton(out, *coded, *numbers, 0, False)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def multiply(self, x: Tensor, part: CodedRows, layout: MatrixLayout) -> Tensor | None:
        """See `backend.Backend`."""
        # Several rows are rounded to 11 bits on the way to tensor cores, which is too few for float32.
        largest = 1 if x.dtype == torch.float32 else MAX_BATCH
        if layout.permuted or x.dtype not in _KERNEL_DTYPES or not 1 <= x.shape[0] <= largest:
            return None
        scales, message, *numbers = self._coded(part, layout)
        table = candidate_table(part.code, self.device)
        return decode_linear_triton(x.contiguous(), message, table, scales, part.rows, *numbers)

    def _coded(
        self, part: CodedRows, layout: MatrixLayout
    ) -> tuple[Tensor, Tensor, int, int, int, int, int, int, int]:
        """Scales, message and code, as the kernels take them."""
        code, scales, message = part.code, part.scales.to(self.device), part.message.to(self.device)
        bits, stream = (
            (code.window_bits, code.step_bits, code.step_weights),
            (_signed(code.seed), code.stream_id),
        )
        return (scales, message, *bits, *stream, layout.rotation, layout.band_columns)


def candidate_table(code: Code, device: torch.device) -> Tensor:
    """What `decode` looks candidates up in: float16 [2^L, V], or the quantiles for longer windows."""
    if code.window_bits > _LARGEST_TABLE_BITS:
        return quantiles_on(device)
    return _table(code.window_bits, code.step_weights, code.seed, code.stream_id, device)


@lru_cache(32)
def _table(window_bits: int, step_weights: int, seed: int, stream_id: int, device: torch.device) -> Tensor:
    states = torch.arange(1 << window_bits, dtype=torch.int32, device=device)
    table = codebook_triton(states, quantiles_on(device), step_weights, _signed(seed), stream_id)
    if table.is_cuda:
        # Whoever finds the table in the cache may be on another stream.
        torch.cuda.current_stream(device).synchronize()
    return table


def _blocks(values: Tensor, width: int) -> Tensor:
    """[n] → [blocks, width]; the missing weights of the last block cost nothing."""
    return torch.nn.functional.pad(values, (0, -values.numel() % width)).view(-1, width).contiguous()


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the signed number that torch ops take."""
    return word - 2**64 if word >= 2**63 else word
