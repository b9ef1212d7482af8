"""The transformers plug-in: plain `from_pretrained` meets payloads and gets dense weights.

Every payload is stored as 1-D uint8 under the tensor's real name, so that a user without this
plug-in gets a size mismatch and never silently wrong weights. The hooks used here have kept their
meaning from transformers 5.8 on; arguments that came and went are taken as `*args, **kwargs`.

This module is imported by everybody who imports transformers, in the middle of that import: the
decoder (numba, half a second) and `core_model_loading` are imported when a repository is loaded.
"""

import warnings
from dataclasses import fields
from pathlib import Path
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
from transformers.utils.quantization_config import QuantizationConfigMixin

from miracle_hub.code import FORMAT_VERSION, QUANT_METHOD
from miracle_hub.errors import FormatError, OptionError, UnsupportedVersionError
from miracle_hub.options import LoadOptions

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

    from miracle_hub.codec.stored import StoredTensor
    from miracle_hub.plugin.conversion import Expected
    from miracle_hub.training.config import VariationalConfig


# What a reader chooses, not what a repository is: never written to config.json.
_LOADING_OPTIONS = ("keep_compressed", "backend")


class MiracleConfig(QuantizationConfigMixin):
    """How to load a compressed repository: `from_pretrained(..., quantization_config=MiracleConfig(...))`;
    and what `make_variational(model, MiracleConfig(...))` makes of a model.

    It is also the `quantization_config` of the repository's config.json. Payloads describe themselves, so
    that names the method, the digest of them all, and repeats figures for readers.
    """

    def __init__(
        self,
        /,  # or a figure named "self" would be taken for it
        format_version: int = FORMAT_VERSION,
        digest: str | None = None,
        modules_to_not_convert: list[str] | str | None = None,
        keep_compressed: bool = False,
        backend: str = "auto",
        **figures: Any,
    ) -> None:
        """
        Args:
            format_version: of the repository.
            digest: of all its payloads.
            modules_to_not_convert: modules to load dense though `keep_compressed` is set, by name or end of
                name after a dot; or a regular expression that matches whole names.
            keep_compressed: linear layers keep their payloads and decode them in each forward pass,
                instead of once on load.
            backend: who decodes: "cpu", "triton", or "auto" for Triton where a payload is on a GPU.
            figures: others of config.json; for `make_variational`, the options of
                `training.config.VariationalConfig`: bits_per_weight or size (of whole files), rate or
                message_bits, target_modules, exclude_modules, modules_to_save, parametrization, streams,
                code, window_bits, sharing, seed, …

        Raises:
            UnsupportedVersionError: the repository is newer than this package.
            OptionError: an option is none.
        """
        if format_version not in range(1, FORMAT_VERSION + 1):
            raise UnsupportedVersionError(
                f"config.json: this miracle-hub reads format versions up to {FORMAT_VERSION}, found "
                f"{format_version!r}; upgrade: pip install -U miracle-hub"
            )
        figures.pop("dequantize", None)
        _check_figures(figures)
        vars(self).update(figures)
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.digest = digest
        self.modules_to_not_convert = modules_to_not_convert
        self.keep_compressed = keep_compressed
        self.backend = backend
        _check_options(keep_compressed, backend, modules_to_not_convert)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The config of a repository.

        Raises:
            OptionError: `modules_to_not_convert` is no list; a stranger's regular expression may not end.
        """
        names = config_dict.get("modules_to_not_convert")
        if isinstance(names, str):
            raise OptionError(
                f"config.json: modules_to_not_convert: expected a list of names, found {names!r}; the file "
                "is hostile or damaged: download it again"
            )
        return super().from_dict(config_dict, *args, **kwargs)

    def variational(self) -> "VariationalConfig":
        """The options of `make_variational` among those given.

        Raises:
            OptionError, BudgetError: one is unknown or out of range.
        """
        from miracle_hub.training.config import VariationalConfig, refuse_old_names

        refuse_old_names(vars(self), "MiracleConfig")
        known = {f.name for f in fields(VariationalConfig)}
        own = {"quant_method", "format_version", "digest", "modules_to_not_convert", *_LOADING_OPTIONS}
        if unknown := sorted(set(vars(self)) - known - own):
            raise OptionError(
                f"MiracleConfig: expected options of make_variational ({', '.join(sorted(known))}), found "
                f"{unknown[0]!r}; check the spelling"
            )
        return VariationalConfig(**{name: value for name, value in vars(self).items() if name in known})

    @property
    def dequantize(self) -> bool:
        """True makes transformers drop this config once the weights are dense, so that the Trainer,
        PEFT and save_pretrained see an ordinary model."""
        return not self.keep_compressed

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user's config changes in that of the repository; transformers asks for it."""
        # It also warns that it does what was asked for, naming these very options.
        warnings.filterwarnings("ignore", "(?s)You passed `quantization_config`.*'keep_compressed'")
        options = {name: getattr(self, name) for name in _LOADING_OPTIONS}
        if self.modules_to_not_convert is not None:
            options["modules_to_not_convert"] = self.modules_to_not_convert
        return options

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        values = super().to_dict()
        return {name: value for name, value in values.items() if name not in _LOADING_OPTIONS}


class MiracleQuantizer(HfQuantizer):
    """Dense on load: converters decode, then everything is as if the checkpoint had been dense.

    With `keep_compressed`, payloads of linear layers become compressed layers and all others dense.
    """

    requires_calibration = True  # never compresses on the fly inside from_pretrained

    def __init__(self, quantization_config: MiracleConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype = torch.float32
        self._expected: dict[str, Expected] = {}
        self._conversions: list = []
        self._model: PreTrainedModel | None = None  # while it is loaded
        self._stored: list[StoredTensor] = []
        self._payloads: dict[str, Tensor] | None = {} if self._keeps else None
        self._refinements: dict[bytes, list[Tensor]] = {}
        self._stages = 1

    @property
    def _keeps(self) -> bool:
        return vars(self.quantization_config)["keep_compressed"]

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the model's config before any weights are looked for: which stages are wanted."""
        self._choose_stages(config)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same for transformers <= 5.20."""
        self._choose_stages(config)
        return config

    def _choose_stages(self, config: Any) -> None:
        """
        Raises:
            OptionError: there are not so many stages, or layers cannot stay compressed.
        """
        from miracle_hub.codec.naming import index_name
        from miracle_hub.codec.repository import check_stages

        digests = vars(self.quantization_config).get("stage_digests")
        if not isinstance(digests, list):
            return
        self._stages = check_stages(getattr(config, "stages", None), len(digests), "from_pretrained")
        if self._keeps and self._stages > 1:
            raise OptionError(
                f"keep_compressed: expected a repository of one stage, found {self._stages}, which are added "
                "in dense weights; pass stages=1, or load a dense model"
            )
        if self._stages < len(digests):
            config.transformers_weights = index_name(self._stages, len(digests))

    def _digest(self) -> str | None:
        facts = vars(self.quantization_config)
        digests = facts.get("stage_digests")
        return digests[self._stages - 1] if isinstance(digests, list) else facts["digest"]

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Take note of the dtype asked for; it stays what it is."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", *args: Any, **kwargs: Any
    ) -> "PreTrainedModel":
        """Check the backend, and every payload's checksum and header, before anything is allocated.

        Raises:
            BackendError: the backend cannot run here.
            FormatError: and its subclasses: a file is not sound.
        """
        from miracle_hub.coding.backend import choose
        from miracle_hub.plugin.conversion import expected_tensors

        if vars(self.quantization_config)["backend"] == "triton":
            choose("triton")
        # transformers builds the model, and calls this, under `torch.device("meta")`.
        with torch.device("cpu"):
            files = kwargs.get("checkpoint_files") or []
            self._stored = _check_payloads(files, self._digest())
            self._refinements = _take_refinements(self._stored, files)
        self._model = model
        self._expected = expected_tensors(model, self._dtype)
        return model

    def update_weight_conversions(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, weight_conversions: list, *args: Any
    ) -> list:
        """The model's own converters with decoding in front, and one for all other names.

        Layers are replaced here and not before: only these conversions, a user's `key_mapping` among
        them, say which layer a name of the checkpoint means.
        """
        from miracle_hub.plugin.conversion import expected_tensors, replace_layers, with_decoding

        model, config = self._model, vars(self.quantization_config)
        if self._keeps and model is not None:
            skipped, backend = config["modules_to_not_convert"] or [], config["backend"]
            added = replace_layers(model, self._stored, weight_conversions, self._expected, skipped, backend)
            weight_conversions = [*weight_conversions, *added]
            self._expected = expected_tensors(model, self._dtype)
        self._conversions = with_decoding(
            weight_conversions, self._expected, config["backend"], self._payloads, self._refinements
        )
        return self._conversions

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        """Take decoding out of the converters again: save_pretrained reverses those that are left.

        Raises:
            FormatError: and its subclasses: a payload that was left over cannot be decoded.
        """
        from miracle_hub.plugin.conversion import decode_leftovers, without_decoding

        # In place: transformers goes on using its list when it loads an adapter after the model.
        self._conversions[:] = without_decoding(self._conversions)
        used = getattr(model, "_weight_conversions", None)
        if used is not None:
            model._weight_conversions = without_decoding(used)  # pyright: ignore[reportArgumentType]
        backend = vars(self.quantization_config)["backend"]
        decode_leftovers(model, self._expected, backend, self._refinements)
        self._model, self._stored, self._refinements = None, [], {}
        for name in ("stages", "transformers_weights"):
            if isinstance(vars(self.quantization_config).get("stage_digests"), list):
                vars(model.config).pop(name, None)
        if self._keeps:
            from miracle_hub.plugin.compressed_linear import compressed_layers

            for layer in compressed_layers(model).values():
                layer.finish_loading()
        return model

    def get_state_dict_and_metadata(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, Tensor] | None, dict]:
        """What save_pretrained writes: a compressed model's payloads, under the names of their weights."""
        if not self._keeps:
            return None, {}
        from transformers.core_model_loading import revert_weight_conversion

        from miracle_hub.codec.payloads import is_payload
        from miracle_hub.plugin.compressed_linear import saved_digest, saved_state

        state = saved_state(model, self._payloads or {})
        payloads = {name: tensor for name, tensor in state.items() if is_payload(tensor)}
        # Which of two sets of names is written is for the caller of save_pretrained to say, not to us:
        # where they differ the repository does without a digest of all payloads.
        plain = revert_weight_conversion(model, dict(payloads)).keys() == payloads.keys()
        vars(self.quantization_config)["digest"] = saved_digest(payloads) if plain else None
        return state, {}

    def _dequantize(self, model: "PreTrainedModel", *args: Any, **kwargs: Any) -> "PreTrainedModel":
        """Ordinary layers for compressed ones; another dtype than the model's casts it all."""
        from miracle_hub.plugin.compressed_linear import make_ordinary

        make_ordinary(model)
        for module in model.modules():
            vars(getattr(module, "config", None) or SimpleNamespace()).pop("_is_quantized", None)
        dtype = next(iter(args), kwargs.get("dtype"))
        return model if dtype in (None, model.config.dtype) else model.to(dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


def _check_figures(figures: dict[str, Any]) -> None:
    if taken := sorted(set(figures) & set(dir(MiracleConfig))):
        raise OptionError(
            f"MiracleConfig: expected figures and options, found {taken[0]!r}, the name of a method; "
            "config.json is hostile or damaged: download it again"
        )


def _check_options(keep_compressed: Any, backend: Any, modules_to_not_convert: Any) -> None:
    try:
        LoadOptions(
            keep_compressed=keep_compressed, backend=backend, modules_to_not_convert=modules_to_not_convert
        )
    except OptionError as error:
        raise OptionError(f"MiracleConfig: {error}") from None


def _check_payloads(files: list[str], digest: str | None) -> "list[StoredTensor]":
    """What can be checked without decoding; a lost payload would otherwise become random weights.

    Returns:
        All tensors of the files.

    Raises:
        FormatError: and its subclasses: a file is not sound; the message names the tensor.
    """
    from miracle_hub.codec.repository import check_digest
    from miracle_hub.codec.stored import stored_in

    tensors = stored_in(Path(file) for file in files)
    if files:
        check_digest(tensors, digest, str(Path(files[0]).parent))
    return tensors


def _take_refinements(tensors: "list[StoredTensor]", files: list[str]) -> dict[bytes, list[Tensor]]:
    """The payloads of later stages; `files` loses theirs, whose entries are no tensors of the model.

    Raises:
        FormatError: two payloads are alike, but are refined differently.
    """
    from miracle_hub.codec.naming import stage_of
    from miracle_hub.plugin.conversion import payload_key

    found: dict[bytes, list[Tensor]] = {}
    for tensor in tensors:
        if len(tensor.parts) > 1:
            first, *later = (part.load() for part in tensor.parts)
            key = payload_key(first)
            if key in found and not all(map(torch.equal, found[key], later)):
                raise FormatError(
                    f"{tensor.name}: expected a payload unlike all others, found one that is refined "
                    "in two ways; load it with stages=1, or decompress the folder (miracle decompress)"
                )
            found[key] = later
    files[:] = [file for file in files if stage_of(Path(file)) == 1]
    return found


def register() -> None:
    """Make transformers know the method; safe to call twice."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MiracleConfig)
        # Only these classes may change how a repository is loaded.
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (MiracleConfig,)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(MiracleQuantizer)


register()
