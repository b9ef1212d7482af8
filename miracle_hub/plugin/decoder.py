"""What the tensors of a checkpoint become in the model of one load: dense weights, or kept payloads."""

import re
import warnings
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from miracle_hub.codec import payloads
from miracle_hub.codec.stored import StoredTensor, decode_sum, payload_at
from miracle_hub.coding.backend import choose
from miracle_hub.errors import FormatError
from miracle_hub.plugin.stand_ins import place_of

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


class Expected(NamedTuple):
    """A parameter or buffer of a model that is to be loaded."""

    shape: torch.Size
    built_dtype: torch.dtype  # kept by tensors that are not in the checkpoint
    loaded_dtype: torch.dtype  # some modules keep float32 when the model is loaded in 16 bits


def expected_tensors(model: "PreTrainedModel", dtype: torch.dtype) -> dict[str, Expected]:
    """What a checkpoint of the model holds, when the model is loaded in `dtype`."""
    kept = model._get_dtype_plan(dtype)

    def expect(name: str, tensor: Tensor) -> Expected:
        if not tensor.is_floating_point():
            return Expected(tensor.shape, tensor.dtype, tensor.dtype)
        matches = (kept[pattern] for pattern in kept if re.search(pattern.replace("*", ".*"), name))
        return Expected(tensor.shape, tensor.dtype, next(matches, tensor.dtype))

    return {name: expect(name, t) for name, t in model.state_dict().items() if isinstance(t, Tensor)}


class Decoder:
    """Decodes what transformers hands over, tensor by tensor.

    Attributes:
        expected: what the model is to get, by name.
        backend: who decodes; "auto" goes by the device on which transformers put a payload.
        kept: payloads of dense tensors that are stored as they are, by name; None where nobody wants them.
        overflowed: names of tensors that a cast to the model's dtype made infinite.
    """

    def __init__(self, backend: str, kept: dict[str, Tensor] | None = None) -> None:
        self.backend, self.kept = backend, kept
        self.expected: Mapping[str, Expected] = {}
        self.overflowed: list[str] = []
        self._refinements: dict[bytes, list[Tensor]] = {}
        self._standing: Sequence[StoredTensor] = ()

    def take_standing(self, tensors: Sequence[StoredTensor]) -> None:
        """The tensors that stand-ins stand for, by their places."""
        self._standing = tensors

    def _stands_for(self, tensor: Tensor) -> StoredTensor | None:
        place = place_of(tensor) if self._standing else None
        return None if place is None else self._standing[place]

    def take_refinements(self, tensors: Sequence[StoredTensor]) -> None:
        """Payloads of later stages, which are no tensors of the model, for when their first one comes.

        Raises:
            FormatError: two payloads are alike, but are refined differently.
        """
        found = self._refinements = {}
        for tensor in tensors:
            if len(tensor.parts) > 1:
                first, *later = (part.load() for part in tensor.parts)
                key = _key(first)
                if key in found and not all(map(torch.equal, found[key], later)):
                    raise FormatError(
                        f"{tensor.name}: expected a payload unlike all others, found one that is refined in "
                        "two ways; load it with stages=1, or decompress the folder (miracle decompress)"
                    )
                found[key] = later

    def forget(self) -> None:
        """The model is loaded: drop what only loading needs."""
        self.expected, self._refinements, self._standing = {}, {}, ()

    def dense(self, tensor: Tensor, name: str) -> Tensor:
        """A payload decoded with its refinements, or a plain tensor, on the device where it is.

        By way of the source's dtype: the same rounding as loading the decompressed folder.

        Raises:
            FormatError: and its subclasses: the payload is not sound.
        """
        wanted = self.expected.get(name)
        dtype = wanted.loaded_dtype if wanted else None
        if not self.is_decoded(tensor, name):
            return self._cast(tensor, name, tensor.device, dtype)
        # A user's `with torch.device(...)` must not move the decoder's work.
        with torch.device("cpu"):
            if (stored := self._stands_for(tensor)) is not None:
                weights = stored.load(backend=choose(self.backend, tensor.device))
                return self._cast(weights, name, tensor.device, dtype)
            later = self._refinements.get(_key(tensor), []) if self._refinements else []
            entries = [tensor, *(refinement.to(tensor.device) for refinement in later)]
            weights = decode_sum(entries, name, backend=self.backend)
        return self._cast(weights, name, tensor.device, dtype)

    def _cast(self, weights: Tensor, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """As a dense checkpoint's tensor is cast; note is taken of one that becomes infinite."""
        cast = weights.to(device, dtype)
        is_narrower = cast.is_floating_point() and cast.element_size() < weights.element_size()
        if is_narrower and not bool(torch.isfinite(cast).all()) and bool(torch.isfinite(weights).all()):
            self.overflowed.append(name)
        return cast

    def warn_of_overflow(self) -> None:
        """Say which finite tensors became infinite in the dtype that the user asked for."""
        if self.overflowed:
            names, self.overflowed = sorted(self.overflowed), []
            warnings.warn(
                f"from_pretrained: expected numbers that the asked dtype can hold, found larger ones in "
                f"{len(names)} tensors, which became infinite: {', '.join(names[:4])}; load with a dtype of "
                "more range, such as bfloat16 or float32",
                stacklevel=2,
            )

    def keep(self, tensor: Tensor, name: str) -> None:
        """Take note of the payload that a dense tensor of the model is stored as."""
        if self.kept is not None and self.is_decoded(tensor, name):
            self.kept[name] = tensor.cpu()

    def is_decoded(self, tensor: Tensor, name: str) -> bool:
        """Whether it is a payload whose weights the model gets.

        Where bytes are expected, it is the payload of a layer that stays compressed, or that of bytes.
        """
        if self._stands_for(tensor) is not None:
            return True
        if not payloads.is_payload(tensor):
            return False
        wanted = self.expected.get(name)
        if wanted is None or wanted.loaded_dtype != torch.uint8:
            return True
        return payload_at(tensor, name).facts.shape == tuple(wanted.shape)


def _key(payload: Tensor) -> bytes:
    """What tells a payload from all others: by the time it is decoded, its name is lost."""
    return sha256(payload.cpu().numpy().tobytes()).digest()
