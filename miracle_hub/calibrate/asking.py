"""Knowledge that is gathered when a compression first asks for it: by then the source has been checked."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from miracle_hub.calibrate.asked import is_self
from miracle_hub.calibrate.estimate import estimated, require_memory
from miracle_hub.calibrate.judge import Judge, tensors_of
from miracle_hub.calibrate.known import Known
from miracle_hub.calibrate.recipe import knowledge_of
from miracle_hub.codec.config import read_config
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.kept import Kept
from miracle_hub.codec.plan import Plan
from miracle_hub.codec.report import CALIBRATION_LOGGER
from miracle_hub.codec.source import SourceTensor, list_tensors, weight_files
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.errors import CalibrationError, MiracleError
from miracle_hub.options import CompressOptions
from miracle_hub.plugin.roles import roles_of

_LOGGER = logging.getLogger(CALIBRATION_LOGGER)


class Asking:
    """See `codec.knowledge.Knowledge`; where nothing can be known it knows nothing, and says why.

    Attributes:
        known: None before anybody asked, and where nothing can be known.
        why: nothing can be known; empty if something is.
        undone: why nothing was refitted, though that was asked for.
        unseen: names of tensors to be coded that no answer depends on.
    """

    def __init__(
        self,
        folder: Path,
        options: CompressOptions,
        model: nn.Module | None = None,
        kept: Kept | None = None,
        base: Path | None = None,
    ) -> None:
        self.base = base
        self.folder, self.options, self.model, self.kept = folder, options, model, kept or Kept()
        self.known: Known | None = None
        self.judge: Judge | None = None
        self.why, self.undone, self.unseen = "", "", list[str]()
        self._is_asked = False

    @property
    def is_optional(self) -> bool:
        """Whether nobody gave anything to calibrate on: then a failure is no error."""
        return is_self(self.options.calibrate) and self.model is None

    def curvature(self, source: SourceTensor) -> Curvature | None:
        """Of the model's answers; gathers all that can be known first.

        Raises:
            CalibrationError, DataError: data were given, or a model, and it does not run on them.
        """
        if not self._is_asked:
            self._is_asked = True
            self._ask()
        if self.known is None:
            return None
        found = self.known.curvature(source)
        # Vectors are coded as differences to a base alone, and are not watched.
        if found is None and len(source.shape) > 1:
            self.unseen.append(source.name)
        return found

    def without(self, name: str, base: Tensor) -> float | None:
        """How far answers are where a tensor is its base's."""
        return None if self.known is None else self.known.without(name, base)

    def is_estimated(self, name: str) -> bool:
        """Whether it is a statistic of a batch norm."""
        return self.known is not None and self.known.is_estimated(name)

    def is_tuned(self, name: str) -> bool:
        """Whether it is a parameter that may be tuned."""
        return self.known is not None and self.known.is_tuned(name)

    def encode(self, plans: Mapping[str, Plan], jobs: Sequence[Job], backend: Backend) -> Mapping[str, bytes]:
        """What refits made of the jobs.

        Raises:
            CalibrationError: they failed, on what was given.
        """
        if self.known is None:
            return {}
        try:
            with self._named_failures():
                return self.known.encode(plans, jobs, backend)
        except CalibrationError as error:
            if not self.is_optional:
                raise
            self.undone = str(error)
            warnings.warn(f"compressed without refits: {error}", stacklevel=2)
            return {}

    def plain(self, source: SourceTensor) -> Tensor | None:
        """What tuning made of it."""
        return None if self.known is None else self.known.plain(source)

    def _ask(self) -> None:
        """
        Raises:
            CalibrationError, DataError: see `curvature`.
        """
        try:
            tensors = list_tensors(weight_files(self.folder))
            how = (self.options.effort, read_config(self.folder), is_self(self.options.calibrate))
            estimate = estimated(tensors, *how)
            _LOGGER.info("%s: calibration with effort %d: %s", self.folder, self.options.effort, estimate)
            if self.is_optional:
                require_memory(estimate)
            with self._named_failures():
                self.known = self._gathered(tensors)
        except CalibrationError as error:
            if not self.is_optional:
                raise
            self.known, self.why = None, str(error)
            warnings.warn(f"compressed without calibration: {error}", stacklevel=2)

    def _gathered(self, tensors: Sequence[SourceTensor]) -> Known:
        """
        Raises:
            CalibrationError, DataError: see `curvature`.
        """
        options, model = self.options, None if self.model is None else _copied(self.model, tensors)
        if options.stages > 1 and options.effort:
            self.undone = "stages above the first add what is left of the source's own weights"
        effort, seed = 0 if self.undone else options.effort, options.seed % 2**32
        given = {"effort": effort, "seed": seed, "model": model, "progress": options.progress}
        given |= {"kept": self.kept, "device": choose(options.backend).device}
        known = knowledge_of(self.folder, options.calibrate, **given)
        if options.stages > 1:  # statistics would suit the first alone
            known.norms = None
        names: Mapping[str, str] = {}
        if model is None:  # transformers may give tensors other names than files have
            roles = roles_of(self.folder)
            names = roles.names
            _require_same(
                known.model, [tensor for tensor in tensors if tensor.name in roles.parameters], names
            )
        known.call(names)
        self.judge = Judge(known.model, known.held_out, names, self.base)
        return known

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Models of all kinds are run, by code that nobody here has seen, on what users give.

        Raises:
            CalibrationError: it failed.
        """
        try:
            yield
        except MiracleError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            todo = "report it" if is_self(self.options.calibrate) else "look at the data, or else report it"
            raise CalibrationError(
                f"{self.folder}: expected a model that runs there and back on all inputs, found "
                f"{type(error).__name__}: {said}; {todo}, and compress without calibration (--calibrate none)"
            ) from error


@torch.no_grad()
def _copied(model: nn.Module, tensors: Sequence[SourceTensor]) -> nn.Module:
    """A user's model with the weights of the files: theirs stays as it is.

    Raises:
        CalibrationError: it has other tensors.
    """
    own = copy.deepcopy(model).cpu().float().eval()
    _require_names(own, tensors)
    found = tensors_of(own)
    for tensor in tensors:
        found[tensor.name].data.copy_(tensor.load())
    for parameter in own.parameters():  # matrices are views of them, which channels_last would not have
        parameter.data = parameter.data.contiguous()
    return own


def _require_names(
    model: nn.Module, tensors: Sequence[SourceTensor], names: Mapping[str, str] | None = None
) -> None:
    """
    Args:
        names: the model's, of tensors that files call otherwise.

    Raises:
        CalibrationError: a tensor of the files is none of the model's.
    """
    own = tensors_of(model)
    for tensor in tensors:
        name = (names or {}).get(tensor.name, tensor.name)
        found = own.get(name)
        if found is None or tuple(found.shape) != tensor.shape:
            what = "none of that name" if found is None else f"{name} {list(found.shape)}"
            raise CalibrationError(
                f"{tensor.path}: expected {tensor.name} {list(tensor.shape)} among the tensors of "
                f"{type(model).__name__}, found {what}, so that the two cannot be compared; compress without "
                "calibration (--calibrate none), or give as model one that has these tensors"
            )


def _require_same(model: nn.Module, tensors: Sequence[SourceTensor], names: Mapping[str, str]) -> None:
    """Tensors of files are the model's, and those that it calls otherwise have the same values in it.

    Raises:
        CalibrationError: one is not.
    """
    _require_names(model, tensors, names)
    own = tensors_of(model)
    for tensor in tensors:
        name = names.get(tensor.name, tensor.name)
        if name != tensor.name and not torch.equal(own[name].cpu(), tensor.load().to(own[name].dtype)):
            raise CalibrationError(
                f"{tensor.path}: expected in {name} of {type(model).__name__} the values of {tensor.name}, "
                "found others; compress without calibration (--calibrate none)"
            )
