"""What of a model is a difference to its base, and what is the base's: plans, and what is stated of it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from miracle_hub.codec.base import Base, named_base
from miracle_hub.codec.based import Read, tensors_of_base
from miracle_hub.codec.dtypes import TORCH_DTYPES
from miracle_hub.codec.handed_out import left_by
from miracle_hub.codec.plan import Coded, Plain, Plan, Same, Why
from miracle_hub.codec.rates import LEFT_OUT, Chosen, Curve, Option
from miracle_hub.codec.source import SourceTensor
from miracle_hub.codec.stored import StoredTensor, base_digest_of
from miracle_hub.errors import SourceError
from miracle_hub.format.payload import DTYPES
from miracle_hub.format.spec import TensorSpec

# Plain tensors that are differences where a base has them too.
_SMALL = (Why.SHORT_VECTOR, Why.SMALL)
# Of a payload and of its entry in a file's header, beside the name; measured on MiniLM.
_ENTRY_BYTES = 130


@dataclass
class Differences:
    """The base of a compression.

    Attributes:
        found: its tensors, by its own names.
        base: what is to be stated of it.
        relative: squared differences over squared weights, of the tensors that differ.
    """

    folder: Path
    found: Mapping[str, StoredTensor]
    base: Base
    relative: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, tensors: Sequence[TensorSpec], read: Read) -> "Differences":
        """Of a model's tensors to those of a base in a folder.

        Raises:
            BaseModelError: it cannot be read. SourceError: it has no tensor of the model.
        """
        found = tensors_of_base(folder, read)
        base = Base(*named_base(folder), prefix=_prefix(tensors, found))
        result = cls(folder, found, base)
        if not any(result._theirs(tensor) for tensor in tensors):
            theirs, own = (", ".join([*names][:3]) for names in (sorted(found), (t.name for t in tensors)))
            raise SourceError(
                f"{folder}: expected a base with tensors of the names and shapes of the model's, found none "
                f"of them ({theirs}, … beside {own}, …); give the model that this one was made from, or "
                "compress without a base"
            )
        return result

    def _theirs(self, tensor: TensorSpec) -> StoredTensor | None:
        """The base's tensor to which one of the model's may be a difference."""
        if not tensor.name.startswith(self.base.prefix[0]):
            return None
        theirs = self.found.get(self.base.name_in_base(tensor.name))
        if theirs is None or theirs.shape != tensor.shape:
            return None
        are_floating = theirs.dtype in DTYPES and tensor.dtype in DTYPES
        return theirs if are_floating or theirs.dtype == tensor.dtype else None

    def plan(self, plans: dict[str, Plan]) -> None:
        """Replace plans of tensors that are the base's, or differ from it; others are coded by themselves.

        Every tensor is read, one at a time, and the base's with it.

        Raises:
            SourceError: there is no difference.
        """
        digests, dtypes = {}, {}
        for name, plan in plans.items():
            theirs = self._theirs(plan.source)
            if theirs is None:
                continue
            based, digest, is_same = self._compared(plan.source, theirs)
            if is_same:
                plans[name] = Same(plan.source)
                dtypes |= {name: plan.source.dtype} if plan.source.dtype != theirs.dtype else {}
            elif _may_differ(plan):
                plans[name] = Coded(plan.source, based)
            else:
                continue
            digests[name] = digest
        self.base = replace(self.base, digests=digests, dtypes=dtypes)
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
        return based, digest, False

    def leave_out(self, plans: dict[str, Plan], choices: Mapping[str, Chosen]) -> None:
        """Tensors whose differences are not worth their bytes are the base's; what is kept exact is not."""
        names = sorted(name for name, choice in choices.items() if choice.option.codec == LEFT_OUT)
        coded = {name: plan for name in names if isinstance(plan := plans[name], Coded)}
        plans |= {name: Same(plan.source, plan.based) for name, plan in coded.items()}
        casts = {
            name: plans[name].source.dtype
            for name in names
            if plans[name].source.dtype != self.found[self.base.name_in_base(name)].dtype
        }
        digests = {name: digest for name, digest in self.base.digests.items() if _is_of_base(plans[name])}
        dtypes = {**self.base.dtypes, **casts}
        self.base = replace(self.base, left_out=tuple(names), dtypes=dtypes, digests=digests)


def _is_of_base(plan: Plan) -> bool:
    return isinstance(plan, Same) or (isinstance(plan, Coded) and plan.based is not None)


def _may_differ(plan: Plan) -> bool:
    return isinstance(plan, Coded) or (isinstance(plan, Plain) and plan.why in _SMALL)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))


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


def with_leaving_out(curve: Curve) -> Curve:
    """A curve of a difference: nothing may be stored of it, and what is costs an entry of a file too."""
    extra, first = _ENTRY_BYTES + len(curve.name), curve.options[0]
    dear = [replace(option, n_bytes=option.n_bytes + extra) for option in curve.options]
    whole = Option(first.recipe, 0, _error_of_nothing(curve), LEFT_OUT, splits=False)
    return replace(curve, options=(whole, *dear))


def _error_of_nothing(curve: Curve) -> float:
    """A relative squared error of 1, in the unit of the curve."""
    from miracle_hub.codec.ladder import SIZE_EXPONENT

    recipe = curve.options[0].recipe
    return (curve.rows * recipe.columns) ** SIZE_EXPONENT
