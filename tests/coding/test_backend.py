"""Both backends give the same weights; the choice between them is explicit or said once."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import miracle_kernels
from miracle_hub.code import Code
from miracle_hub.coding import backend as backends
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.coding.matrix import CodedRows, MatrixLayout
from miracle_hub.coding.posterior import Cost, squared_error_cost
from miracle_hub.errors import BackendError, OptionError, TruncatedPayloadError


@pytest.fixture(scope="module")
def triton() -> Backend:
    """On the GPU, or in Triton's interpreter."""
    return choose("triton")


@pytest.fixture(autouse=True)
def nothing_said_before() -> Iterator[None]:
    backends._say.cache_clear()
    yield
    backends._say.cache_clear()


def random_part(code: Code, rows: int, columns: int, row_scales: bool, seed: int) -> CodedRows:
    generator = torch.Generator().manual_seed(seed)
    message = torch.randint(256, (code.message_bytes(rows * columns),), generator=generator).to(torch.uint8)
    scales = torch.rand(rows if row_scales else 1, generator=generator).bfloat16()
    return CodedRows(rows, code, scales, message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "layout",
    [
        MatrixLayout(64),
        MatrixLayout(64, rotation=16),
        MatrixLayout(63, band_columns=16),
        MatrixLayout(64, rotation=8, permuted=True),
        MatrixLayout(64, rotation=8, band_columns=24, permuted=True),
    ],
    ids=str,
)
def test_both_backends_decode_the_same_bits(
    triton: Backend, layout: MatrixLayout, dtype: torch.dtype
) -> None:
    codes = (Code(12, 2, 1), Code(10, 3, 2, seed=2**64 - 1), Code(18, 18, 9, 5, 2**32 - 1), Code(9, 9, 4))
    parts = [random_part(code, 3 + i, layout.columns, i != 1, i) for i, code in enumerate(codes)]
    expected, digest = choose("cpu").decode_matrix(parts, layout, dtype)
    found, found_digest = triton.decode_matrix(parts, layout, dtype)
    assert found.dtype == dtype and torch.equal(found.cpu(), expected)
    assert found_digest == digest


@pytest.mark.parametrize("code", [(12, 2, 1), (10, 3, 2), (16, 16, 8), (20, 20, 5)])
@pytest.mark.parametrize("n", [0, 1, 63, 1311])
def test_both_backends_decode_the_same_stream(triton: Backend, code: tuple, n: int) -> None:
    coded = Code(*code)
    message = torch.arange(coded.message_bytes(n)).to(torch.uint8)
    found = triton.decode_stream(message.to(triton.device), coded, n)
    assert torch.equal(found.cpu(), choose("cpu").decode_stream(message, coded, n))
    if n:
        with pytest.raises(TruncatedPayloadError, match=f"message: {n} weights need"):
            triton.decode_stream(message[:-1].to(triton.device), coded, n)


def distortion(backend: Backend, code: Code, source: Tensor, selection: str) -> float:
    generator = torch.Generator().manual_seed(0) if selection == "sample" else None
    message = backend.encode_stream(squared_error_cost(source.to(backend.device)), code, selection, generator)
    assert message.shape == (code.message_bytes(source.numel()),) and message.dtype == torch.uint8
    z = backend.decode_stream(message, code, source.numel())
    return float((z.cpu() - source).square().mean())


@pytest.mark.parametrize("code", [(8, 2, 1), (8, 4, 2), (8, 8, 4), (7, 7, 3)])
@pytest.mark.parametrize("selection", ["best", "sample"])
def test_both_backends_find_messages_of_the_same_error(triton: Backend, code: tuple, selection: str) -> None:
    """The search is exact for both; 1 % covers the cut into pieces, 15 % two draws of 255 weights each."""
    source = torch.randn(255, generator=torch.Generator().manual_seed(1))
    errors = [distortion(backend, Code(*code), source, selection) for backend in (choose("cpu"), triton)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01 if selection == "best" else 0.3)


def test_costs_per_weight_reach_the_kernels(triton: Backend) -> None:
    generator = torch.Generator().manual_seed(3)
    cost = Cost(torch.rand(99, generator=generator) + 0.5, torch.randn(99, generator=generator))
    for code in (Code(8, 2, 1), Code(8, 8, 4)):
        log_weights = []
        for backend in (choose("cpu"), triton):
            there = Cost(cost.quadratic.to(backend.device), cost.linear.to(backend.device))
            message = backend.encode_stream(there, code, "best", None)
            z = backend.decode_stream(message, code, 99).cpu()
            log_weights.append(float(cost.log_importance_weights(z)))
        assert log_weights[1] == pytest.approx(log_weights[0], abs=1e-4)


def test_slices_of_blocks_are_drawn_independently(triton: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal blocks in different slices must not get equal draws."""
    from miracle_hub.coding import triton_backend

    monkeypatch.setattr(triton_backend, "_WEIGHTS_AT_ONCE", 33)
    code, cost = Code(10, 10, 2), squared_error_cost(torch.zeros(256, device=triton.device))
    message = triton.encode_stream(cost, code, "sample", torch.Generator().manual_seed(0))
    z = triton.decode_stream(message, code, 256).view(8, 32)
    assert message.numel() == code.message_bytes(256)
    assert len({tuple(row.tolist()) for row in z}) == 8
    best = triton.encode_stream(cost, code, "best", None)
    monkeypatch.undo()
    assert torch.equal(triton.encode_stream(cost, code, "best", None), best)


def test_an_empty_stream_is_an_empty_message(triton: Backend) -> None:
    message = triton.encode_stream(squared_error_cost(torch.zeros(0)), Code(8, 2, 1), "best", None)
    assert message.numel() == 0


def test_what_the_kernels_cannot_encode_is_said(triton: Backend) -> None:
    cost = squared_error_cost(torch.zeros(300, device=triton.device))
    with pytest.raises(BackendError, match="windows of up to 16 bits, found 17; use backend='cpu'"):
        triton.encode_stream(cost, Code(17, 2, 1), "best", None)
    with pytest.raises(BackendError, match="blocks of up to 128 weights, found 129; use backend='cpu'"):
        triton.encode_stream(cost, Code(8, 8, 129), "best", None)
    with pytest.raises(OptionError, match="selection: expected one of"):
        triton.encode_stream(cost, Code(8, 2, 1), "mean", None)
    with pytest.raises(OptionError, match="needs a torch.Generator"):
        triton.encode_stream(cost, Code(8, 2, 1), "sample", None)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(OptionError, match=r"expected one of \('auto', 'cpu', 'triton'\), found 'cuda'"):
        choose("cuda")


def test_triton_raises_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="expected a CUDA or ROCm device for backend='triton', found meta"):
        choose("triton", torch.device("meta"))
    monkeypatch.setattr(miracle_kernels, "INTERPRETED", False)
    with pytest.raises(BackendError, match="expected a CUDA or ROCm device .* found cpu; use a GPU"):
        choose("triton", torch.device("cpu"))
    monkeypatch.setattr(miracle_kernels, "HAS_TRITON", False)
    with pytest.raises(BackendError, match="expected the package triton"):
        choose("triton")


def test_auto_takes_numba_where_no_gpu_is_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, "miracle_hub"):
        assert choose().name == "cpu"
        assert choose("auto", torch.device("cpu")).name == "cpu"
    assert [r.message for r in caplog.records] == ["backend: numba on the CPU (the tensors are on no GPU)"]


def test_auto_takes_triton_where_a_gpu_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with caplog.at_level(logging.INFO, "miracle_hub"):
        chosen = choose()
        assert choose("auto", torch.device("cuda", 0)) is chosen
        assert chosen.name == "triton" and chosen.device == torch.device("cuda", 0)
        assert choose("cpu", torch.device("cuda")).name == "cpu"
    assert [r.message for r in caplog.records] == ["backend: Triton on cuda:0 (the tensors are on a GPU)"]


def test_a_gpu_without_triton_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(miracle_kernels, "HAS_TRITON", False)
    assert choose("auto", torch.device("cuda")).name == "cpu"
    assert caplog.records[0].levelno == logging.WARNING
    assert "though there is a GPU (backend: expected the package triton" in caplog.text
