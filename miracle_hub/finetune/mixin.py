"""`MiracleHubMixin`: small networks that are pushed and loaded in the manner of PyTorchModelHubMixin."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, PyTorchModelHubMixin
from huggingface_hub.utils import filter_repo_objects
from torch import nn

from miracle_hub.codec.config import read_config
from miracle_hub.codec.guard import GUARD, with_own_guard
from miracle_hub.codec.guarded import check_own_guard
from miracle_hub.codec.modules import load, stream_header
from miracle_hub.codec.naming import CARD, CONFIG, variant_name
from miracle_hub.errors import MissingWeightsError
from miracle_hub.files.digests import sha256_of
from miracle_hub.files.folders import visible_files
from miracle_hub.files.snapshots import snapshot
from miracle_hub.finetune.models import save
from miracle_hub.hub.card import PLACEHOLDER, carried_facts, update_card
from miracle_hub.hub.facts import facts_of_network
from miracle_hub.hub.push import upload
from miracle_hub.training import convert

_VARIANT = "_miracle_variant"  # of the instance that is being saved


class MiracleHubMixin(PyTorchModelHubMixin):
    """For `class Net(nn.Module, MiracleHubMixin)`: a coded network saves as one small file and loads from it.

    `save_pretrained` and `push_to_hub` need a network that `make_variational` and `code_model` went over;
    `from_pretrained` gives an ordinary dense one. Arguments of `__init__` go through config.json, as in
    huggingface_hub. Several files of one network (`variant`) and several networks (`subfolder`) fit into one
    repository, as in transformers.
    """

    def save_pretrained(
        self, save_directory: str | Path, *, variant: str | None = None, **options: Any
    ) -> Any:
        """Write config.json, a card of measured facts and model.safetensors, or model.<variant>.safetensors.

        Args:
            options: those of `huggingface_hub.ModelHubMixin.save_pretrained`.

        Raises:
            OptionError: the network is not coded.
            ChecksumError: what was written does not decode to the network's weights.
        """
        folder = Path(save_directory)
        is_own_card = variant is None or not (folder / CARD).exists()
        if options.get("push_to_hub"):
            options["variant"] = variant
        config = options.pop("config", None)
        vars(self)[_VARIANT] = variant
        try:
            config = _guarded(self._hub_mixin_config if config is None else config)
            done = super().save_pretrained(folder, config=config, **options)
        finally:
            vars(self).pop(_VARIANT, None)  # a push has saved, and removed it, a second time
        if is_own_card:
            self._write_facts(folder, variant, options.get("repo_id") or "")
        return done

    def _save_pretrained(self, save_directory: Path) -> None:
        """
        Raises:
            OptionError: the network is not coded.
        """
        assert isinstance(self, nn.Module)
        save(self, save_directory / variant_name(vars(self)[_VARIANT]))

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        repo_id: str,
        *,
        config: Any = None,
        commit_message: str = "Push with miracle-hub",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        subfolder: str = "",
        variant: str | None = None,
    ) -> CommitInfo:
        """Save, read back, compare with this network, upload, and compare what the Hub then holds.

        Args:
            subfolder: of the repository, to write to.
            variant: of the file's name; a card that the repository has is left as it is.

        Raises:
            OptionError: the network is not coded.
            ChecksumError: what was written does not decode to the network's weights; nothing was uploaded.
            UploadError: the Hub did not take it. RemoteMismatchError: what it holds differs.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder, config=config, model_card_kwargs=model_card_kwargs, variant=variant)
            self._write_facts(folder, variant, repo_id)
            names = [path.relative_to(folder).as_posix() for path in visible_files(folder)]
            chosen = filter_repo_objects(
                names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
            return upload(
                folder, repo_id, {name: sha256_of(folder / name) for name in chosen}, private=private,
                revision=branch, token=token, message=commit_message, path_in_repo=subfolder,
                keep_card=variant is not None, create_pr=create_pr, delete_patterns=delete_patterns,
            )  # fmt: skip

    def _write_facts(self, folder: Path, variant: str | None, repo_id: str) -> None:
        """The measured section of the folder's card."""
        assert isinstance(self, nn.Module)
        path, dense = folder / variant_name(variant), convert.posterior_mean(self)
        n_weights = sum(parameter.numel() for parameter in dense.parameters())
        facts = carried_facts(folder, facts_of_network(path, stream_header(path, dense), n_weights))
        name, more = type(dense).__name__, f', variant="{variant}"' if variant else ""
        call = f'{name}.from_pretrained("{repo_id or PLACEHOLDER}"{more})'
        usage = f"model = {call}  # class {name}(nn.Module, MiracleHubMixin)"
        update_card(folder, facts, name=name, repo_id=repo_id, usage=usage)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        subfolder: str = "",
        variant: str | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The network of a folder or a Hub repository, dense, in evaluation mode.

        Args:
            subfolder: that holds config.json and the weights.
            variant: load model.<variant>.safetensors.
            model_kwargs: arguments of `__init__`, before those of config.json; `map_location`, the device.

        Raises:
            SourceError: there is no such folder or repository. MissingWeightsError: it has no such file.
            FormatError: and its subclasses: the file, or config.json, is not sound, or is that of another
                module.
        """
        source, name = Path(pretrained_model_name_or_path), variant_name(variant)
        if not source.is_dir():
            prefix = f"{subfolder}/" if subfolder else ""
            source = snapshot(
                str(pretrained_model_name_or_path), revision=revision, cache_dir=cache_dir, token=token,
                force_download=force_download, local_files_only=local_files_only,
                allow_patterns=[f"{prefix}{CONFIG}", f"{prefix}{name}"],
            )  # fmt: skip
        if not (source / subfolder / name).is_file():
            raise MissingWeightsError(
                f"{pretrained_model_name_or_path}: expected {(Path(subfolder) / name).as_posix()}, found "
                "no such file; check subfolder and variant, or save the network there"
            )
        check_own_guard(source / subfolder / CONFIG, read_config(source / subfolder))
        return super().from_pretrained(source / subfolder, miracle_weights_name=name, **model_kwargs)

    @classmethod
    def _from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        miracle_weights_name: str,
        map_location: str = "cpu",
        strict: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """`model_id` is a folder by now.

        Raises:
            FormatError: and its subclasses: the file is not sound, or is that of another module.
        """
        model = cls(**_without_guard(model_kwargs))
        assert isinstance(model, nn.Module)
        return load(Path(model_id) / miracle_weights_name, model).to(map_location).eval()


def _guarded(config: Any) -> dict[str, Any] | None:
    """A network's config.json with its guard; None where it has none.

    Args:
        config: a dictionary of JSON, or a dataclass, as huggingface_hub takes them.
    """
    if config is None:
        return None
    return with_own_guard(config if isinstance(config, dict) else asdict(config))


def _without_guard(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `__init__`, which gets all of config.json if it takes **kwargs or `config`."""
    own = {name: value for name, value in arguments.items() if name != GUARD}
    if isinstance(config := own.get("config"), dict):
        own["config"] = {name: value for name, value in config.items() if name != GUARD}
    return own
