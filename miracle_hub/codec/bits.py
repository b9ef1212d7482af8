"""The codec of what a tensor has beyond that of a base, every bit of it: the sum is the tensor itself.

It offers nothing to rate control: `lossless` decides which tensors are kept so. A float32 matrix that a
fine-tuning moved by a hundredth takes about 20 bits per weight, one in bfloat16 about 4.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from miracle_hub.code import MAX_DIMENSIONS
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.dtypes import DTYPE_NAMES, TORCH_DTYPES
from miracle_hub.codec.exact import Exact, bits_digest
from miracle_hub.codec.payloads import Packed, PayloadFacts
from miracle_hub.codec.rates import Chosen
from miracle_hub.coding.backend import Backend
from miracle_hub.coding.bit_differences import decode_piece, encode_piece
from miracle_hub.coding.cpu import in_threads
from miracle_hub.errors import BaseModelError, ChecksumError, OptionError
from miracle_hub.format.bits import MAGIC, PIECE, BitsHeader, Piece, decode_bits, encode_bits

# Of a number, how many bits are below the exponent.
_FRACTION_BITS = {"F32": 23, "BF16": 7, "F16": 10}
_SIGNED = {2: torch.int16, 4: torch.int32}


class Bits(Exact):
    """See `payloads.Codec`."""

    name, magic = "bits", MAGIC

    def read(self, data: Tensor, where: str) -> "BitsPayload":
        """
        Raises:
            FormatError: and its subclasses: the header is not sound. Nothing is decoded.
        """
        return BitsPayload(data, where)

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
        """The payload of a tensor beside a base's.

        Raises:
            OptionError: there is no base, or the format has no such tensor.
        """
        found = None if base is None else bits_payload(weights, base)
        if found is None:
            raise OptionError(
                f"{where}: expected a tensor of {', '.join(_FRACTION_BITS)} and that of a base, found "
                f"{weights.dtype} and {'a' if base is not None else 'no'} base; choose another codec"
            )
        return found


BITS = Bits()


class BitsPayload:
    """See `payloads.Payload` and `payloads.OntoBase`."""

    def __init__(self, data: Tensor, where: str) -> None:
        """
        Args:
            data: uint8 `[bytes]` on any device.
            where: the tensor's name, for messages.

        Raises:
            FormatError: and its subclasses: the header is not sound.
        """
        self.where = where
        self.header, self.pieces = decode_bits(data.detach().cpu().numpy().tobytes(), where)

    @property
    def facts(self) -> PayloadFacts:
        """What the header says."""
        header = self.header
        return PayloadFacts(
            BITS.name, header.dtype, header.shape, header.digest, is_exact=True, is_difference=True
        )

    def decode(self, backend: Backend, *, verify: bool = True, rounded: bool = False) -> Tensor:
        """
        Raises:
            BaseModelError: always: see `onto`.
        """
        raise BaseModelError(
            f"{self.where}: expected weights, found bits beyond those of a base, which alone mean nothing; "
            "read the folder that it is in"
        )

    def onto(self, base: Tensor, backend: Backend, *, verify: bool = True) -> Tensor:
        """The tensor, in its own dtype.

        Args:
            base: the base's, of any floating dtype, on any device.

        Raises:
            BaseModelError: it has another shape.
            FormatError: the pieces are not sound. ChecksumError: the tensor is not what was compressed.
        """
        header = self.header
        if tuple(base.shape) != header.shape:
            raise BaseModelError(
                f"{self.where}: expected a base's tensor of shape {list(header.shape)}, found "
                f"{list(base.shape)}; give the base that config.json names"
            )
        theirs = _patterns(base.cpu(), TORCH_DTYPES[header.dtype])
        own = np.empty_like(theirs)
        in_threads(self._decode_piece, [(i, theirs, own) for i in range(header.n_pieces)])
        if verify and (found := bits_digest(own.tobytes())) != header.digest:
            raise ChecksumError(
                f"{self.where}: the decoded tensor has digest {found:016x}, the header promises "
                f"{header.digest:016x}; the payload is damaged: download the file again"
            )
        values = torch.from_numpy(own.view(f"i{own.itemsize}")).view(TORCH_DTYPES[header.dtype])
        return values.view(header.shape).to(backend.device)

    def _decode_piece(self, i: int, theirs: np.ndarray, own: np.ndarray) -> None:
        span = slice(i * PIECE, (i + 1) * PIECE)
        fraction_bits = _FRACTION_BITS[self.header.dtype]
        decode_piece(*self.pieces[i], theirs[span], fraction_bits, own[span], self.where)

    def packed(self, dtype: torch.dtype | None, backend: str) -> Packed:
        """
        Raises:
            OptionError: always: a difference does not decode alone.
        """
        raise OptionError(
            f"{self.where}: expected a matrix by itself, found a difference to a base; load it dense"
        )


def bits_payload(tensor: Tensor, base: Tensor) -> bytes | None:
    """What a tensor has beyond that of a base; None if the format has no such tensor.

    Args:
        base: of the same shape, of any floating dtype.
    """
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if dtype not in _FRACTION_BITS or not tensor.numel() or tensor.ndim > MAX_DIMENSIONS:
        return None
    own, theirs = (_patterns(each, tensor.dtype) for each in (tensor, base))
    header = BitsHeader(dtype, tuple(tensor.shape), bits_digest(own.tobytes()))
    found: list[Piece] = [(b"", b"")] * header.n_pieces

    def encode(i: int) -> None:
        span = slice(i * PIECE, (i + 1) * PIECE)
        found[i] = encode_piece(own[span], theirs[span], _FRACTION_BITS[dtype])

    in_threads(encode, [(i,) for i in range(header.n_pieces)])
    return encode_bits(header, found)


def _patterns(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """The bit patterns of a tensor that is cast to a dtype, uint16 or uint32 `[n]`.

    Casts to 16 bits go by way of float32. A NaN that is cast gets the pattern of FORMAT.md, since processors
    do not agree on one.
    """
    cast = tensor if tensor.dtype == dtype else tensor.float().to(dtype)
    signed = cast.detach().contiguous().flatten().view(_SIGNED[dtype.itemsize]).numpy()
    patterns = signed.view(f"u{dtype.itemsize}")
    if tensor.dtype == dtype:
        return patterns
    quiet = (1 << 8 * dtype.itemsize - 1) - (1 << _FRACTION_BITS[DTYPE_NAMES[dtype]] - 1)
    return np.where(cast.isnan().flatten().numpy(), patterns.dtype.type(quiet), patterns)
