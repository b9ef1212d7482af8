"""Differences in some rows: only those are coded, in the size that was said, and hostile ones are refused."""

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
from miracle_hub.codec.rates import Choice
from miracle_hub.codec.rows import ROWS
from miracle_hub.codec.stored import decode_sum
from miracle_hub.codec.trellis import encode_tensor
from miracle_hub.coding.backend import choose
from miracle_hub.errors import ChecksumError, FormatError, OptionError, TruncatedPayloadError
from miracle_hub.format.payload import Segment
from miracle_hub.format.rows import encode_rows
from miracle_hub.format.spec import TensorSpec

from .test_base import difference

N_ROWS, COLUMNS = 600, 32


def words(seed: int = 0) -> Tensor:
    return torch.randn(N_ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def moved(table: Tensor, rows: slice = slice(3, None, 50), by: float = 0.5) -> Tensor:
    found = table.clone()
    found[rows] += by * words(1)[rows].to(table)
    return found


def a_payload(base: Tensor, tuned: Tensor, n_bytes: int = 10**9) -> tuple[bytes, int]:
    """Of the largest option, and the size that was said."""
    spec = TensorSpec("words", "F32", tuple(base.shape))
    request = Request(8, 16, 0, 1, choose("cpu"))
    survey = ROWS.survey(spec, tuned.float() - base.float(), request, is_difference=True)
    (options,) = ROWS.offers([survey], request)
    option = max((o for o in options if o.n_bytes <= n_bytes), key=lambda o: o.n_bytes)
    choice = Choice(len(base), option)
    payload = ROWS.encode(tuned, choice, "words", choose("cpu"), base=base)
    return payload, ROWS.payload_bytes(spec, choice)


def entry(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def sealed(body: bytes) -> bytes:
    """Any body behind a frame that is right."""
    return struct.pack("<4sBI", b"MRCR", 1, zlib.crc32(body)) + body


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_rows_that_moved_are_coded_in_the_size_that_was_said(dtype: torch.dtype) -> None:
    base = words().to(dtype)
    tuned = moved(base)
    payload, said = a_payload(base, tuned)
    assert len(payload) == said < 12 * COLUMNS * 4
    found = decode_sum([entry(payload)], "words", base=base)
    assert found.dtype == dtype
    still = torch.ones(N_ROWS, dtype=torch.bool)
    still[3::50] = False
    assert torch.equal(found[still], base[still])
    assert float((found - tuned).float().square().sum()) < 0.01 * float((base - tuned).float().square().sum())


def test_the_relative_error_is_that_of_the_whole_table() -> None:
    base = words()
    tuned = moved(base)
    tuned[1::50] += 0.05
    payload, _ = a_payload(base, tuned, n_bytes=500)
    found = decode_sum([entry(payload)], "words", base=base)
    error = float((found - tuned).double().square().sum() / (base - tuned).double().square().sum())
    facts = payloads.read(entry(payload), "words").facts  # pyright: ignore[reportOptionalMemberAccess]
    assert facts.relative_error == pytest.approx(error, rel=1e-4)
    assert (facts.codec, facts.shape, facts.is_difference, facts.has_rows) == (
        "rows",
        (N_ROWS, COLUMNS),
        True,
        False,
    )


def test_a_tables_few_rows_cost_less_than_the_table(save_model, tmp_path: Path) -> None:  # noqa: ANN001
    base = save_model({"words.weight": words(), "other.weight": words(2)}, "base")
    tuned = save_model({"words.weight": moved(words()), "other.weight": words(2)}, "tuned")
    report = difference(tuned, base, tmp_path / "delta", size=1000)
    assert report.compressed_bytes <= 1000
    found = load_state_dict(tmp_path / "delta", base=base)["words.weight"]
    left = float((found - moved(words())).square().sum() / (words() - moved(words())).square().sum())
    assert left < 0.05


@pytest.mark.parametrize("n_rows", [255, N_ROWS])
def test_what_moved_everywhere_or_is_short_is_left_to_the_trellis(n_rows: int) -> None:
    request = Request(8, 16, 0, 1, choose("cpu"))
    difference = words() if n_rows == N_ROWS else moved(torch.zeros(N_ROWS, COLUMNS))[:n_rows]
    spec = TensorSpec("words", "F32", (n_rows, COLUMNS))
    found = ROWS.survey(spec, difference, request, is_difference=True)
    assert found is None or all(some.share < 1 for some in found)
    assert ROWS.survey(spec, difference, request) is None


def inner(rows: int = 2, columns: int = COLUMNS, base: bool = True) -> bytes:
    segments = [Segment(rows, Code(8, 2, 1), False)]
    given: Any = {"base": torch.zeros(rows, columns)} if base else {}
    return encode_tensor(torch.ones(rows, columns), segments, 1, where="words", **given)


def mask(*rows: int, n_rows: int = 16) -> bytes:
    return sum(1 << row for row in rows).to_bytes(-(-n_rows // 8), "little")


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (encode_rows((16, COLUMNS), mask(1, 2, 3), inner(2)), r"a difference of shape \[3, 32\]"),
        (encode_rows((16, COLUMNS), mask(1, 2), inner(2, base=False)), "a difference of shape"),
        (encode_rows((16, COLUMNS), mask(), inner(2)), "some of them set"),
        (encode_rows((12, COLUMNS), mask(1, 14), inner(2)), "a bit for each of 12 rows"),
        (encode_rows((16, 1 << 20), mask(1, 2), inner(2)), "at most 2048 weights for each of"),
        (encode_rows((16,), mask(1, 2), inner(2)), "a number of dimensions from 2 to 8"),
        (encode_rows((1 << 50, 1), mask(1, 2), inner(2)), "a dimension from 1 to"),
        (encode_rows((16, COLUMNS), mask(1, 2), inner(2)[:-1]), "expected CRC-32"),
        (encode_rows((16, COLUMNS), mask(1, 2), b""), "a payload has at least"),
        (sealed(b"\2\x10\x20\6"), "a bit for each of 16 rows"),
    ],
)
def test_hostile_rows_are_refused(payload: bytes, error: str) -> None:
    with pytest.raises(FormatError, match=error):
        payloads.read(entry(payload), "words")


def test_damage_is_found_wherever_it_is() -> None:
    payload, _ = a_payload(words(), moved(words()))
    for at in range(4, len(payload), 7):
        broken = bytearray(payload)
        broken[at] ^= 4
        with pytest.raises(FormatError):
            payloads.read(entry(bytes(broken)), "words")
    with pytest.raises((TruncatedPayloadError, ChecksumError)):
        payloads.read(entry(payload[:-1]), "words")


def test_rows_without_a_base_are_refused() -> None:
    spec = TensorSpec("words", "F32", (N_ROWS, COLUMNS))
    request = Request(8, 16, 0, 1, choose("cpu"))
    (options,) = ROWS.offers([ROWS.survey(spec, moved(torch.zeros_like(words())), request, True)], request)
    with pytest.raises(OptionError, match="a difference to a base, found weights"):
        ROWS.encode(words(), Choice(N_ROWS, options[0]), "words", choose("cpu"))
