"""One load of a compressed repository by transformers: opened, converted, finished, and saved again."""

import logging
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from torch import Tensor
from transformers.core_model_loading import WeightTransform, revert_weight_conversion

from miracle_hub.codec.base import given_base
from miracle_hub.codec.based import compared, with_base
from miracle_hub.codec.config import digests_of, read_config
from miracle_hub.codec.guarded import check_config
from miracle_hub.codec.inherited import INHERITED, are_plain, is_inherited
from miracle_hub.codec.naming import CONFIG, SINGLE, index_name, stage_of
from miracle_hub.codec.parts import stated_dtype
from miracle_hub.codec.payloads import is_payload
from miracle_hub.codec.repository import check_stages, open_repository, sound_tensors
from miracle_hub.codec.source import indexed_files
from miracle_hub.codec.stored import StoredTensor
from miracle_hub.coding.backend import choose
from miracle_hub.errors import OptionError
from miracle_hub.names import check_taken
from miracle_hub.plugin.compressed_linear import allow_casts, compressed_layers, saved_digest, saved_state
from miracle_hub.plugin.config import MiracleConfig
from miracle_hub.plugin.conversion import decode_leftovers, replace_layers, with_decoding, without_decoding
from miracle_hub.plugin.decoder import Decoder, expected_tensors
from miracle_hub.plugin.facts import forget_facts, repeat_facts
from miracle_hub.plugin.stand_ins import write_stand_ins

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_LOG = logging.getLogger(__name__)


_NAMES = "modules_to_not_convert"


def _nothing() -> None:
    """There are no stand-ins."""


class Loading:
    """What a load knows, in the order in which transformers asks.

    Attributes:
        dtype: that the model is loaded in.
    """

    def __init__(self, config: MiracleConfig) -> None:
        """
        Raises:
            FormatError: the config's digests are none.
        """
        self.config, self.dtype = config, torch.float32
        self._facts = vars(config)
        self._decoder = Decoder(config.backend, {} if config.keep_compressed else None)
        self._digests = digests_of(self._facts, Path(CONFIG))
        self._stages = 1
        self._model: PreTrainedModel | None = None
        self._remove_stand_ins: Callable[[], object] = _nothing
        self._stored: list[StoredTensor] = []
        self._conversions: list[WeightTransform] = []

    def prepare(self, config: Any) -> None:
        """What the config of the model, or of the part that is loaded, leaves open: its dtype, where nobody
        states one, and which stages it wants, and so which files are looked for.

        Raises:
            OptionError: there are not so many stages, or layers cannot stay compressed.
            ChecksumError: config.json is not as it was written.
        """
        name = getattr(config, "_name_or_path", "")  # a part has none; of a Hub id files tell the folder
        if name and (path := Path(str(name)) / CONFIG).is_file():
            if is_inherited(path.parent):
                return
            check_config(path, read_config(path.parent))
        if getattr(config, "dtype", None) is None:
            # transformers would take that of the first plain tensor, which may be narrowed.
            config.dtype = stated_dtype(self._facts, Path(CONFIG))
        if "stage_digests" in self._facts:
            self._choose_stages(config)

    def _choose_stages(self, config: Any) -> None:
        n_stages = len(self._digests)
        self._stages = check_stages(getattr(config, "stages", None), n_stages, "from_pretrained")
        if self.config.keep_compressed and self._stages > 1:
            raise OptionError(
                f"keep_compressed: expected a repository of one stage, found {self._stages}, which are added "
                "in dense weights; pass stages=1, or load a dense model"
            )
        if self._stages < n_stages:
            config.transformers_weights = index_name(self._stages, n_stages)

    def open(self, model: "PreTrainedModel", files: list[str]) -> None:
        """Check the backend, and what the files hold; a lost payload would otherwise become random weights.

        Args:
            files: of the checkpoint; those of later stages, whose entries are no tensors of the model, are
                taken out.

        Raises:
            BackendError: the backend cannot run here.
            OptionError: a name in `modules_to_not_convert` takes nothing of the model.
            FormatError: and its subclasses: a file is not sound; the message names the tensor.
        """
        if self.config.backend == "triton":
            choose("triton")
        paths = [Path(file) for file in files]
        if paths and are_plain(paths):
            _LOG.warning("%s: %s", paths[0].parent, INHERITED)
            self.config.keep_compressed = False
        elif paths:
            folder, digest = paths[0].parent, self._digests[self._stages - 1]
            check_config(folder / CONFIG, facts := read_config(folder))
            self._check_names(model, facts.get("quantization_config"))
            own = sound_tensors(paths, digest, self._stages, self._index(paths))
            self._stored = self._based(own, facts.get("quantization_config") or {}, folder)
        if any(tensor.base is not None for tensor in self._stored):
            files[:] = [self._stand_ins()]
        self._decoder.take_refinements(self._stored)
        files[:] = [file for file in files if stage_of(Path(file)) == 1]
        self._model = model
        self._decoder.expected = expected_tensors(model, self.dtype)

    def _based(self, own: list[StoredTensor], facts: dict[str, Any], folder: Path) -> list[StoredTensor]:
        """The tensors of a repository with those of its base.

        Raises:
            BaseModelError: the base is missing, or another. OptionError: layers were to stay compressed.
        """
        given = given_base(self.config.base)
        found = with_base(own, facts, folder, lambda base: open_repository(base).tensors, given)
        if self.config.keep_compressed and any(tensor.base is not None for tensor in found):
            raise OptionError(
                f"keep_compressed: expected a repository that is a model by itself, found {folder}, which "
                "is a difference to a base, and is added to it in dense weights; load a dense model"
            )
        return compared(found)

    def _stand_ins(self) -> str:
        """A file in place of the checkpoint's, as long as the load takes."""
        folder = mkdtemp(prefix="miracle-")
        self._remove_stand_ins = finalize(self, rmtree, folder, ignore_errors=True)  # also if the load fails
        path = Path(folder) / SINGLE
        write_stand_ins(self._stored, path)
        self._decoder.take_standing(self._stored)
        return str(path)

    def _check_names(self, model: "PreTrainedModel", written: Any) -> None:
        """Refuse a reader's names that take nothing; those in config.json are of all that was compressed.

        Raises:
            OptionError: one does.
        """
        names = self.config.modules_to_not_convert
        if names is not None and not (isinstance(written, dict) and names == written.get(_NAMES)):
            held = (model.named_modules, model.named_parameters)
            found = [name for named in held for name, _ in named(remove_duplicate=False) if name]
            check_taken(names, found, _NAMES, type(model).__name__)

    def _index(self, files: list[Path]) -> Path | None:
        """That names these files, if one does: those of a variant have another."""
        index = files[0].parent / index_name(self._stages, len(self._digests))
        names_them = index.is_file() and set(indexed_files(index.parent, index)) == set(files)
        return index if names_them and files[0].name != SINGLE else None

    def convert(self, conversions: list[WeightTransform]) -> list[WeightTransform]:
        """The model's own converters with decoding in front, and one for all other names.

        Layers are replaced here and not before: only these conversions, a user's `key_mapping` among them,
        say which layer a name of the checkpoint means.
        """
        if self.config.keep_compressed and self._model is not None:
            skipped = self.config.modules_to_not_convert or []
            added = replace_layers(self._model, self._stored, conversions, self._decoder, skipped)
            conversions = [*conversions, *added]
            self._decoder.expected = expected_tensors(self._model, self.dtype)
        self._conversions = with_decoding(conversions, self._decoder)
        return self._conversions

    def finish(self, model: "PreTrainedModel") -> None:
        """Leave a model as if its checkpoint had been dense, but for layers that stay compressed.

        Raises:
            FormatError: and its subclasses: a payload that was left over cannot be decoded.
        """
        # In place: transformers goes on using its list when it loads an adapter after the model.
        self._conversions[:] = without_decoding(self._conversions)
        used = getattr(model, "_weight_conversions", None)
        if used is not None:
            model._weight_conversions = without_decoding(used)  # pyright: ignore[reportArgumentType]
        decode_leftovers(model, self._decoder)
        self._decoder.warn_of_overflow()
        self._model, self._stored = None, []
        self._remove_stand_ins()
        self._remove_stand_ins = _nothing  # a finalizer cannot be pickled
        self._decoder.forget()
        is_staged = "stage_digests" in self._facts
        forget_facts(model, is_kept=self.config.keep_compressed, is_staged=is_staged)
        if self.config.keep_compressed:
            allow_casts(model)
            for layer in compressed_layers(model).values():
                layer.finish_loading()

    def saved(self, model: "PreTrainedModel") -> dict[str, Tensor] | None:
        """What save_pretrained writes of a model whose layers are compressed; None for a dense one."""
        if not self.config.keep_compressed:
            return None
        state = saved_state(model, self._decoder.kept or {})
        payloads = {name: tensor for name, tensor in state.items() if is_payload(tensor)}
        # Which of two sets of names is written is for the caller of save_pretrained to say, not to us:
        # where they differ the repository does without a digest of all payloads.
        plain = revert_weight_conversion(model, dict(payloads)).keys() == payloads.keys()
        self._facts["digest"] = saved_digest(payloads) if plain else None
        for name in ("guard", "stage_digests"):  # transformers writes the files, without guards, in one stage
            self._facts.pop(name, None)
        repeat_facts(model, self._facts)
        return state
