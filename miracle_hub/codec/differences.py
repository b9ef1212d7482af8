"""What of a model is a difference to its base, and what is the base's: plans, and what is stated of it."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from miracle_hub.codec.aligned import cost
from miracle_hub.codec.base import Base, named_base
from miracle_hub.codec.based import Read, tensors_of_base
from miracle_hub.codec.config import read_config
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.exact import exact_payload
from miracle_hub.codec.handed_out import left_by
from miracle_hub.codec.ladder import SIZE_EXPONENT
from miracle_hub.codec.naming import CONFIG
from miracle_hub.codec.plan import Coded, Exact, Plain, Plan, Ready, Same, Why
from miracle_hub.codec.rates import LEFT_OUT, Chosen, Curve, Option
from miracle_hub.codec.source import SourceTensor
from miracle_hub.codec.stored import StoredTensor, base_digest_of
from miracle_hub.codec.thin import THIN
from miracle_hub.errors import BudgetError, OptionError, SourceError
from miracle_hub.format.payload import DTYPES
from miracle_hub.format.spec import TensorSpec
from miracle_hub.options import CompressOptions

# Plain tensors that are differences where a base has them too.
_SMALL = (Why.SHORT_VECTOR, Why.SMALL)
# Of a payload and of its entry in a file's header, beside the name; measured on MiniLM.
_ENTRY_BYTES = 130
# A file with one small tensor.
_LEAST_BYTES = 1000
# Of the square of the weights: a choice; fine-tunes have a hundredth or less.
_FAR = 0.5
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass
class Differences:
    """The base of a compression.

    Attributes:
        found: its tensors, by its own names.
        base: what is to be stated of it.
        relative: squared differences over squared weights, of the tensors that differ.
        squares: of all differences, and of the weights of these tensors.
    """

    folder: Path
    found: Mapping[str, StoredTensor]
    base: Base
    relative: dict[str, float] = field(default_factory=dict)
    squares: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, source: Path, folder: Path, tensors: Sequence[TensorSpec], read: Read) -> "Differences":
        """Of the tensors of a model in a folder to those of a base in another.

        Raises:
            BaseModelError: it cannot be read.
            SourceError: it is of another type, or has no tensor of the model.
        """
        _require_same_type(source, folder)
        found = tensors_of_base(folder, read)
        base = Base(*named_base(folder), prefix=_prefix(tensors, found))
        result = cls(folder, found, base)
        if not any(result.theirs(tensor) for tensor in tensors):
            theirs, own = (", ".join([*names][:3]) for names in (sorted(found), (t.name for t in tensors)))
            raise SourceError(
                f"{folder}: expected a base with tensors of the names and shapes of the model's, found none "
                f"of them ({theirs}, … beside {own}, …); give the model that this one was made from, or "
                "compress without a base"
            )
        return result

    def theirs(self, tensor: TensorSpec) -> StoredTensor | None:
        """The base's tensor to which one of the model's may be a difference."""
        if not tensor.name.startswith(self.base.prefix[0]):
            return None
        theirs = self.found.get(self.base.name_in_base(tensor.name))
        if theirs is None or theirs.shape != tensor.shape:
            return None
        are_floating = theirs.dtype in DTYPES and tensor.dtype in DTYPES
        return theirs if are_floating or theirs.dtype == tensor.dtype else None

    def plan(self, plans: dict[str, Plan], are_coded: bool = True) -> None:
        """Replace plans of tensors that are the base's, or differ from it; others are coded by themselves.

        Every tensor is read, one at a time, and the base's with it.

        Args:
            are_coded: whether a size is left for differences; else there are only those that are ready.

        Raises:
            SourceError: there is no difference.
        """
        digests, dtypes = {}, {}
        for name, plan in plans.items():
            theirs = self.theirs(plan.source)
            if theirs is None:
                continue
            based, digest, is_same = self._compared(plan.source, theirs)
            if is_same:
                plans[name] = Same(plan.source)
                dtypes |= {name: plan.source.dtype} if plan.source.dtype != theirs.dtype else {}
            elif are_coded and _may_differ(plan):
                plans[name] = Coded(plan.source, based)
            elif not isinstance(plan, Ready):  # of which training made the difference
                continue
            digests[name] = digest
        self.base = replace(self.base, digests=digests, dtypes=dtypes)
        if not any(isinstance(plan, Ready) for plan in plans.values()):
            _make_loud(plans)
        if all(isinstance(plan, Same) for plan in plans.values()):
            raise SourceError(
                f"{self.folder}: expected a model that differs from its base, found the same tensors in "
                "both; share the base itself"
            )

    def _compared(self, source: SourceTensor, theirs: StoredTensor) -> tuple[StoredTensor, str, bool]:
        """The base's tensor under the model's name, its digest, and whether the model's is the same."""
        own, base = source.load(), theirs.load().cpu()
        digest = base_digest_of(base)
        based = StoredTensor(source.name, source.dtype, source.shape, (), base=theirs, base_digest=digest)
        cast = base.to(TORCH_DTYPES.get(source.dtype, base.dtype))
        if _same_bits(own, cast):
            return based, digest, True
        if own.is_floating_point():
            power = float(own.double().square().sum())
            difference = float((own.double() - base.double()).square().sum())
            self.relative[source.name] = difference / power if power else 1.0
            self.squares = (self.squares[0] + difference, self.squares[1] + power)
        return based, digest, False

    def notes(self, source: Path, is_lossless: bool = False) -> tuple[str, ...]:
        """What else to know of a difference.

        Args:
            source: the model's folder.
            is_lossless: nothing comes closer.
        """
        found = []
        difference, power = self.squares
        if difference > _FAR * power and not is_lossless:
            found.append(
                f"the difference to the base is large: its square has {difference / power:.0%} of the "
                "model's own; compressed without a base, the same bytes may come closer"
            )
        if others := [name for name in _TOKENIZERS if _is_another(source / name, self.folder / name)]:
            found.append(f"other than the base's, and stored whole: {', '.join(others)}")
        return tuple(found)

    def leave_out(self, plans: dict[str, Plan], choices: Mapping[str, Chosen]) -> None:
        """Tensors whose differences are not worth their bytes are the base's; what is kept exact is not.

        Raises:
            BudgetError: then nothing would be stored at all.
        """
        names = sorted(name for name, choice in choices.items() if choice.option.codec == LEFT_OUT)
        coded = {name: plan for name in names if isinstance(plan := plans[name], Coded)}
        plans |= {name: Same(plan.source, plan.based) for name, plan in coded.items()}
        casts = {
            name: plans[name].source.dtype
            for name in names
            if plans[name].source.dtype != self.found[self.base.name_in_base(name)].dtype
        }
        if all(isinstance(plan, Same | Plain) for plan in plans.values()):
            raise BudgetError(
                f"size: expected one at which something of the difference to {self.folder} is stored, found "
                f"less than its least tensor takes; ask for {_LEAST_BYTES} bytes or more"
            )
        digests = {name: digest for name, digest in self.base.digests.items() if _is_of_base(plans[name])}
        dtypes = {**self.base.dtypes, **casts}
        self.base = replace(self.base, left_out=tuple(names), dtypes=dtypes, digests=digests)


def differences_of(
    source: Path, base: Path | None, plans: dict[str, Plan], options: CompressOptions, read: Read
) -> Differences | None:
    """What of the tensors to be stored is a difference to a base, in `plans` too; None if there is none.

    Raises:
        OptionError: there are stages besides.
        BaseModelError, SourceError: see `Differences`.
    """
    if base is None:
        return None
    if options.stages > 1:
        raise OptionError(
            f"stages: expected 1 with a base, found {options.stages}; leave out either stages or base"
        )
    if not (source / CONFIG).exists():
        raise SourceError(
            f"{source}: expected a config.json beside the weights, which states the base, found none; "
            "add one, or compress without a base"
        )
    found = Differences.of(source, base, [plan.source for plan in plans.values()], read)
    found.plan(plans, options.has_budget or options.exact)
    return found


def _make_loud(plans: dict[str, Plan]) -> None:
    """One of the plain tensors, if there are any, becomes a payload: who has no plug-in then gets a size
    mismatch, whatever else is stored, and no model of which most is random.
    """
    plain = [plan for plan in plans.values() if isinstance(plan, Plain)]
    for plan in sorted(plain, key=lambda plan: plan.source.n_bytes):
        if (payload := exact_payload(plan.source.load())) is not None:
            plans[plan.source.name] = Exact(plan.source, plan.why, payload)
            return


def _is_of_base(plan: Plan) -> bool:
    return isinstance(plan, Same | Ready) or (isinstance(plan, Coded) and plan.based is not None)


def _may_differ(plan: Plan) -> bool:
    return isinstance(plan, Coded) or (isinstance(plan, Plain) and plan.why in _SMALL)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))


def _is_another(own: Path, theirs: Path) -> bool:
    return own.is_file() and theirs.is_file() and own.read_bytes() != theirs.read_bytes()


def _require_same_type(source: Path, folder: Path) -> None:
    """
    Raises:
        SourceError: config.json of both name types of models, and others.
    """
    own, theirs = (read_config(path).get("model_type") for path in (source, folder))
    if own != theirs and own is not None and theirs is not None:
        raise SourceError(
            f"{folder}: expected a base of model_type {own!r}, as {source} is, found {theirs!r}; give the "
            "model that this one was made from, or compress without a base"
        )


def _prefix(tensors: Iterable[TensorSpec], found: Mapping[str, StoredTensor]) -> tuple[str, str]:
    """What names of the model begin with in place of what those of the base begin with.

    A model with a head has its encoder under a name of its own ("bert."), which one without has not.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    tried = Counter({("", ""): 0})
    tried.update((f"{name.partition('.')[0]}.", "") for name in shapes if "." in name)
    tried.update(("", f"{name.partition('.')[0]}.") for name in found if "." in name)

    def n_found(prefix: tuple[str, str]) -> int:
        base = Base("", "", prefix=prefix)
        own = [name for name in shapes if name.startswith(prefix[0])]
        theirs = ((shapes[name], found.get(base.name_in_base(name))) for name in own)
        return sum(tensor is not None and tensor.shape == shape for shape, tensor in theirs)

    return max(tried, key=n_found)


def differing(plan: Coded) -> Tensor:
    """What a tensor is coded as: its difference to the base, float32, or all of it."""
    weights = plan.source.load()
    return left_by([base.float()], weights) if (base := base_of(plan)) is not None else weights


def base_of(plan: Coded) -> Tensor | None:
    """The base's tensor to which one is a difference, in its own dtype."""
    return None if plan.based is None else plan.based.load_base()


def by_answers(
    curves: Sequence[Curve], coded: Mapping[str, Coded], without: Callable[[str, Tensor], float | None]
) -> list[Curve]:
    """Curves of differences with errors in nats: what having none of a tensor's difference costs is measured.

    Factors are then fitted to answers, and nothing is coded after them. What is not known, as of what no
    answer depends on, is worth what it would be without, over all others.

    Args:
        without: how far answers are where a tensor is its base's.
    """
    found = {c.name: own for c in curves if (own := _measured(coded[c.name], without))}
    ruled = sum(_most(curve) for curve in curves if curve.name in found)
    usual = sum(found.values()) / ruled if ruled else 1.0

    def weighed(curve: Curve) -> Curve:
        factor = found[curve.name] / most if (most := _most(curve)) and curve.name in found else usual
        kept = (option for option in curve.options if option.codec != THIN.name or option.recipe.rest is None)
        return replace(curve, options=tuple(replace(o, error=o.error * factor) for o in kept))

    return [weighed(curve) for curve in curves]


def _measured(plan: Coded, without: Callable[[str, Tensor], float | None]) -> float | None:
    base = base_of(plan)
    return None if base is None else without(plan.source.name, base)


def _most(curve: Curve) -> float:
    """The error of having nothing of a difference."""
    return max(option.error for option in curve.options)


def with_leaving_out(curve: Curve) -> Curve:
    """A curve of a difference: what an option costs the model, and an entry of a file too; or nothing of the
    difference is stored.
    """
    extra, unit = (
        _ENTRY_BYTES + len(curve.name),
        (curve.rows * curve.options[0].recipe.columns) ** SIZE_EXPONENT,
    )
    options = [
        replace(option, n_bytes=option.n_bytes + extra, error=unit * cost(min(1.0, option.error / unit)))
        for option in curve.options
    ]
    nothing = Option(options[0].recipe, 0, unit, LEFT_OUT, splits=False)
    return replace(curve, options=(nothing, *options))
