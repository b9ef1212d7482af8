"""The quantile table: its bytes, its symmetry, and its values against two other libraries."""

import hashlib
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import ndtri

from miracle_hub.coding import cpu
from miracle_hub.coding import quantiles as module
from miracle_hub.errors import ChecksumError

SHA256 = "c84e2ee9a90a7a594e0c266c687ccb9dbfe20d0c0040f95fe05e2511d533ad11"
PROBABILITIES = (np.arange(65536) + 0.5) / 65536  # exact in float64


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return module.quantiles().numpy()


def test_table_has_the_sha256_of_the_format(table: np.ndarray) -> None:
    assert module.QUANTILES_SHA256 == SHA256
    assert hashlib.sha256(table.astype("<f2").tobytes()).hexdigest() == SHA256


def test_table_is_antisymmetric(table: np.ndarray) -> None:
    assert table.dtype == np.float16 and table.shape == (65536,)
    assert np.array_equal(table.view(np.uint16) ^ 0x8000, table[::-1].view(np.uint16))


def test_table_never_decreases_and_is_finite(table: np.ndarray) -> None:
    assert np.isfinite(table).all()
    assert (np.diff(table.astype(np.float32)) >= 0).all()


def test_table_is_the_rounded_normal_quantile_of_scipy(table: np.ndarray) -> None:
    assert np.array_equal(ndtri(PROBABILITIES).astype(np.float16), table)


def test_table_is_right_where_the_quantile_is_close_to_a_rounding_tie(table: np.ndarray) -> None:
    """There a library could round to the wrong side; fifty digits decide: Φ(tie below) < p < Φ(tie above)."""
    value = table.astype(np.float64)
    below = (value + np.nextafter(table, np.float16(-np.inf)).astype(np.float64)) / 2
    above = (value + np.nextafter(table, np.float16(np.inf)).astype(np.float64)) / 2
    exact = ndtri(PROBABILITIES)
    distance = np.minimum(exact - below, above - exact)
    close = np.flatnonzero(distance < 2e-6 * abs(exact))
    assert close.size > 100
    with mpmath.workdps(50):
        for u in close:
            p = (mpmath.mpf(int(u)) + 0.5) / 65536
            assert mpmath.ncdf(float(below[u])) < p < mpmath.ncdf(float(above[u])), u


def test_float32_table_of_the_numba_decoder_holds_the_same_values(table: np.ndarray) -> None:
    assert cpu.quantiles_float32().dtype == np.float32
    assert torch.equal(torch.from_numpy(cpu.quantiles_float32()), torch.from_numpy(table.astype(np.float32)))


def test_an_altered_file_raises_a_checksum_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered = bytearray(module.quantiles().numpy().astype("<f2").tobytes())
    altered[77] ^= 1
    (tmp_path / "quantiles.f16").write_bytes(altered)
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    with pytest.raises(ChecksumError) as caught:
        module.quantiles.__wrapped__()
    assert str(caught.value) == (
        f"quantiles.f16: expected SHA-256 {SHA256}, found {hashlib.sha256(altered).hexdigest()}; "
        "the installation is damaged: pip install --force-reinstall miracle-hub"
    )
