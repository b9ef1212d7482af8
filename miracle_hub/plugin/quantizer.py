"""The transformers plug-in: plain `from_pretrained` meets payloads and gets dense weights.

Every payload is stored as 1-D uint8 under the tensor's real name, so that a user without this
plug-in gets a size mismatch. Only `ignore_mismatched_sizes=True` makes transformers put random weights
there, and says so in its report; nothing of this package runs then. The hooks used here have kept their
meaning from transformers 5.8 on; arguments that came and went are taken as `*args, **kwargs`.

This module is imported by everybody who imports transformers, in the middle of that import: the
decoder (numba, half a second) and `core_model_loading` are imported when a repository is loaded.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers import auto
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from miracle_hub.code import QUANT_METHOD
from miracle_hub.errors import FormatError
from miracle_hub.plugin.config import MiracleConfig

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


class MiracleQuantizer(HfQuantizer):
    """The hooks that transformers calls: `loading.Loading` does what they ask.

    Dense on load: converters decode, then everything is as if the checkpoint had been dense. With
    `keep_compressed`, payloads of linear layers become compressed layers and all others dense.
    """

    requires_calibration = True  # never compresses on the fly inside from_pretrained

    def __init__(self, quantization_config: MiracleConfig, **kwargs: Any) -> None:
        """As transformers calls it, once for every load.

        Raises:
            FormatError: config.json is that of a dense model.
        """
        if not kwargs.get("pre_quantized", True):
            raise FormatError(
                "quantization_config: expected a MiracleConfig to load a compressed repository with, found a "
                "config.json without one of miracle: run miracle compress first, or, if the repository is "
                "compressed, its config.json has lost it: download it again"
            )
        super().__init__(quantization_config, **kwargs)
        from miracle_hub.plugin.loading import Loading

        self._loading: Loading = Loading(quantization_config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the model's config before any weights are looked for: which stages are wanted."""
        self._loading.prepare(config)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same for transformers <= 5.20."""
        self._loading.prepare(config)
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Take note of the dtype asked for; it stays what it is."""
        self._loading.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", *args: Any, **kwargs: Any
    ) -> "PreTrainedModel":
        """Check the backend, and every payload's checksum and header, before anything is allocated.

        Raises:
            BackendError: the backend cannot run here.
            FormatError: and its subclasses: a file is not sound.
        """
        # transformers builds the model, and calls this, under `torch.device("meta")`.
        with torch.device("cpu"):
            self._loading.open(model, kwargs.get("checkpoint_files") or [])
        return model

    def update_weight_conversions(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, weight_conversions: list, *args: Any
    ) -> list:
        """The model's own converters with decoding in front, and one for all other names."""
        return self._loading.convert(weight_conversions)

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        """Take decoding out of the converters again: save_pretrained reverses those that are left.

        Raises:
            FormatError: and its subclasses: a payload that was left over cannot be decoded.
        """
        self._loading.finish(model)
        return model

    def get_state_dict_and_metadata(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, Tensor] | None, dict]:
        """What save_pretrained writes: a compressed model's payloads, under the names of their weights."""
        return self._loading.saved(model), {}

    def _dequantize(self, model: "PreTrainedModel", *args: Any, **kwargs: Any) -> "PreTrainedModel":
        """Ordinary layers for compressed ones; another dtype than the model's casts it all."""
        from miracle_hub.plugin.compressed_linear import make_ordinary
        from miracle_hub.plugin.facts import forget_facts

        make_ordinary(model)
        forget_facts(model, is_kept=False, is_staged=False)
        for module in model.modules():
            vars(getattr(module, "config", None) or SimpleNamespace()).pop("_is_quantized", None)
        dtype = next(iter(args), kwargs.get("dtype"))
        return model if dtype in (None, model.config.dtype) else model.to(dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Always: see `get_state_dict_and_metadata`."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A dense model is, and a compressed one below adapters."""
        return True


def register() -> None:
    """Make transformers know the method; safe to call twice."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MiracleConfig)
        # Only these classes may change how a repository is loaded.
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (MiracleConfig,)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(MiracleQuantizer)


register()
