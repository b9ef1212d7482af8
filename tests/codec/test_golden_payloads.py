"""Committed payloads: what they decode to is the format, whatever becomes of the encoder.

Each tests/golden/payload_*.bin lies beside the float32 weights it stands for; they were written once
with miracle-hub 0.1.0 and both decoders. A change here is a new format version.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from miracle_hub.codec.trellis import decode_payload

PAYLOADS = sorted((Path(__file__).parents[1] / "golden").glob("payload_*.bin"))


def bits(weights: np.ndarray) -> np.ndarray:
    return weights.view(np.uint32)


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_a_committed_payload_decodes_to_the_committed_bits(path: Path) -> None:
    payload = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    weights, _ = decode_payload(payload, path.stem)
    expected = np.load(path.with_suffix(".npy"))
    assert weights.shape == expected.shape and np.array_equal(bits(weights.numpy()), bits(expected))


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_an_independent_decoder_reads_the_same_bits(
    path: Path, independent_decode: Callable[[bytes], tuple[int, np.ndarray, float, int]]
) -> None:
    dtype, weights, error, digest = independent_decode(path.read_bytes())
    payload = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    _, header = decode_payload(payload, path.stem)
    expected = np.load(path.with_suffix(".npy"))
    assert weights.shape == expected.shape and np.array_equal(bits(weights), bits(expected))
    assert (dtype, error) == (("F32", "BF16", "F16", "F64").index(header.dtype), header.relative_error)
    assert digest == header.digest


def test_the_committed_payloads_cover_every_option_of_the_format() -> None:
    headers = [
        decode_payload(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8), path.stem)[1]
        for path in PAYLOADS
    ]
    segments = [segment for header in headers for segment in header.segments]
    assert {header.dtype for header in headers} == {"F32", "BF16", "F16", "F64"}
    assert {header.permuted for header in headers} == {False, True}
    assert {header.rotation > 1 for header in headers} == {False, True}
    assert {0 < header.band_columns < header.columns for header in headers} == {False, True}
    assert {segment.row_scales for segment in segments} == {False, True}
    assert {segment.code.overlap_bits == 0 for segment in segments} == {False, True}
    assert max(segment.code.seed for segment in segments) == 2**64 - 1
    assert max(segment.code.step_weights for segment in segments) == 256


def test_the_independent_decoder_is_short_and_imports_nothing_of_ours() -> None:
    source = (Path(__file__).parents[1] / "golden" / "payload_decoder.py").read_text()
    assert len(source.splitlines()) < 60
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert imports == ["import zlib", "from pathlib import Path", "import numpy as np"]
