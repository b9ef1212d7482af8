"""decode: the Triton kernel equals the format's definition, bit for bit, in one pass."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from streams import (
    changed,
    defined_weights,
    generator,
    random_message,
    random_scales,
    signed,
    signed_digest,
    table_of,
)
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding.digest import digest
from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import KernelInputError, decode
from miracle_kernels.decode import decode_torch, decode_triton
from miracle_kernels.windows import group_steps

Triple = tuple[int, int, int]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(code: Code, rows: int, columns: int, device: torch.device, **changes: Any) -> dict[str, Any]:
    """A random stream of a matrix, as `decode` takes it."""
    chosen: dict[str, Any] = dict(
        out=torch.empty(rows, columns),
        message=random_message(code, rows * columns),
        table=table_of(code),
        scales=random_scales(rows),
        mean=None,
        rows=rows,
        first_row=0,
        window_bits=code.window_bits,
        step_bits=code.step_bits,
        step_weights=code.step_weights,
        seed=signed(code.seed),
        stream_id=code.stream_id,
        rotation=1,
        band_columns=0,
        first_index=0,
        with_digest=True,
    )
    chosen |= changes
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in chosen.items()}


def check(
    code: Code, rows: int, columns: int, device: torch.device, rotation: int = 1, **changes: Any
) -> None:
    """Kernel and torch reference equal the definition in every dtype, and so do their digests."""
    for dtype in DTYPES:
        for function in (decode_triton, decode_torch):
            out = torch.empty(rows, columns, dtype=dtype)
            given = arguments(code, rows, columns, device, out=out, rotation=rotation, **changes)
            found_digest = function(**given)
            scales = given["scales"].cpu()
            expected = defined_weights(
                given["message"].cpu(), code, scales, rows, columns, rotation, given["band_columns"]
            )
            assert torch.equal(given["out"].cpu(), expected.to(dtype)), (function.__name__, dtype)
            assert int(found_digest) == signed_digest(expected)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 63), (3, 1311), (63, 8), (5, 384), (2, 4096)])
@pytest.mark.parametrize(
    "code", [(12, 2, 1), (12, 4, 2), (10, 8, 4), (9, 3, 1), (8, 5, 2), (7, 7, 3), (6, 1, 4)]
)
def test_weights_equal_the_definition(device: torch.device, rows: int, columns: int, code: Triple) -> None:
    check(Code(*code), rows, columns, device)


@pytest.mark.parametrize("rotation", [1, 128])
@pytest.mark.parametrize("code", [(12, 2, 1), (12, 4, 2), (10, 8, 4), (14, 2, 1)])
def test_without_a_digest_the_weights_are_the_same(device: torch.device, code: Triple, rotation: int) -> None:
    """Another kernel: it has registers left, and reads another table."""
    coded = Code(*code)
    for dtype in DTYPES:
        out = torch.empty(5, 384, dtype=dtype)
        given = arguments(coded, 5, 384, device, out=out, rotation=rotation, with_digest=False)
        assert int(decode_triton(**given)) == 0
        expected = defined_weights(given["message"].cpu(), coded, given["scales"].cpu(), 5, 384, rotation)
        assert torch.equal(given["out"].cpu(), expected.to(dtype)), dtype


@pytest.mark.parametrize(
    "code", [(8, 1, 1), (12, 2, 1), (12, 3, 1), (14, 4, 1), (16, 5, 2), (12, 7, 4), (16, 8, 1)]
)
def test_every_rate_of_the_ladder_decodes(device: torch.device, code: Triple) -> None:
    check(Code(*code), 5, 144, device)


@pytest.mark.parametrize("code", [(17, 2, 1), (20, 20, 8), (24, 24, 9), (24, 3, 2), (18, 18, 256)])
def test_long_windows_go_without_a_table(device: torch.device, code: Triple) -> None:
    check(Code(*code, seed=2**63 + 5, stream_id=2**31 + 1), 7, 61, device)


@pytest.mark.parametrize("rotation", [2, 4, 8, 32, 128, 256])
@pytest.mark.parametrize("code", [(8, 2, 1), (10, 5, 3)])
def test_rotation_is_a_fixed_order_of_float32_sums(device: torch.device, rotation: int, code: Triple) -> None:
    check(Code(*code), 3, 3 * 256, device, rotation)


def test_the_widest_rotation_of_the_format_decodes(device: torch.device) -> None:
    check(Code(8, 2, 1), 2, 1 << 15, device, 1 << 15)


@pytest.mark.parametrize("band_columns", [1, 16, 17, 40, 63])
def test_bands_are_read_band_by_band(device: torch.device, band_columns: int) -> None:
    check(Code(10, 2, 1), 9, 63, device, band_columns=band_columns)


@pytest.mark.parametrize(("code", "shape", "band"), [((12, 3, 1), (1, 17), 1), ((12, 3, 2), (3, 5), 2)])
def test_bands_of_small_matrices_read_nothing_outside(
    device: torch.device, code: Triple, shape: tuple[int, int], band: int
) -> None:
    check(Code(*code), *shape, device, band_columns=band)


def test_one_scale_serves_a_whole_tensor(device: torch.device) -> None:
    check(Code(10, 2, 1), 9, 64, device, 32, scales=torch.tensor([0.375]).bfloat16())


def test_the_mean_is_added_after_the_rotation(device: torch.device) -> None:
    code, mean = Code(10, 2, 1), torch.randn(9, 64, generator=generator(1))
    for function in (decode_triton, decode_torch):
        given = arguments(code, 9, 64, device, rotation=16, mean=mean)
        found = function(**given)
        expected = defined_weights(given["message"].cpu(), code, given["scales"].cpu(), 9, 64, 16) + mean
        assert torch.equal(given["out"].cpu(), expected)
        assert int(found) == signed_digest(expected)


@pytest.mark.parametrize("code", [(10, 2, 1), (10, 3, 1), (18, 18, 5)])
@pytest.mark.parametrize("band_columns", [0, 16])
def test_rows_decode_alone(device: torch.device, code: Triple, band_columns: int) -> None:
    """Any rows of a stream, with the digest of the whole as the sum of its parts."""
    coded = Code(*code)
    whole = arguments(coded, 11, 64, device, band_columns=band_columns)
    total = int(decode_triton(**whole))
    for function in (decode_triton, decode_torch):
        digests = 0
        for first, stop in ((0, 4), (4, 5), (5, 11)):
            part = torch.empty(stop - first, 64, device=device)
            digests += int(function(**changed(whole, out=part, first_row=first)))
            assert torch.equal(part, whole["out"][first:stop])
        assert signed(digests % 2**64) == total


def test_the_digest_counts_from_the_first_index(device: torch.device) -> None:
    code = Code(8, 2, 1)
    given = arguments(code, 4, 32, device)
    decode_triton(**given)
    before = torch.zeros(1000)
    whole = digest(torch.cat((before, given["out"].cpu().view(-1)))) - digest(before)
    for function in (decode_triton, decode_torch):
        assert int(function(**changed(given, first_index=1000))) == signed(whole % 2**64)


def test_tensors_may_be_views_with_odd_offsets(device: torch.device) -> None:
    code = Code(12, 2, 1)
    given = arguments(code, 6, 64, device)
    decode_triton(**given)
    message = torch.zeros(given["message"].numel() + 7, dtype=torch.uint8, device=device)
    message[3:-4] = given["message"]
    out = torch.zeros(1 + 6 * 64 + 1, device=device)
    scales = torch.cat((given["scales"][:1], given["scales"]))[1:]
    moved = changed(given, message=message[3:-4], out=out[1:-1].view(6, 64), scales=scales)
    decode_triton(**moved)
    assert torch.equal(moved["out"], given["out"])
    assert out[0] == 0 == out[-1]


def test_positions_past_two_to_the_31_are_right(device: torch.device) -> None:
    """The last rows of a stream of 3 · 2³⁰ weights; its message is mostly zeros, so memory is sparse."""
    code, columns = Code(12, 2, 1), 4096
    rows = 3 * 2**30 // columns
    message = torch.zeros(code.message_bytes(rows * columns), dtype=torch.uint8, device=device)
    tail = random_message(code, 4 * columns)
    message[-tail.numel() :] = tail.to(device)
    changes: dict[str, Any] = dict(message=message, scales=torch.ones(1, device=device).bfloat16(), rows=rows)
    changes |= dict(first_row=rows - 2, out=torch.empty(2, columns, device=device))
    given = arguments(code, 2, columns, device) | changes
    found = decode_triton(**given)
    # The message's bits past its last step are the same in both: 2 · columns steps before the end.
    last = defined_weights(tail, code, torch.ones(4).bfloat16(), 4, columns, 1)[-2:]
    assert torch.equal(given["out"].cpu(), last)
    other = changed(given, out=torch.empty(2, columns, device=device))
    assert int(decode_torch(**other)) == int(found)
    assert torch.equal(other["out"], given["out"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs all programs")
def test_bits_past_two_to_the_31_of_one_row_are_right(
    monkeypatch: pytest.MonkeyPatch, run_alone: Callable[[int, int], None]
) -> None:
    """The last tile of a row of 2³⁰ weights at 4 bits, run alone; memory is sparse."""
    code, columns, tile = Code(12, 4, 1), 2**30, 8192
    n_tiles, module = columns // tile, import_module("miracle_kernels.decode")
    monkeypatch.setattr(module, "resident_programs", lambda *_: 1)
    run_alone(n_tiles - 1, n_tiles)
    message = torch.zeros(code.message_bytes(columns), dtype=torch.uint8)
    tail = random_message(code, tile)
    message[-tail.numel() :] = tail
    out, one = torch.zeros(1, columns, dtype=torch.float16), torch.ones(1).bfloat16()
    given = arguments(code, 1, tile, torch.device("cpu"))
    decode_triton(**changed(given, out=out, message=message, scales=one, with_digest=False))
    expected = defined_weights(tail, code, one, 1, tile, 1).half()
    assert torch.equal(out[:, -tile + 2 :], expected[:, 2:])  # two windows reach into what is before the tail
    assert not out[0, -2 * tile : -tile].any()


def test_the_op_is_a_sound_torch_op(device: torch.device) -> None:
    given = arguments(Code(8, 2, 1), 4, 64, device, rotation=8)
    torch.library.opcheck(decode, tuple(given.values()))


def test_the_op_compiles_without_a_graph_break(device: torch.device) -> None:
    given = arguments(Code(8, 2, 1), 4, 64, device)
    rest = list(given.values())[1:]

    def double(*rest) -> Tensor:
        out = torch.empty(4, 64, device=device)
        decode(out, *rest)
        return out * 2

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*rest), double(*rest))


@pytest.mark.parametrize(
    ("code", "columns", "steps"),
    [((12, 2, 1), 384, 8), ((12, 2, 1), 4, 4), ((12, 2, 1), 63, 1), ((16, 8, 1), 64, 2), ((12, 4, 2), 6, 1)],
)
def test_a_row_is_a_whole_number_of_groups(code: Triple, columns: int, steps: int) -> None:
    assert group_steps(*code, columns) == steps


BAD: list[tuple[dict[str, Any], str]] = [
    (dict(out=torch.zeros(4, 64).long()), "out: expected float32 or bfloat16 or float16, found torch.int64"),
    (dict(out=torch.zeros(64, 4).T), "out: expected a contiguous tensor"),
    (dict(out=torch.zeros(256)), "out: expected 2 dimensions, found 1"),
    (dict(out=torch.zeros(4, 0)), "columns of out: expected an integer from 1"),
    (dict(out=torch.zeros(5, 64)), "first_row: expected an integer from 0 to -1, found 0"),
    (dict(message=torch.zeros(9, dtype=torch.uint8)), "message: expected 66 bytes for 256 weights, found 9"),
    (dict(message=torch.zeros(65)), "message: expected uint8"),
    (dict(message=torch.zeros(65, dtype=torch.uint8, device="meta")), "all tensors on cpu, found meta"),
    (dict(table=torch.zeros(256, 2).half()), r"candidates of shape \(4096, 1\) or quantiles of shape"),
    (dict(table=quantiles().float()), "table: expected float16"),
    (dict(scales=torch.ones(4)), "scales: expected bfloat16"),
    (dict(scales=torch.ones(3).bfloat16()), "scales: expected 4 entries, or 1, found 3"),
    (dict(mean=torch.zeros(4, 64).half()), "mean: expected float32"),
    (dict(mean=torch.zeros(4, 63)), "mean: expected 256 entries, found 252"),
    (dict(first_row=1), "first_row: expected an integer from 0 to 0, found 1"),
    (dict(window_bits=25), "window_bits: expected an integer from 1 to 24, found 25"),
    (dict(step_bits=13), "step_bits: expected an integer from 1 to 12, found 13"),
    (dict(step_weights=257), "step_weights: expected an integer from 1 to 256, found 257"),
    (dict(seed=2**63), "seed: expected an integer"),
    (dict(stream_id=2**32), "stream_id: expected an integer from 0 to 4294967295"),
    (dict(rotation=3), "rotation: expected a power of two up to 32768 that divides 64 columns, found 3"),
    (dict(rotation=128), "that divides 64 columns, found 128"),
    (dict(rotation=0), "that divides 64 columns, found 0"),
    (dict(band_columns=-1), "band_columns: expected an integer from 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    given = arguments(Code(12, 2, 1), 4, 64, torch.device("cpu"))
    for function in (decode_triton, decode_torch):
        with pytest.raises(KernelInputError, match=message):
            function(**(given | change))
