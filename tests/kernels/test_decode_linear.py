"""decode_linear: the product equals decoding and multiplying, and no weight is ever stored."""

from importlib import import_module
from typing import Any

import pytest
import torch
from streams import defined_weights, generator, random_message, random_scales, table_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miracle_hub.code import Code
from miracle_hub.coding.quantiles import quantiles
from miracle_kernels import KernelInputError, decode_linear
from miracle_kernels.decode_linear import decode_linear_torch, decode_linear_triton

Triple = tuple[int, int, int]
CODES = [(12, 2, 1), (12, 4, 2), (10, 8, 4), (9, 3, 1), (11, 5, 3)]


def arguments(
    code: Code, batch: int, rows: int, columns: int, device: torch.device, **changes: Any
) -> dict[str, Any]:
    chosen: dict[str, Any] = dict(
        x=torch.randn(batch, columns, generator=generator(batch)),
        message=random_message(code, rows * columns),
        table=table_of(code),
        scales=random_scales(rows),
        rows=rows,
        window_bits=code.window_bits,
        step_bits=code.step_bits,
        step_weights=code.step_weights,
        seed=code.seed,
        stream_id=code.stream_id,
        rotation=1,
        band_columns=0,
    )
    chosen |= changes
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in chosen.items()}


def exact(given: dict, code: Code) -> Tensor:
    """x·Wᵀ in float64, W by the definition of the format."""
    columns = given["x"].shape[1]
    scales = given["scales"].cpu().expand(given["rows"])
    weights = defined_weights(
        given["message"].cpu(), code, scales, given["rows"], columns, given["rotation"], given["band_columns"]
    )
    return given["x"].cpu().double() @ weights.double().T


def check(code: Code, batch: int, rows: int, columns: int, device: torch.device, **changes: Any) -> None:
    """Within the rounding that is promised, of the sum of the absolute terms of each output.

    The kernel's sums are float32 (2⁻²³ per addition, in blocks) and, for several rows, rotated inputs are
    rounded to float16 below the row's largest; then the output is rounded to its dtype.
    """
    given = arguments(code, batch, rows, columns, device, **changes)
    expected = exact(given, code)
    digits = {torch.float32: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[given["x"].dtype]
    for function in (decode_linear_triton, decode_linear_torch):
        found = function(**given).cpu()
        assert found.dtype == given["x"].dtype and found.shape == (batch, rows)
        error = (found.double() - expected).norm() / expected.norm()
        assert error <= digits, (function.__name__, float(error))


@pytest.mark.parametrize("batch", [1, 2, 16, 33, 64])
@pytest.mark.parametrize("code", CODES)
def test_the_product_equals_decoding_and_multiplying(device: torch.device, code: Triple, batch: int) -> None:
    check(Code(*code), batch, 33, 192, device, rotation=64)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 63), (63, 8), (3, 1311), (130, 16)])
@pytest.mark.parametrize("code", CODES[:2])
def test_odd_shapes(device: torch.device, code: Triple, rows: int, columns: int, batch: int) -> None:
    check(Code(*code), batch, rows, columns, device, scales=random_scales(rows).clamp(min=0.25))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_input(device: torch.device, dtype: torch.dtype, batch: int) -> None:
    x = torch.randn(batch, 256, generator=generator(0)).to(dtype)
    check(Code(12, 2, 1), batch, 40, 256, device, x=x, rotation=128, scales=torch.ones(1).bfloat16())


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    "changes", [dict(band_columns=16), dict(table=quantiles())], ids=["bands", "no table"]
)
def test_every_code_and_order_is_multiplied(
    device: torch.device, changes: dict[str, Any], batch: int
) -> None:
    check(Code(12, 2, 1), batch, 20, 63, device, **changes)
    if "table" in changes:
        check(Code(20, 20, 9, 7, 3), batch, 20, 63, device)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e4, 1e30])
def test_large_and_small_inputs_keep_their_digits(device: torch.device, magnitude: float, batch: int) -> None:
    x = magnitude * torch.randn(batch, 256, generator=generator(0))
    x[1:2] = 0
    check(Code(12, 2, 1), batch, 20, 256, device, x=x, rotation=128)


@pytest.mark.parametrize("code", [(12, 2, 1), (12, 4, 2), (12, 8, 4), (9, 3, 1)])
@pytest.mark.parametrize("rotation", [1, 64])
def test_one_row_keeps_all_digits(device: torch.device, code: Triple, rotation: int) -> None:
    """Of numbers of many magnitudes: x is cut into parts of 11 bits, and nothing of it is left over."""
    x = torch.randn(1, 1280, generator=generator(0)) * torch.randn(1, 1280, generator=generator(1)).exp2()
    given = arguments(Code(*code), 1, 21, 1280, device, x=x, rotation=rotation)
    expected = exact(given, Code(*code))
    error = (decode_linear_triton(**given).cpu().double() - expected).norm() / expected.norm()
    assert error <= 2.0**-18, float(error)


@pytest.mark.parametrize("batch", [1, 4])
def test_rows_wider_than_a_tile_are_summed_in_parts(
    device: torch.device, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = dict(TILE=512, TILE_GENERAL=512, TILE_ROWS=16, TILE_COLUMNS=64)
    small |= dict(
        TILE_ROTATION=128, num_warps=4, num_stages=1, programs_per_processor=1, largest_shared_bytes=1 << 14
    )
    module = import_module("miracle_kernels.decode_linear")
    monkeypatch.setattr(module, "tiles", lambda *args, **problem: small)
    check(Code(12, 2, 1), batch, 50, 1152, device, rotation=128)


def test_no_tensor_of_the_size_of_the_weights_exists(device: torch.device) -> None:
    class Largest(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor):
                    self.n = max(self.n, tensor.numel() * tensor.element_size())
            return out

    given = arguments(Code(12, 2, 1), 3, 512, 256, device)
    with Largest() as largest:
        decode_linear_triton(**given)
    assert 0 < largest.n <= max(16 * 256 * 2, given["message"].numel()) < 512 * 256


def test_the_op_is_a_sound_torch_op(device: torch.device) -> None:
    given = arguments(Code(8, 2, 1), 3, 20, 64, device, rotation=8)
    torch.library.opcheck(decode_linear, tuple(given.values()))
    compiled = torch.compile(lambda *all: decode_linear(*all) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given.values()), decode_linear(*given.values()) * 2)


BAD: list[tuple[dict[str, Any], str]] = [
    (dict(x=torch.zeros(3, 64).double()), "x: expected float32 or bfloat16 or float16, found torch.float64"),
    (dict(x=torch.zeros(64)), "x: expected 2 dimensions, found 1"),
    (dict(x=torch.zeros(64, 3).T), "x: expected a contiguous tensor"),
    (dict(x=torch.zeros(65, 64)), "batch .rows of x.: expected an integer from 1 to 64, found 65"),
    (dict(x=torch.zeros(0, 64)), "batch .rows of x.: expected an integer from 1 to 64, found 0"),
    (dict(x=torch.zeros(3, 0)), "columns of x: expected an integer from 1"),
    (dict(x=torch.zeros(3, 60)), "rotation: expected a power of two up to 32768 that divides 60 columns"),
    (dict(rows=21), "message: expected 338 bytes for 1344 weights, found 322"),
    (dict(rows=-1), "rows: expected an integer from 0"),
    (dict(message=torch.zeros(322)), "message: expected uint8"),
    (dict(table=torch.zeros(4096, 2).half()), r"table: expected candidates of shape \(4096, 1\)"),
    (dict(table=torch.zeros(4096, 1)), "table: expected float16"),
    (dict(scales=torch.ones(20)), "scales: expected bfloat16"),
    (dict(scales=torch.ones(19).bfloat16()), "scales: expected 20 entries, or 1, found 19"),
    (
        dict(scales=torch.ones(20, device="meta").bfloat16()),
        "scales: expected all tensors on cpu, found meta",
    ),
    (dict(window_bits=0), "window_bits: expected an integer from 1 to 24, found 0"),
    (dict(seed=-(2**63) - 1), "seed: expected an integer"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    given = arguments(Code(12, 2, 1), 3, 20, 64, torch.device("cpu"), rotation=8)
    for function in (decode_linear_triton, decode_linear_torch):
        with pytest.raises(KernelInputError, match=message):
            function(**(given | change))
