"""Decoding as the first step of transformers' weight conversion.

Apart from `quantizer` because that module is imported while transformers itself is half imported;
this one only when a compressed repository is loaded.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from miracle_hub.codec.tensor import TORCH_DTYPES, decode_payload
from miracle_hub.errors import FormatError, OptionError
from miracle_hub.format.payload import MAGIC, is_payload

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

# The pattern of a converter for every name that no converter of the model claims: it comes last,
# and transformers stops at the first that matches.
_ANY_NAME, _SAME_NAME = "^(.+)$", r"\1"


class Expected(NamedTuple):
    """A parameter or buffer of a model that is to be loaded."""

    shape: torch.Size
    built_dtype: torch.dtype  # kept by tensors that are not in the checkpoint
    loaded_dtype: torch.dtype  # some modules keep float32 when the model is loaded in 16 bits


class DecodePayloads(ConversionOps):
    """Payloads among the collected tensors become their weights; all take the dtype that a dense
    checkpoint's tensors would take."""

    supports_many_to_many = True
    # transformers >= 5.21 hands over the inputs of an operation with this attribute uncast.
    hf_quantizer = True

    def __init__(self, expected: Mapping[str, Expected], original: WeightConverter | None) -> None:
        """
        Args:
            expected: of the model, by name.
            original: the model's converter, whose operations follow; None if there is none.
        """
        self.expected = expected
        self.original = original

    def __deepcopy__(self, memo: dict) -> "DecodePayloads":
        """transformers copies a converter per tensor; this operation has no state to copy."""
        return self

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Any]:
        _refuse_shards(input_dict, full_layer_name, model)
        wanted = self.expected.get(full_layer_name)
        dtype = wanted.loaded_dtype if wanted else None
        decoded = {
            pattern: [_dense(tensor, full_layer_name, dtype) for tensor in tensors]
            for pattern, tensors in input_dict.items()
        }
        if self.original is None:
            return {full_layer_name: next(iter(decoded.values()))[0]}
        return decoded

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("decoding is removed from the converters once the model is loaded")


class DecodingConverter(WeightConverter):
    """A converter that decodes first, and reports tensors of a wrong shape as mismatched.

    transformers <= 5.20 does not compare shapes when there is a quantizer: a head for another number
    of labels, or a damaged file, would go unnoticed.
    """

    __slots__ = ()

    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, layer_name: str, *args: Any, model: Any, loading_info: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        tensors: dict[str, Any] = super().convert(
            layer_name, *args, model=model, loading_info=loading_info, **kwargs
        )
        if loading_info is None or getattr(self, "distributed_operation", None) is not None:
            return tensors
        for name, found in list(tensors.items()):
            found = found[0] if isinstance(found, list) else found
            expected = getattr(_reference(name, model), "shape", None)
            if expected is not None and found.shape != expected:
                loading_info.mismatched_keys.add((name, found.shape, expected))
                loading_info.missing_keys.discard(name)
                del tensors[name]
        return tensors


def expected_tensors(model: "PreTrainedModel", dtype: torch.dtype) -> dict[str, Expected]:
    """What a checkpoint of the model holds, when the model is loaded in `dtype`."""
    kept = model._get_dtype_plan(dtype)

    def expect(name: str, tensor: Tensor) -> Expected:
        matches = (kept[pattern] for pattern in kept if re.search(pattern.replace("*", ".*"), name))
        return Expected(tensor.shape, tensor.dtype, next(matches, tensor.dtype))

    return {name: expect(name, t) for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def with_decoding(
    conversions: list[WeightTransform], expected: Mapping[str, Expected]
) -> list[WeightTransform]:
    """A model's conversions with decoding in front of each converter, and one converter for the rest."""
    changed = [_decoding(c, expected) if isinstance(c, WeightConverter) else c for c in conversions]
    rest = DecodingConverter(_ANY_NAME, _SAME_NAME, operations=[DecodePayloads(expected, None)])
    return [*changed, rest]


def without_decoding(conversions: list[WeightTransform]) -> list[WeightTransform]:
    """The model's own conversions again, as a dense checkpoint is loaded with."""
    originals = [
        c.operations[0].original if isinstance(c, DecodingConverter) else c  # pyright: ignore[reportAttributeAccessIssue]
        for c in conversions
    ]
    return [conversion for conversion in originals if conversion is not None]


@torch.no_grad()
def decode_leftovers(model: nn.Module, expected: Mapping[str, Expected]) -> None:
    """What transformers <= 5.20 put into the model without any converter, in place, so that ties hold.

    It does so when a checkpoint has the model's own name and a renaming would spoil it.

    Raises:
        FormatError: and its subclasses: a payload is not sound, or has another shape than the model's.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wanted = expected.get(name)
        if wanted is None or tensor.device.type == "meta" or tensor.dtype in wanted[1:]:
            continue
        dense = _dense(tensor, name, wanted.loaded_dtype)
        if dense.shape != wanted.shape:
            raise FormatError(
                f"{name}: expected weights of shape {tuple(wanted.shape)}, found {tuple(dense.shape)}; "
                "this is not the model's checkpoint: download it again"
            )
        tensor.data = dense
        tensor.requires_grad_(isinstance(tensor, nn.Parameter) and dense.is_floating_point())


def _decoding(original: WeightConverter, expected: Mapping[str, Expected]) -> DecodingConverter:
    """A copy that decodes first, whatever attributes this version of transformers gives converters."""
    copy = DecodingConverter.__new__(DecodingConverter)
    for base in type(original).__mro__:
        for name in getattr(base, "__slots__", ()):
            if hasattr(original, name):
                object.__setattr__(copy, name, getattr(original, name))
    copy.operations = [DecodePayloads(expected, original), *original.operations]
    return copy


def _reference(name: str, model: Any) -> Any:
    """The parameter or buffer that is to be loaded (the local shard, if it is distributed)."""
    try:
        found = model.get_parameter_or_buffer(name)
    except AttributeError:
        return None
    return getattr(found, "_local_tensor", found)


def _refuse_shards(tensors: dict[str, Any], name: str, model: Any) -> None:
    """Where each process gets a slice of every tensor, a slice of a payload is no payload."""
    sharded = hasattr(model.get_parameter_or_buffer(name), "_local_tensor")
    if sharded and any(tensor.dtype == torch.uint8 for part in tensors.values() for tensor in part):
        raise OptionError(
            f"{name}: a compressed tensor cannot be loaded in slices (tensor parallelism); decompress the "
            "folder first (miracle decompress) and load that"
        )


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
