"""What follows the header of a payload: scales and messages as bytes, and back, checked."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from miracle_hub.coding.matrix import CodedRows
from miracle_hub.coding.scales import LARGEST_SCALE, SMALLEST_SCALE
from miracle_hub.errors import FormatError
from miracle_hub.format.payload import SCALE_BYTES, Header, decode_header


def body_of(parts: list[CodedRows]) -> bytes:
    """Scales and messages as a payload holds them; `coded_rows` reads them back."""
    scales = torch.cat([part.scales.cpu() for part in parts]).view(torch.uint8)
    return b"".join(raw.numpy().tobytes() for raw in (scales, *(part.message.cpu() for part in parts)))


def coded_rows(header: Header, payload: Tensor, start: int) -> Iterator[CodedRows]:
    """The parts of a payload whose body starts at `start`; messages are views of it, on its device."""
    at = start + SCALE_BYTES * header.n_scales
    scales = payload[start:at].clone().view(torch.bfloat16)
    for segment, n_bytes in zip(header.segments, header.message_bytes, strict=True):
        own, scales = scales[: segment.n_scales], scales[segment.n_scales :]
        yield CodedRows(segment.rows, segment.code, own, payload[at : at + n_bytes])
        at += n_bytes


def check_payload(data: bytes, where: str) -> tuple[Header, int]:
    """The header of a payload and where its body starts; all is checked that needs no decoding.

    Raises:
        FormatError: and its subclasses, for every way in which the payload can be wrong but its digest.
    """
    header, start = decode_header(data, where)
    body = data[start:]
    check_scale_words(np.frombuffer(body, "<u2", header.n_scales), start, where)
    check_padding(header, body, start, where)
    return header, start


def check_scale_words(words: np.ndarray, start: int, where: str) -> None:
    """Raise unless every scale (bfloat16 words from byte `start` of a payload on) is 0 or in its bounds.

    Raises:
        FormatError: one is not.
    """
    bits = words.astype(np.uint32) << 16
    values = bits.view(np.float32)
    good = (values == 0) & (bits == 0) | (values >= SMALLEST_SCALE) & (values <= LARGEST_SCALE)
    if not good.all():
        at = int(np.argmin(good))
        raise FormatError(
            f"{where}: scale {at} at byte {start + SCALE_BYTES * at} of the payload: expected 0 or a number "
            f"from 2^-64 to 2^64, found {values[at]:g}; the file is damaged: download it again"
        )


def check_padding(header: Header, body: bytes, start: int, where: str) -> None:
    """Raise unless the last byte of every message is filled with zero bits.

    Raises:
        FormatError: one is not.
    """
    end = SCALE_BYTES * header.n_scales
    for segment, n_bytes in zip(header.segments, header.message_bytes, strict=True):
        end += n_bytes
        unused = -segment.code.message_bits(segment.rows * header.columns) % 8
        if body[end - 1] & ((1 << unused) - 1):
            raise FormatError(
                f"{where}: byte {start + end - 1} of the payload: expected the last {unused} bits of a "
                f"message to be 0, found {body[end - 1]:08b}; the file is damaged: download it again"
            )
