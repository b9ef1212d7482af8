"""Products straight from a message are those with the decoded weights, to the rounding of their sums."""

import threading

import pytest
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding import cpu, multiply
from miracle_hub.coding.matrix import CodedRows, MatrixLayout
from miracle_hub.coding.numba_backend import NumbaBackend

BACKEND = NumbaBackend()
CODES = [Code(14, 2, 1), Code(12, 3, 1, 7, 2), Code(8, 8, 1), Code(14, 5, 2), Code(10, 7, 4), Code(9, 4, 8)]
LAYOUTS = {
    "rows": MatrixLayout(192),
    "rotated": MatrixLayout(192, rotation=64),
    "bands": MatrixLayout(192, band_columns=16),
    "rotated bands": MatrixLayout(192, rotation=32, band_columns=16),
    "wide bands": MatrixLayout(768, band_columns=512),
}


def coded(code: Code, layout: MatrixLayout, rows: int = 37, has_row_scales: bool = True) -> CodedRows:
    generator = torch.Generator().manual_seed(rows)
    n_bytes = code.message_bytes(rows * layout.columns)
    message = torch.randint(256, (n_bytes,), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows if has_row_scales else 1, generator=generator) + 0.5
    return CodedRows(rows, code, scales.bfloat16(), message)


def inputs(batch: int, layout: MatrixLayout, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, layout.columns, generator=torch.Generator().manual_seed(batch)).to(dtype)


def expected(x: Tensor, part: CodedRows, layout: MatrixLayout) -> Tensor:
    weights, _ = BACKEND.decode_matrix([part], layout, torch.float32)
    return x.double() @ weights.double().T


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("has_row_scales", [True, False])
def test_products_are_those_with_the_decoded_weights(
    code: Code, layout: MatrixLayout, batch: int, has_row_scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiply, "_FEWEST_WEIGHTS", 1000)  # several threads
    part, x = coded(code, layout, has_row_scales=has_row_scales), inputs(batch, layout)
    found, wanted = BACKEND.multiply(x, part, layout), expected(x, part, layout)
    assert found is not None and found.dtype == torch.float32
    assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_added_up_in_float32(dtype: torch.dtype) -> None:
    layout = LAYOUTS["rotated"]
    part, x = coded(CODES[0], layout), inputs(4, layout, dtype)
    found, wanted = BACKEND.multiply(x, part, layout), expected(x, part, layout)
    assert found is not None and found.dtype == dtype
    assert (found.double() - wanted).norm() <= torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_so(value: float) -> None:
    layout = LAYOUTS["bands"]
    x = inputs(2, layout)
    x[0, 5] = value
    found = BACKEND.multiply(x, coded(CODES[0], layout), layout)
    assert found is not None and not found[0].isfinite().any() and found[1].isfinite().all()


def test_the_result_does_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiply, "_FEWEST_WEIGHTS", 1000)
    layout, found = LAYOUTS["rotated bands"], []
    part, x = coded(CODES[1], layout), inputs(2, layout)
    for n in (1, 2, 5):
        monkeypatch.setattr(cpu, "n_threads", lambda n=n: n)
        multiply._pool.cache_clear()
        found.append(BACKEND.multiply(x, part, layout))
    multiply._pool.cache_clear()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_several_callers_at_once_get_their_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiply, "_FEWEST_WEIGHTS", 1000)
    layout = LAYOUTS["rows"]
    part = coded(CODES[0], layout)
    found: dict[int, Tensor | None] = {}

    def work(batch: int) -> None:
        found[batch] = BACKEND.multiply(inputs(batch, layout), part, layout)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, product in found.items():
        wanted = expected(inputs(batch, layout), part, layout)
        assert product is not None and (product.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("code", "layout", "batch"),
    [
        (CODES[0], LAYOUTS["rows"], 33),
        (CODES[0], LAYOUTS["rows"], 0),
        (CODES[0], MatrixLayout(192, permuted=True), 1),
        (Code(9, 4, 5), LAYOUTS["rows"], 1),  # a step would lie in two rows
        (Code(9, 4, 5), MatrixLayout(200, band_columns=16), 1),
        (Code(20, 8, 4), LAYOUTS["rows"], 1),  # no table
    ],
)
def test_what_must_be_decoded_first_is_not_multiplied(code: Code, layout: MatrixLayout, batch: int) -> None:
    assert BACKEND.multiply(inputs(batch, layout), coded(code, layout), layout) is None


def test_double_precision_is_not_multiplied_in_single() -> None:
    layout = LAYOUTS["rows"]
    x = inputs(1, layout, torch.float64)
    assert BACKEND.multiply(x, coded(CODES[0], layout), layout) is None
