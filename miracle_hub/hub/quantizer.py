"""The transformers plug-in: plain `from_pretrained` meets payloads and gets dense weights.

Every payload is stored as 1-D uint8 under the tensor's real name, so that a user without this
plug-in gets a size mismatch and never silently wrong weights. The hooks used here have kept their
meaning from transformers 5.8 on; arguments that came and went are taken as `*args, **kwargs`.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from miracle_hub.config import FORMAT_VERSION, QUANT_METHOD
from miracle_hub.errors import UnsupportedVersionError

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

# The decoder (numba, half a second) is imported when a compressed repository is loaded: this
# module is imported by everybody who imports transformers' quantizers.
_MAGIC = b"MRCL"


class MiracleQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed repository. Payloads describe themselves, so this
    only names the method and repeats figures for readers of config.json."""

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        modules_to_not_convert: list[str] | None = None,
        **facts: Any,
    ) -> None:
        if format_version > FORMAT_VERSION:
            raise UnsupportedVersionError(
                f"config.json: this miracle-hub reads format version {FORMAT_VERSION}, found "
                f"{format_version}; upgrade: pip install -U miracle-hub"
            )
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.modules_to_not_convert = modules_to_not_convert
        # True makes transformers drop this config once the weights are dense, so that the Trainer,
        # PEFT and save_pretrained see an ordinary model.
        self.dequantize = True
        for name, value in facts.items():
            setattr(self, name, value)


class DecodePayloads(ConversionOps):
    """Decode the payloads among collected tensors and pass plain tensors through.

    Alone it names its result after the parameter (`is_last`); in front of a model's own operations
    (fused experts, fused projections) it keeps their input's keys.
    """

    supports_many_to_many = True

    def __init__(self, quantizer: "MiracleQuantizer", is_last: bool) -> None:
        # transformers >= 5.21 hands the inputs of an operation with this attribute over uncast.
        self.hf_quantizer = quantizer
        self.is_last = is_last

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        full_layer_name: str,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        decoded = {
            key: [_dense(tensor, full_layer_name, dtype) for tensor in _as_list(tensors)]
            for key, tensors in input_dict.items()
        }
        if self.is_last:
            return {full_layer_name: next(iter(decoded.values()))[0]}
        return decoded

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("decoding is removed from the converters once the model is loaded")


def _as_list(tensors: Any) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else [tensors]


def _dense(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A payload decoded, or a plain tensor, in `dtype` on the device where it is."""
    if not _is_payload(tensor):
        return tensor.to(dtype) if tensor.is_floating_point() else tensor
    from miracle_hub.codec.tensor import decode_payload

    weights, _ = decode_payload(tensor.to("cpu", torch.uint8), name)
    return weights.to(tensor.device, dtype)


def _is_payload(tensor: Tensor) -> bool:
    """By magic; transformers < 5.21 may have cast the bytes to a float type, which keeps them exact."""
    if tensor.ndim != 1 or tensor.numel() < len(_MAGIC):
        return False
    return bytes(tensor[: len(_MAGIC)].cpu().int().clamp(0, 255).tolist()) == _MAGIC


class MiracleQuantizer(HfQuantizer):
    """Dense on load: converters decode, then everything is as if the checkpoint had been dense."""

    requires_calibration = True  # never compresses on the fly inside from_pretrained

    def __init__(self, quantization_config: MiracleQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._suffixes = {"weight"}
        self._dtypes: dict[str, torch.dtype] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to check: the decoder needs only what the package depends on."""

    def update_device_map(self, device_map: Any) -> Any:
        return device_map

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", *args: Any, **kwargs: Any
    ) -> "PreTrainedModel":
        """Check every payload's checksum and header before anything is allocated."""
        from miracle_hub.codec.decompress import stored_tensors

        for file in kwargs.get("checkpoint_files") or []:
            for tensor in stored_tensors(Path(file)):
                if tensor.header is not None:
                    self._suffixes.add(tensor.stored.name.rpartition(".")[2])
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Converters of the parameters that no converter of the model claims."""
        return [
            WeightConverter([f"{suffix}$"], suffix, operations=[DecodePayloads(self, is_last=True)])
            for suffix in sorted(self._suffixes)
        ]

    def update_weight_conversions(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, weight_conversions: list, *args: Any
    ) -> list:
        """The model's own converters with decoding in front, then ours."""
        updated = []
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter):
                conversion = copy.copy(conversion)
                conversion.operations = [
                    DecodePayloads(self, is_last=False),
                    *conversion.operations,
                ]
            updated.append(conversion)
        return updated + self.get_weight_conversions()

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        """Take decoding out of the converters again, so that save_pretrained writes a plain checkpoint."""
        kept = []
        for conversion in getattr(model, "_weight_conversions", None) or []:
            if isinstance(conversion, WeightConverter):
                conversion.operations = [
                    op for op in conversion.operations if not isinstance(op, DecodePayloads)
                ]
                if not conversion.operations:
                    continue
            kept.append(conversion)
        model._weight_conversions = kept or None  # pyright: ignore[reportArgumentType]
        for name, parameter in model.named_parameters():
            # transformers <= 5.20 leaves renamed plain tensors in the file's dtype.
            wanted = self._dtypes.get(name, parameter.dtype)
            if parameter.dtype != wanted and parameter.device.type != "meta":
                parameter.data = parameter.data.to(wanted)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


def register() -> None:
    """Make transformers know the method; safe to call twice."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(MiracleQuantizationConfig)
        register_quantizer(QUANT_METHOD)(MiracleQuantizer)
