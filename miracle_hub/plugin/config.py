"""`MiracleConfig`: the quantization_config of a repository, and what a user wants of loading or of training.

This module is imported by everybody who imports transformers, in the middle of that import.
"""

import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from miracle_hub.code import FORMAT_VERSION, QUANT_METHOD, check_format_version
from miracle_hub.errors import OptionError
from miracle_hub.names import offer
from miracle_hub.options import LoadOptions

if TYPE_CHECKING:
    from miracle_hub.training.config import VariationalConfig

# What a reader chooses, not what a repository is: never written to config.json.
_LOADING_OPTIONS = ("keep_compressed", "backend", "base")


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
        base: str | Path | None = None,
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
            base: folder or Hub id of the base, of a repository that is a difference to one; by default the
                one it names. For `make_variational`, the model to which one becomes a difference.
            figures: others of config.json; for `make_variational`, the options of
                `training.config.VariationalConfig`: bits_per_weight or size (of whole files), rate or
                message_bits, target_modules, exclude_modules, modules_to_save, parametrization, streams,
                code, window_bits, sharing, seed, …

        Raises:
            UnsupportedVersionError: the repository is newer than this package.
            OptionError: an option is none.
        """
        check_format_version(format_version, "config.json")
        figures.pop("dequantize", None)
        _check_figures(figures)
        vars(self).update(figures)
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.digest = digest
        self.modules_to_not_convert = modules_to_not_convert
        self.keep_compressed = keep_compressed
        self.backend = backend
        self.base = base
        _check_options(keep_compressed, backend, modules_to_not_convert)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The config of a repository, which says nothing of what its reader chooses.

        Raises:
            OptionError: `modules_to_not_convert` is no list; a stranger's regular expression may not end.
        """
        names = config_dict.get("modules_to_not_convert")
        if isinstance(names, str):
            raise OptionError(
                f"config.json: modules_to_not_convert: expected a list of names, found {names!r}; the file "
                "is hostile or damaged: download it again"
            )
        stated = {name: value for name, value in config_dict.items() if name != "base"}  # a stranger's path
        return super().from_dict(stated, *args, **kwargs)

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
                f"{unknown[0]!r}; check the spelling ({offer(unknown[0], sorted(known))})"
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
        """As config.json has it: a regular expression is its reader's choice, and no other reader runs it."""
        values = super().to_dict()
        if isinstance(self.modules_to_not_convert, str):
            values["modules_to_not_convert"] = None
        return {name: value for name, value in values.items() if name not in _LOADING_OPTIONS}


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
