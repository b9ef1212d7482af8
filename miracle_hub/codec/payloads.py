"""What a codec is: how a tensor becomes a payload, and what a payload says of itself. Everybody else asks.

A payload is a string of bytes that decodes alone and begins with a frame (format/frame.py); in a file it is
the 1-D U8 entry of its tensor's own name. Its frame has the magic of its codec, which nobody but this module
looks at. A new codec is one file with a class of `Codec` and a line in `CODECS`: compressing, loading,
verifying, inspecting and decompressing then know it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.dtypes import is_bytes
from miracle_hub.codec.naming import STREAM
from miracle_hub.codec.rates import Chosen, Option
from miracle_hub.coding.backend import Backend
from miracle_hub.errors import FormatError
from miracle_hub.format import network
from miracle_hub.format.spec import TensorSpec

# Where the codec of every magic is. Imported when one is met: reading needs no other's code.
CODECS = {
    b"MRCL": "miracle_hub.codec.trellis:TRELLIS",
    b"MRCX": "miracle_hub.codec.exact:EXACT",
    b"MRCR": "miracle_hub.codec.rows:ROWS",
    b"MRCT": "miracle_hub.codec.thin:THIN",
    b"MRCB": "miracle_hub.codec.bits:BITS",
}
_MAGIC_BYTES = 4


@dataclass(frozen=True)
class PayloadFacts:
    """What a payload says of itself, checked, without being decoded.

    Attributes:
        codec: the name of what wrote it.
        dtype, shape: of the tensor that it stands for.
        digest: of its float32 weights, or of the bits of an exact tensor, in [0, 2⁶⁴).
        relative_error: ‖decoded - source‖² / ‖source‖², decoded being what readers get, in the dtype of the
            source, measured by the encoder; of a refinement over that of what it refines; 0 if nobody
            measured it.
        codes: of a code of windows and steps, part after part; empty for others.
        rotation: width of the Hadamard groups, 1 if there are none.
        row_scales: whether some rows have a prior scale of their own.
        scale: median prior scale, 0 if there is none.
        is_exact: whether it keeps every bit of a tensor, which then may have any dtype; of a difference, with
            the base's tensor at hand.
        has_rows: whether rows of a matrix decode without the others, so that it can stay compressed.
        is_difference: whether its weights are what a tensor has beyond that of a base.
    """

    codec: str
    dtype: str
    shape: tuple[int, ...]
    digest: int
    relative_error: float = 0.0
    codes: tuple[Code, ...] = ()
    rotation: int = 1
    row_scales: bool = False
    scale: float = 0.0
    has_rows: bool = False
    is_exact: bool = False
    is_difference: bool = False


class Packed(Protocol):
    """A weight matrix `[rows, columns]` that stays compressed; its products are in the dtype of their
    input.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        ...

    def dense(self) -> Tensor:
        """The matrix, bit for bit that of a dense load; its digest is compared."""
        ...

    def linear(self, x: Tensor) -> Tensor:
        """x·Wᵀ: `[..., columns]` → `[..., rows]`, not differentiable."""
        ...

    def matmul(self, x: Tensor) -> Tensor:
        """x·W: `[..., rows]` → `[..., columns]`, not differentiable."""
        ...


class Payload(Protocol):
    """One payload, whose bytes are checked as far as that needs no decoding."""

    @property
    def facts(self) -> PayloadFacts:
        """What it says of itself."""
        ...

    def decode(self, backend: Backend, *, verify: bool = True, rounded: bool = False) -> Tensor:
        """The weights in their own shape, on the backend's device.

        Args:
            verify: compare their digest with the one that `facts` has.
            rounded: in the dtype of the source, instead of float32.

        Raises:
            ChecksumError: they are not what was compressed.
        """
        ...

    def packed(self, dtype: torch.dtype | None, backend: str) -> Packed:
        """The same as a matrix that stays compressed.

        Args:
            dtype: to which weights are rounded after their source's, which None means.
            backend: a name, as `coding.backend.choose` takes it.

        Raises:
            OptionError: rows of it do not decode alone.
            BackendError: the backend cannot run where the payload is.
        """
        ...


@runtime_checkable
class OntoBase(Protocol):
    """A payload that is no sum with a base's tensor: it decodes only with that at hand."""

    def onto(self, base: Tensor, backend: Backend, *, verify: bool = True) -> Tensor:
        """The tensor in the dtype of its source, on the backend's device.

        Args:
            base: of any floating dtype, on any device.
            verify: compare the tensor's digest with the one that `facts` has.

        Raises:
            FormatError: and its subclasses: it is not what was compressed, or the base has another shape.
        """
        ...


@dataclass(frozen=True)
class Request:
    """What a compression asks of all codecs.

    Attributes:
        rotation: width of the widest Hadamard groups, 1 for none.
        n_tensors: that are to be coded, which share the time for measuring.
    """

    window_bits: int
    rotation: int
    seed: int
    n_tensors: int
    backend: Backend


class Codec(Protocol):
    """How tensors become payloads, and payloads tensors. Encoding and decoding stand side by side in its
    file.
    """

    @property
    def name(self) -> str:
        """That options and reports call it by."""
        ...

    @property
    def magic(self) -> bytes:
        """The four bytes that its payloads begin with: of a frame (`format.frame`), which guards let stand
        for the whole.
        """
        ...

    def read(self, data: Tensor, where: str) -> Payload:
        """A payload from its bytes, uint8 `[bytes]` on any device.

        Raises:
            FormatError: and its subclasses: it is not sound; nothing of its size was allocated.
        """
        ...

    def survey(self, spec: TensorSpec, weights: Tensor, request: Request, is_difference: bool = False) -> Any:
        """What `offers` needs to know of a tensor, or of its difference to a base, little in size; None if
        this codec does not take it.
        """
        ...

    def offers(self, surveys: Sequence[Any], request: Request) -> list[list[Option]]:
        """What each of the surveyed tensors may become. Errors are in the unit of `ladder`."""
        ...

    def payload_bytes(self, spec: TensorSpec, choice: Chosen) -> int:
        """The exact length of the payload that `encode` will write."""
        ...

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
        """The payload of a tensor, a pure function of its arguments.

        Args:
            earlier: float32 weights of payloads that come before in the tensor's sum; what they leave is
                coded. Only a codec that `stages` chooses gets any.
            curvature: what errors cost, where somebody measured it; else it is not given.
            base: of any dtype; the difference to it is coded. Else it is not given.
        """
        ...


def codec_of(magic: bytes) -> Codec:
    """The codec whose payloads begin so."""
    module, _, name = CODECS[magic].partition(":")
    return getattr(import_module(module), name)


def codecs() -> list[Codec]:
    """All codecs, in the order in which they are registered."""
    return [codec_of(magic) for magic in CODECS]


def codec_named(name: str) -> Codec:
    """The codec that options call so."""
    return next(codec for codec in codecs() if codec.name == name)


def has_magic(name: str, start: bytes) -> bool:
    """Whether an entry of bytes begins like a payload, or, under its name, like a network's stream."""
    magic = start[:_MAGIC_BYTES]
    return magic in CODECS or (name == STREAM and magic == network.MAGIC)


def is_payload(entry: Tensor) -> bool:
    """Whether an entry of a file, or its first bytes, are those of a payload."""
    return _magic(entry) in CODECS


def is_stray_stream(name: str, entry: Tensor) -> bool:
    """Whether an entry of a file, or its first bytes, are those of a network's stream without its name."""
    return name != STREAM and _magic(entry) == network.MAGIC


def _magic(entry: Tensor) -> bytes:
    """What an entry begins with; empty for what is no string of bytes."""
    return bytes(entry[:_MAGIC_BYTES].tolist()) if is_bytes(entry) else b""


def read(entry: Tensor, where: str) -> Payload | None:
    """The payload that an entry of a file is; None if it is a plain tensor.

    Args:
        where: the tensor's name, for messages.

    Raises:
        FormatError: and its subclasses: it begins like a payload and is not sound, or like a network's
            stream, which has another name.
    """
    if is_stray_stream(where, entry):
        raise FormatError(
            f"{where}: expected a network's stream to be named {STREAM}, found bytes that begin like one "
            "under this name, which is damaged: download the file again"
        )
    return codec_of(_magic(entry)).read(entry, where) if is_payload(entry) else None
