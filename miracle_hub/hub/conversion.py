"""Decoding as the first step of transformers' weight conversion.

Apart from `quantizer` because that module is imported while transformers itself is half imported;
this one only when a compressed repository is loaded.
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from miracle_hub.codec.tensor import TORCH_DTYPES, decode_payload
from miracle_hub.format.payload import MAGIC, is_payload

# One converter for every name that no converter of the model claims. It comes last, and
# transformers stops at the first converter that matches.
_ANY_NAME, _SAME_NAME = "^(.+)$", r"\1"


class DecodePayloads(ConversionOps):
    """Payloads among the collected tensors become their weights; all take the dtype that a dense
    checkpoint's tensors would take."""

    supports_many_to_many = True
    # transformers >= 5.21 hands over the inputs of an operation with this attribute uncast.
    hf_quantizer = True

    def __init__(self, kept_dtypes: dict[str, torch.dtype]) -> None:
        """`kept_dtypes`: patterns of parameters that keep a wider dtype than the model's."""
        self.kept_dtypes = kept_dtypes

    def __deepcopy__(self, memo: dict) -> "DecodePayloads":
        """transformers copies a converter per tensor; this operation has no state to copy."""
        return self

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Any]:
        dtype = self._dtype(full_layer_name, model)
        return {
            pattern: [_dense(tensor, full_layer_name, dtype) for tensor in tensors]
            for pattern, tensors in input_dict.items()
        }

    def _dtype(self, name: str, model: Any) -> torch.dtype | None:
        for pattern, dtype in self.kept_dtypes.items():
            if re.search(pattern.replace("*", ".*"), name):
                return dtype
        return getattr(model.get_parameter_or_buffer(name), "dtype", None)

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("decoding is removed from the converters once the model is loaded")


class TakeTheName(ConversionOps):
    """The first collected tensor becomes the parameter; as when a name is in no converter."""

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        return {full_layer_name: next(iter(input_dict.values()))[0]}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("this converter is removed once the model is loaded")


def with_decoding(
    conversions: list[WeightTransform], kept_dtypes: dict[str, torch.dtype]
) -> list[WeightTransform]:
    """A model's conversions with decoding in front of each converter, and one converter for the rest."""
    decode = DecodePayloads(kept_dtypes)
    changed = []
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            conversion = copy.copy(conversion)
            conversion.operations = [decode, *conversion.operations]
        changed.append(conversion)
    return [*changed, WeightConverter(_ANY_NAME, _SAME_NAME, operations=[decode, TakeTheName()])]


def without_decoding(conversions: list[WeightTransform]) -> list[WeightTransform]:
    """The reverse of `with_decoding`, in place: what a dense checkpoint would have been loaded with."""
    kept = []
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            if any(isinstance(operation, TakeTheName) for operation in conversion.operations):
                continue
            conversion.operations = [op for op in conversion.operations if not isinstance(op, DecodePayloads)]
        kept.append(conversion)
    return kept


def _dense(tensor: Tensor, name: str, dtype: torch.dtype | None) -> Tensor:
    """A payload decoded, or a plain tensor, in `dtype` on the device where it is.

    By way of the source's dtype: the same rounding as loading the decompressed folder.
    """
    if not _is_payload(tensor):
        return tensor.to(dtype)
    # A user's `with torch.device(...)` must not move the decoder's work.
    with torch.device("cpu"):
        weights, header = decode_payload(tensor.cpu(), name)
    return weights.to(TORCH_DTYPES[header.dtype]).to(tensor.device, dtype)


def _is_payload(tensor: Tensor) -> bool:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        return False
    return is_payload(bytes(tensor[: len(MAGIC)].tolist()))
