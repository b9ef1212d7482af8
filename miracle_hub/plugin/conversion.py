"""Decoding as the first step of transformers' weight conversion.

Apart from `quantizer` because that module is imported while transformers itself is half imported;
this one only when a compressed repository is loaded.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from miracle_hub.codec.stored import StoredTensor
from miracle_hub.errors import FormatError, OptionError
from miracle_hub.names import matches
from miracle_hub.plugin.compressed_linear import COMPRESSED_CLASSES, PAYLOAD
from miracle_hub.plugin.decoder import Decoder

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

# The pattern of a converter for every name that no converter of the model claims: it comes last,
# and transformers stops at the first that matches.
_ANY_NAME, _SAME_NAME = "^(.+)$", r"\1"


class DecodePayloads(ConversionOps):
    """Payloads among the collected tensors become their weights; all take the dtype that a dense
    checkpoint's tensors would take."""

    supports_many_to_many = True
    # transformers >= 5.21 hands over the inputs of an operation with this attribute uncast.
    hf_quantizer = True

    def __init__(self, decoder: Decoder, original: WeightConverter | None) -> None:
        """
        Args:
            original: the model's converter, whose operations follow; None if there is none.
        """
        self.decoder, self.original = decoder, original

    def __deepcopy__(self, memo: dict) -> "DecodePayloads":
        """transformers copies a converter per tensor; this operation has no state to copy."""
        return self

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The tensors of the conversion, dense.

        Raises:
            FormatError: and its subclasses: a payload is not sound.
            OptionError: each process gets a slice of every tensor.
        """
        _refuse_shards(input_dict, full_layer_name, model)
        decoded = {
            pattern: [self.decoder.dense(tensor, full_layer_name) for tensor in tensors]
            for pattern, tensors in input_dict.items()
        }
        if self.original is not None:
            return decoded
        (found,), (dense,) = next(iter(input_dict.values())), next(iter(decoded.values()))
        self.decoder.keep(found, full_layer_name)
        return {full_layer_name: dense}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: it is taken out before anybody asks."""
        raise NotImplementedError("decoding is removed from the converters once the model is loaded")


class PayloadRenaming(WeightRenaming):
    """Leads the checkpoint's weights to the payloads of layers that stay compressed."""

    __slots__ = ()


class DecodingConverter(WeightConverter):
    """A converter that decodes first, and reports tensors of a wrong shape as mismatched.

    transformers <= 5.20 does not compare shapes when there is a quantizer: a head for another number
    of labels, or a damaged file, would go unnoticed.
    """

    __slots__ = ()

    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, layer_name: str, *args: Any, model: Any, loading_info: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The tensors of a layer, without those whose shape is not the model's."""
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


def with_decoding(conversions: list[WeightTransform], decoder: Decoder) -> list[WeightTransform]:
    """A model's conversions with decoding in front of each converter, and one converter for the rest."""
    changed = [_decoding(c, decoder) if isinstance(c, WeightConverter) else c for c in conversions]
    operation = DecodePayloads(decoder, None)
    return [*changed, DecodingConverter(_ANY_NAME, _SAME_NAME, operations=[operation])]


def without_decoding(conversions: list[WeightTransform]) -> list[WeightTransform]:
    """The model's own conversions again, as a dense checkpoint is loaded with."""
    originals = [
        c.operations[0].original if isinstance(c, DecodingConverter) else c  # pyright: ignore[reportAttributeAccessIssue]
        for c in conversions
        if not isinstance(c, PayloadRenaming)
    ]
    return [conversion for conversion in originals if conversion is not None]


@torch.no_grad()
def decode_leftovers(model: nn.Module, decoder: Decoder) -> None:
    """What transformers <= 5.20 put into the model without any converter, in place, so that ties hold.

    It does so when a checkpoint has the model's own name and a renaming would spoil it.

    Raises:
        FormatError: and its subclasses: a payload is not sound, or has another shape than the model's.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wanted = decoder.expected.get(name)
        if wanted is None or tensor.is_meta:
            continue
        is_loaded = tensor.dtype in (wanted.built_dtype, wanted.loaded_dtype)
        if is_loaded and not (tensor.dtype == torch.uint8 and decoder.is_decoded(tensor, name)):
            continue
        dense = decoder.dense(tensor, name)
        if dense.shape != wanted.shape:
            raise FormatError(
                f"{name}: expected weights of shape {tuple(wanted.shape)}, found {tuple(dense.shape)}; "
                "this is not the model's checkpoint: download it again"
            )
        tensor.data = dense
        tensor.requires_grad_(isinstance(tensor, nn.Parameter) and dense.is_floating_point())


def replace_layers(
    model: "PreTrainedModel",
    stored: Sequence[StoredTensor],
    conversions: list[WeightTransform],
    decoder: Decoder,
    skipped: list[str] | str,
) -> list[WeightTransform]:
    """Put compressed layers where the checkpoint has the weight of a linear layer as a payload.

    Tied and shared weights, weights that a converter changes, and those of another shape stay dense.

    Args:
        stored: all tensors of the checkpoint.
        conversions: by which the checkpoint's names become the model's.
        skipped: modules to load dense, as `names.matches` selects them.

    Returns:
        The conversions that lead the payloads to the layers.
    """
    layers = _replaceable_layers(model, skipped)
    names = _names_in_model(model, stored, conversions)
    loaded = {final for final, *_ in names}
    renamed = []
    for final, name, tensor in names:
        layer, path = layers.get(final), final.removesuffix(".weight")
        if layer is None or tensor is None or not tensor.is_coded:
            continue
        whole = layer.bias is None or f"{path}.bias" in loaded
        if whole and tensor.shape == tuple(layer.weight.shape) and tensor.facts[0].has_rows:
            (n_bytes,) = tensor.parts[0].shape
            compressed = COMPRESSED_CLASSES[type(layer)]
            dtype = decoder.expected[final].loaded_dtype
            model.set_submodule(path, compressed(layer, path, n_bytes, dtype, decoder.backend))
            renamed.append(re.escape(name.removesuffix(".weight")))
    return [PayloadRenaming(rf"^({'|'.join(renamed)})\.weight$", rf"\1.{PAYLOAD}")] if renamed else []


def _replaceable_layers(model: "PreTrainedModel", skipped: list[str] | str) -> dict[str, Any]:
    """Linear layers of their own by the name of their weight."""
    named = [*model.named_modules(remove_duplicate=False)]
    uses = Counter(id(module) for _, module in named)
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    return {
        f"{name}.weight": module
        for name, module in named
        if type(module) in COMPRESSED_CLASSES
        and uses[id(module)] == 1
        and f"{name}.weight" not in tied
        and not matches(name, skipped)
    }


def _names_in_model(
    model: "PreTrainedModel", stored: Sequence[StoredTensor], conversions: list[WeightTransform]
) -> list[tuple[str, str, StoredTensor | None]]:
    """Each tensor's name in the model, its name before the model's prefix is set right, and the tensor.

    Without the tensor where a converter claims it, or where another has the same name.
    """
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    built, names = model.state_dict(), []
    for tensor in stored:
        source = tensor.name
        before, claimed = rename_source_key(source, renamings, converters)
        final, _ = rename_source_key(source, renamings, converters, model.base_model_prefix, built)
        names.append((final, before, tensor if claimed is None else None))
    finals = Counter(final for final, *_ in names)
    return [(final, before, t if finals[final] == 1 else None) for final, before, t in names]


def _decoding(original: WeightConverter, decoder: Decoder) -> DecodingConverter:
    """A copy that decodes first, whatever attributes this version of transformers gives converters."""
    copy = DecodingConverter.__new__(DecodingConverter)
    for base in type(original).__mro__:
        for name in getattr(base, "__slots__", ()):
            if hasattr(original, name):
                object.__setattr__(copy, name, getattr(original, name))
    copy.operations = [DecodePayloads(decoder, original), *original.operations]
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
            f"{name}: expected a compressed tensor to be loaded whole, found slices of it (tensor "
            "parallelism); decompress the folder first (miracle decompress) and load that"
        )
