"""Differences of low rank: what is said holds, sums are in the stated order, and hostile ones are refused."""

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec import payloads
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.codec.payloads import Request
from miracle_hub.codec.rates import Choice, Option
from miracle_hub.codec.stored import decode_sum
from miracle_hub.codec.thin import THIN, ThinPayload, ThinRecipe, product, singular
from miracle_hub.codec.trellis import encode_tensor
from miracle_hub.coding.backend import choose
from miracle_hub.errors import ChecksumError, FormatError, NonFiniteWeightError, OptionError
from miracle_hub.format.payload import Segment
from miracle_hub.format.spec import TensorSpec
from miracle_hub.format.thin import Parts, ThinHeader, encode_thin

from .test_base import difference
from .test_rows import entry

REQUEST = Request(8, 16, 0, 1, choose("cpu"))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tuned(base: Tensor, rank: int = 2, noise: float = 0.0) -> Tensor:
    """Moved in a few directions, and a little in all others."""
    rows, columns = len(base), base[0].numel()
    low = 0.1 * gaussian(rows, rank, seed=1) @ gaussian(rank, columns, seed=2)
    moved = low + noise * gaussian(rows, columns, seed=3)
    return (base.float() + moved.view(base.shape)).to(base.dtype)


def options_of(base: Tensor, own: Tensor) -> list[Option]:
    spec = TensorSpec("low", "F32", tuple(base.shape))
    survey = THIN.survey(spec, own.float() - base.float(), REQUEST, is_difference=True)
    (options,) = THIN.offers([survey], REQUEST)
    return options


def a_payload(base: Tensor, own: Tensor, option: Option | None = None) -> tuple[bytes, int]:
    """And the size that was said."""
    option = option or min(options_of(base, own), key=lambda o: o.error)
    choice = Choice(len(base), option)
    payload = THIN.encode(own, choice, "low", choose("cpu"), base=base)
    return payload, THIN.payload_bytes(TensorSpec("low", "F32", tuple(base.shape)), choice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(96, 80), (33, 47), (64, 8, 3, 3), (40, 130)])
def test_every_option_takes_the_bytes_that_it_said(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base = gaussian(*shape).to(dtype)
    own = tuned(base, noise=0.01)
    for option in options_of(base, own)[::29]:
        payload, said = a_payload(base, own, option)
        assert len(payload) == said
        found = decode_sum([entry(payload)], "low", base=base)
        assert (found.dtype, found.shape) == (dtype, base.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_relative_error_is_what_readers_get(dtype: torch.dtype) -> None:
    base = gaussian(96, 80).to(dtype)
    own = tuned(base, noise=0.02)
    payload, _ = a_payload(base, own)
    found = decode_sum([entry(payload)], "low", base=base)
    error = float(
        (found.double() - own.double()).square().sum() / (base.double() - own.double()).square().sum()
    )
    assert ThinPayload(entry(payload), "low").facts.relative_error == pytest.approx(error, rel=1e-4)


def test_what_is_said_of_errors_is_near_what_comes_out() -> None:
    base = gaussian(256, 128)
    own = tuned(base, rank=4, noise=0.05)
    for option in options_of(base, own)[::17]:
        said = option.error / own.numel() ** 0.6
        payload, _ = a_payload(base, own, option)
        measured = ThinPayload(entry(payload), "low").facts.relative_error
        # The gain of differences raises errors at low rates; windows of 8 bits miss more than is said.
        assert measured < 0.05 + 1.6 * said or option.recipe.rest is not None


def test_a_difference_of_rank_two_takes_few_bytes() -> None:
    base = gaussian(256, 128)
    own = tuned(base)
    small = [option for option in options_of(base, own) if option.n_bytes < 600]
    payload, _ = a_payload(base, own, min(small, key=lambda option: option.error))
    assert len(payload) < 600
    assert ThinPayload(entry(payload), "low").facts.relative_error < 0.05


def test_the_sum_is_in_the_stated_order() -> None:
    left, right = gaussian(5, 7), gaussian(5, 9, seed=1)
    expected = torch.zeros(7, 9)
    for i in range(7):
        for j in range(9):
            total = left[0, i] * right[0, j]
            for k in range(1, 5):
                total = total + left[k, i] * right[k, j]
            expected[i, j] = total
    assert torch.equal(product(left, right), expected)


def test_singular_vectors_are_those_of_torch_and_the_same_on_every_call() -> None:
    matrix = gaussian(90, 6) @ gaussian(6, 70, seed=1) + 0.01 * gaussian(90, 70, seed=2)
    left, values, right = singular(matrix, 6)
    assert torch.allclose(values, torch.linalg.svdvals(matrix)[:6], rtol=1e-4)
    assert float((matrix - (left * values) @ right.T).norm()) < 1.01 * 0.01 * (90 * 70) ** 0.5
    for one, other in zip(singular(matrix, 6), (left, values, right), strict=True):
        assert torch.equal(one, other)


def test_a_models_difference_of_low_rank_is_coded_so(save_model, tmp_path: Path) -> None:  # noqa: ANN001
    base = {"a.weight": gaussian(256, 128), "b.weight": gaussian(64, 64)}
    own = {"a.weight": tuned(base["a.weight"]), "b.weight": base["b.weight"]}
    report = difference(save_model(own, "tuned"), save_model(base, "base"), tmp_path / "delta", size=1000)
    assert report.compressed_bytes <= 1000
    found = load_state_dict(tmp_path / "delta", base=tmp_path / "base")["a.weight"]
    left = (found - own["a.weight"]).square().sum() / (base["a.weight"] - own["a.weight"]).square().sum()
    assert float(left) < 0.1


def test_nothing_but_large_differences_is_surveyed() -> None:
    spec = TensorSpec("low", "F32", (96, 80))
    assert THIN.survey(spec, gaussian(96, 80), REQUEST) is None
    assert THIN.survey(spec, torch.zeros(96, 80), REQUEST, is_difference=True) is None
    assert (
        THIN.survey(TensorSpec("low", "F32", (16, 80)), gaussian(16, 80), REQUEST, is_difference=True) is None
    )
    assert THIN.survey(TensorSpec("low", "F32", (4096,)), gaussian(4096), REQUEST, is_difference=True) is None


def test_a_sum_that_the_dtype_cannot_hold_is_refused() -> None:
    base = torch.full((64, 64), 65000.0, dtype=torch.float16)
    own = base.clone()
    own[::2] -= 60000
    recipe = ThinRecipe(1, Code(8, 2, 1), 16, None, 64)
    with pytest.raises(NonFiniteWeightError, match="low"):
        THIN.encode(own.flip(0) * 1.0, Choice(64, Option(recipe, 0, 0.0)), "low", choose("cpu"), base=-base)


def factor(rank: int, length: int, base: bool = False) -> bytes:
    given: Any = {"base": torch.zeros(rank, length)} if base else {}
    values = torch.ones(rank, length)
    segments = [Segment(encode_rows_of(values), Code(8, 2, 1), False)]
    return encode_tensor(values, segments, 1, where="low", **given)


def encode_rows_of(values: Tensor) -> int:
    from miracle_hub.coding.matrix import matrix_columns

    return values.numel() // matrix_columns(tuple(values.shape))


def thin(parts: Parts, shape: tuple[int, ...] = (32, 64), error: float = 0.0) -> bytes:
    return encode_thin(ThinHeader("F32", shape, error, 0), parts)


def sealed(body: bytes) -> bytes:
    """Any body behind a frame that is right."""
    return struct.pack("<4sBI", b"MRCT", 1, zlib.crc32(body)) + body


LEFT, RIGHT = factor(3, 32), factor(3, 64)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (thin(Parts(factor(2, 32), RIGHT)), r"weights of shapes \[2, 32\] and \[2, 64\]"),
        (thin(Parts(RIGHT, LEFT)), "weights of shapes"),
        (thin(Parts(LEFT, factor(3, 64, base=True))), "weights of shapes"),
        (thin(Parts(LEFT, RIGHT, factor(32, 64))), r"a difference of shape \[32, 64\]"),
        (thin(Parts(LEFT, RIGHT, factor(64, 32, base=True))), "a difference of shape"),
        (thin(Parts(LEFT, RIGHT[:-1])), "expected CRC-32"),
        (thin(Parts(LEFT, RIGHT), shape=(32,)), "a number of dimensions from 2 to 8"),
        (thin(Parts(LEFT, RIGHT), shape=(1 << 20, 1 << 20)), "at most 16384 weights for each of"),
        (thin(Parts(LEFT, RIGHT), error=float("nan")), "a relative squared error of 0 or more"),
        (thin(Parts(LEFT, b"")), "the length of the right factor from 1"),
        (sealed(b"\0\2\x20\x40\xff\1\xff\1" + bytes(20)), "the length of the left factor|factors of"),
        (sealed(b"\0\2\x20\x40\x10\x10" + bytes(20)), "factors of 16 and 16 bytes"),
    ],
)
def test_hostile_factors_are_refused(payload: bytes, error: str) -> None:
    with pytest.raises(FormatError, match=error):
        payloads.read(entry(payload), "low")


def test_damage_is_found_wherever_it_is() -> None:
    payload, _ = a_payload(gaussian(96, 80), tuned(gaussian(96, 80)))
    for at in range(4, len(payload), 11):
        broken = bytearray(payload)
        broken[at] ^= 4
        with pytest.raises(FormatError):
            payloads.read(entry(bytes(broken)), "low")


def test_another_sum_is_found_by_its_digest() -> None:
    payload = thin(Parts(LEFT, RIGHT))
    with pytest.raises(ChecksumError, match="the header promises 0000000000000000"):
        decode_sum([entry(payload)], "low", base=torch.zeros(32, 64))


def test_factors_without_a_base_are_refused() -> None:
    base = gaussian(96, 80)
    (option, *_) = options_of(base, tuned(base))
    with pytest.raises(OptionError, match="a difference to a base, found weights"):
        THIN.encode(base, Choice(96, option), "low", choose("cpu"))
