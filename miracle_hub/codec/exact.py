"""The codec of what is no weight: masks, tables, statistics. Every bit of a tensor ⇄ one payload.

A causal mask of 1,024 × 1,024 float32 numbers (4 MB) takes 2 kB, position_ids of 512 int64 numbers 30 bytes.
It offers nothing to rate control: which tensors are kept exact is decided before (`constants`, `keeping`).
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miracle_hub.code import MAX_DIMENSIONS
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.dtypes import EXACT_DTYPES, raw_bytes
from miracle_hub.codec.payloads import Packed, Payload, PayloadFacts, Request
from miracle_hub.codec.rates import Chosen, Option
from miracle_hub.coding.backend import Backend
from miracle_hub.coding.digest import digest
from miracle_hub.errors import ChecksumError, FormatError, OptionError, SourceError
from miracle_hub.format.exact import (
    DEFLATED_DIFFERENCES,
    DEFLATED_PALETTE,
    DEFLATED_PLANES,
    MAGIC,
    MOST_WORDS,
    PALETTE,
    ExactHeader,
    decode_exact,
    encode_exact,
    least_bytes,
)
from miracle_hub.format.spec import TensorSpec

_NAMES = {dtype: name for name, dtype in EXACT_DTYPES.items()}
_INDEX_BITS = np.arange(16)


class Exact:
    """See `payloads.Codec`."""

    name, magic = "exact", MAGIC

    def read(self, data: Tensor, where: str) -> Payload:
        """
        Raises:
            FormatError: and its subclasses: the header is not sound. Nothing is inflated.
        """
        return ExactPayload(data, where)

    def survey(self, spec: TensorSpec, weights: Tensor, request: Request, is_difference: bool = False) -> Any:
        """None: what is a weight is not kept exact."""
        return None

    def offers(self, surveys: Sequence[Any], request: Request) -> list[list[Option]]:
        """Nothing."""
        return [[] for _ in surveys]

    def payload_bytes(self, spec: TensorSpec, choice: Chosen) -> int:
        """
        Raises:
            OptionError: always: how many bytes a tensor takes depends on its values.
        """
        raise OptionError(f"{spec.name}: expected a choice of another codec, found one of {self.name}")

    def encode(
        self,
        weights: Tensor,
        choice: Chosen,
        where: str,
        backend: Backend,
        earlier: Sequence[Tensor] = (),
        curvature: Curvature | None = None,
        base: Tensor | None = None,
    ) -> bytes:
        """The shortest payload, of any tensor that the format has.

        Raises:
            OptionError: the format has no such tensor.
        """
        if (found := exact_payload(weights)) is None:
            raise OptionError(f"{where}: expected a tensor that the format has, found {weights.dtype}")
        return found


EXACT = Exact()


class ExactPayload:
    """See `payloads.Payload`."""

    def __init__(self, data: Tensor, where: str) -> None:
        """
        Args:
            data: uint8 `[bytes]` on any device.
            where: the tensor's name, for messages.

        Raises:
            FormatError: and its subclasses: the header is not sound.
        """
        self.data, self.where = data.detach().cpu().numpy().tobytes(), where
        self.header, self.start = decode_exact(self.data, where)

    @property
    def facts(self) -> PayloadFacts:
        """What the header says."""
        header = self.header
        return PayloadFacts(EXACT.name, header.dtype, header.shape, header.digest, is_exact=True)

    def decode(self, backend: Backend, *, verify: bool = True, rounded: bool = False) -> Tensor:
        """The tensor in its own dtype, whether it is to be rounded or not: it never is.

        Raises:
            FormatError: its body is not sound. ChecksumError: it is not what was compressed.
            SourceError: torch does not know the dtype.
        """
        raw = _decoded(self.header, self.data, self.start, self.where)
        if verify and (found := bits_digest(raw)) != self.header.digest:
            raise ChecksumError(
                f"{self.where}: the decoded tensor has digest {found:016x}, the header promises "
                f"{self.header.digest:016x}; the payload is damaged: download the file again"
            )
        dtype = EXACT_DTYPES.get(self.header.dtype)
        if dtype is None:
            raise SourceError(
                f"{self.where}: expected a dtype that torch knows, found {self.header.dtype}; upgrade torch"
            )
        values = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)
        return values.view(self.header.shape).to(backend.device)

    def packed(self, dtype: torch.dtype | None, backend: str) -> Packed:
        """
        Raises:
            OptionError: always: rows do not decode alone.
        """
        raise OptionError(f"{self.where}: expected a coded matrix, found an exact tensor; load it dense")


def exact_payload(tensor: Tensor) -> bytes | None:
    """The shortest payload of a tensor; None if the format has no such tensor."""
    dtype = _NAMES.get(tensor.dtype)
    if dtype is None or not tensor.numel() or tensor.ndim > MAX_DIMENSIONS:
        return None
    raw = raw_bytes(tensor)
    header = ExactHeader(dtype, tuple(tensor.shape), DEFLATED_PLANES, 0, bits_digest(raw))
    words = np.frombuffer(raw, f"<u{header.item_bytes}")
    found = [encode_exact(header, b"", _deflated(_planes(words)))]
    differences = np.diff(words, prepend=words.dtype.type(0))
    header = replace(header, form=DEFLATED_DIFFERENCES)
    found.append(encode_exact(header, b"", _deflated(_planes(differences))))
    listed, places = np.unique(words, return_inverse=True)
    if len(listed) <= min(MOST_WORDS, 1 + len(words) // 2):
        header = replace(header, form=PALETTE, n_words=len(listed))
        body = _packed_places(places, header.index_bits)
        found.append(encode_exact(header, listed.tobytes(), body))
        header = replace(header, form=DEFLATED_PALETTE)
        found.append(encode_exact(header, listed.tobytes(), _deflated(body)))
    return min(found, key=len)


def _decoded(header: ExactHeader, data: bytes, start: int, where: str) -> bytes:
    """The tensor's bytes; `exact_payload` is the mirror.

    Raises:
        FormatError: the body is not sound.
    """
    end = start + header.n_words * header.item_bytes
    listed = np.frombuffer(data[start:end], f"<u{header.item_bytes}")
    body = _body(header, data, end, where)
    if header.form in (DEFLATED_PLANES, DEFLATED_DIFFERENCES):
        words = np.frombuffer(body, np.uint8).reshape(header.item_bytes, -1).T.copy()
        words = words.view(f"<u{header.item_bytes}")[:, 0]
        return (words if header.form == DEFLATED_PLANES else np.cumsum(words, dtype=words.dtype)).tobytes()
    places = _unpacked_places(body, header, end, where)
    if (listed[1:] <= listed[:-1]).any():
        raise _defect(where, start, "words that rise", "others")
    if int(places.max()) >= len(listed):
        raise _defect(where, end, f"places below {len(listed)}", int(places.max()))
    return listed[places].tobytes()


def _body(header: ExactHeader, data: bytes, start: int, where: str) -> bytes:
    """Indices or planes, of the very length that the header says; what follows them is zero.

    Raises:
        FormatError: they are not.
    """
    if header.form == PALETTE:
        body, rest = data[start : start + header.body_bytes], data[start + header.body_bytes :]
    else:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            body = inflater.decompress(data[start:], header.body_bytes + 1)
        except zlib.error as error:
            raise _defect(where, start, "a deflate stream", error) from None
        if len(body) != header.body_bytes or not inflater.eof:
            found = f"{len(body)} or more" if len(body) else "none"
            raise _defect(where, start, f"a deflate stream of {header.body_bytes} bytes", found)
        rest = inflater.unused_data
    end = len(data) - len(rest)
    if any(rest) or len(data) != max(end, least_bytes(header)):
        raise _defect(where, end, "the end, or zeros up to the least length", f"{len(rest)} bytes")
    return body


def _planes(words: np.ndarray) -> bytes:
    """All first bytes of little-endian words, then all second ones, and so on."""
    return words.view(np.uint8).reshape(len(words), -1).T.tobytes()


def _deflated(data: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


def _packed_places(places: np.ndarray, n_bits: int) -> bytes:
    """Numbers of `n_bits` bits each, most significant first, padded with zero bits."""
    bits = places.reshape(-1, 1) >> _INDEX_BITS[:n_bits][::-1] & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def _unpacked_places(body: bytes, header: ExactHeader, start: int, where: str) -> np.ndarray:
    """
    Raises:
        FormatError: the padding is not zero.
    """
    n_bits = header.index_bits
    bits = np.unpackbits(np.frombuffer(body, np.uint8))
    own = header.n_weights * n_bits
    if bits[own:].any():
        raise _defect(where, start + len(body) - 1, "zero bits of padding", f"{body[-1]:08b}")
    places = np.zeros(header.n_weights, np.uint16)
    for row in bits[:own].reshape(-1, n_bits).T:
        places = places << 1 | row
    return places


def bits_digest(raw: bytes) -> int:
    """FORMAT.md, "Digest", of bytes: of their words of 32 bits, the last one filled with zero bytes."""
    padded = bytearray(raw) + bytes(-len(raw) % 4)
    return digest(torch.frombuffer(padded, dtype=torch.float32))


def _defect(where: str, position: int, expected: str, found: object) -> FormatError:
    return FormatError(
        f"{where}: byte {position} of the exact payload: expected {expected}, found {found}; the file is "
        "damaged or was not written by miracle-hub"
    )
