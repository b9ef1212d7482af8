"""The transformers plug-in: plain `from_pretrained` meets payloads and gets dense weights.

Every payload is stored as 1-D uint8 under the tensor's real name, so that a user without this
plug-in gets a size mismatch and never silently wrong weights. The hooks used here have kept their
meaning from transformers 5.8 on; arguments that came and went are taken as `*args, **kwargs`.

This module is imported by everybody who imports transformers, in the middle of that import: the
decoder (numba, half a second) and `core_model_loading` are imported when a repository is loaded.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from miracle_hub.config import FORMAT_VERSION, QUANT_METHOD
from miracle_hub.errors import ChecksumError, UnsupportedVersionError

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

    from miracle_hub.hub.conversion import Expected


class MiracleQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed repository. Payloads describe themselves, so this
    names the method, the digest of them all, and repeats figures for readers of config.json."""

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        digest: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        **figures: Any,
    ) -> None:
        if format_version not in range(1, FORMAT_VERSION + 1):
            raise UnsupportedVersionError(
                f"config.json: this miracle-hub reads format version {FORMAT_VERSION}, found "
                f"{format_version!r}; upgrade: pip install -U miracle-hub"
            )
        vars(self).update(figures)
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.digest = digest
        self.modules_to_not_convert = modules_to_not_convert
        # True makes transformers drop this config once the weights are dense, so that the Trainer,
        # PEFT and save_pretrained see an ordinary model.
        self.dequantize = True


class MiracleQuantizer(HfQuantizer):
    """Dense on load: converters decode, then everything is as if the checkpoint had been dense."""

    requires_calibration = True  # never compresses on the fly inside from_pretrained

    def __init__(self, quantization_config: MiracleQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype = torch.float32
        self._expected: dict[str, Expected] = {}
        self._conversions: list = []

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Take note of the dtype asked for; it stays what it is."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", *args: Any, **kwargs: Any
    ) -> "PreTrainedModel":
        """Check every payload's checksum and header before anything is allocated."""
        from miracle_hub.hub.conversion import expected_tensors

        # transformers builds the model, and calls this, under `torch.device("meta")`.
        with torch.device("cpu"):
            _check_payloads(kwargs.get("checkpoint_files") or [], vars(self.quantization_config)["digest"])
        self._expected = expected_tensors(model, self._dtype)
        return model

    def update_weight_conversions(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, weight_conversions: list, *args: Any
    ) -> list:
        """The model's own converters with decoding in front, and one for all other names."""
        from miracle_hub.hub.conversion import with_decoding

        self._conversions = with_decoding(weight_conversions, self._expected)
        return self._conversions

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        """Take decoding out of the converters again: save_pretrained reverses those that are left.

        Raises:
            FormatError: and its subclasses: a payload that was left over cannot be decoded.
        """
        from miracle_hub.hub.conversion import decode_leftovers, without_decoding

        # In place: transformers goes on using its list when it loads an adapter after the model.
        self._conversions[:] = without_decoding(self._conversions)
        used = getattr(model, "_weight_conversions", None)
        if used is not None:
            model._weight_conversions = without_decoding(used)  # pyright: ignore[reportArgumentType]
        decode_leftovers(model, self._expected)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


def _check_payloads(files: list[str], digest: str | None) -> None:
    """What can be checked without decoding; a lost payload would otherwise become random weights.

    Raises:
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
    """
    from miracle_hub.codec.decompress import stored_digest, stored_tensors

    found = stored_digest([tensor for file in files for tensor in stored_tensors(Path(file))])
    if files and digest not in (None, found):
        raise ChecksumError(
            f"{Path(files[0]).parent}: config.json promises compressed tensors of digest {digest}, found "
            f"{found}; tensors are damaged, missing or from another version: download it again"
        )


def register() -> None:
    """Make transformers know the method; safe to call twice."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MiracleQuantizationConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(MiracleQuantizer)
