"""Models whose weights have errors as large as a rule of rates would make them, without coding any."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from zoo_models import MODELS, ZOO
from zoo_rounding import copy_companions, tensors_of

from miracle_hub.codec import ladder
from miracle_hub.codec.budget import Budget, meet_budget
from miracle_hub.codec.keeping import Roles, keep_exact
from miracle_hub.codec.payloads import Request
from miracle_hub.codec.plan import Coded, Plan, plan_all
from miracle_hub.codec.rates import Chosen, Curve
from miracle_hub.codec.source import SourceTensor, weight_files
from miracle_hub.codec.survey import survey
from miracle_hub.coding.backend import choose
from miracle_hub.sizes import budget_bytes, parse_size

_WINDOW_BITS, _ROTATION = 12, 128

# What a relative squared error of 1 of a tensor is worth.
Worth = Callable[[SourceTensor], float]


@dataclass(frozen=True)
class Case:
    """A model whose rates a rule decides.

    Attributes:
        of: its name in the zoo.
        untied: whether the head is a tensor of its own, equal to the word table.
    """

    of: str
    untied: bool = False

    @property
    def name(self) -> str:
        """Of the case."""
        return f"{self.of}-untied" if self.untied else self.of

    @cached_property
    def folder(self) -> Path:
        """The dense folder; with a head of its own, a copy of it."""
        dense, copy = MODELS[self.of].folder(), ZOO / "untied" / self.of
        if not self.untied:
            return dense
        if not copy.exists():
            copy_companions(dense, copy)
            state = tensors_of(dense)
            head = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
            save_file(state | head, copy / "model.safetensors", {"format": "pt"})
        return copy

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """What happens to each tensor."""
        plans = plan_all(weight_files(self.folder), [], {})
        keep_exact(plans, Roles())
        return plans

    @cached_property
    def curves(self) -> list[Curve]:
        """What each tensor may become, with relative squared errors whatever the size; kept in the zoo."""
        kept = ZOO / "curves" / f"{self.name}-{_WINDOW_BITS}.pt"
        if kept.exists():
            found: list[Curve] = torch.load(kept, weights_only=False)
            return [curve for curve in found if isinstance(self.plans[curve.name], Coded)]
        n = sum(isinstance(plan, Coded) for plan in self.plans.values())
        usual, ladder.SIZE_EXPONENT = ladder.SIZE_EXPONENT, 0.0
        curves, _ = survey(self.plans, Request(_WINDOW_BITS, _ROTATION, 0, n, choose("auto")))
        ladder.SIZE_EXPONENT = usual
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(curves, kept)
        return curves

    def choices(self, worth: Worth, bits: float) -> dict[str, Chosen]:
        """What the package's own allocation gives every tensor under a rule."""
        n_weights = sum(plan.source.n_weights for plan in self.plans.values())
        target = budget_bytes(bits, None, n_weights)
        budget = Budget(target, 0, n_weights, parse_size("5GB", "max_shard_size"))
        curves = [_times(curve, worth(self.plans[curve.name].source)) for curve in self.curves]
        return meet_budget(self.plans, curves, budget)

    def with_errors(self, choices: Mapping[str, Chosen], seed: int) -> dict[str, Tensor]:
        """The state dict with every coded tensor as far from its own as its code would leave it.

        A seed has the same errors under all rules, but for their size.
        """
        relative = {(curve.name, o.recipe): o.error for curve in self.curves for o in curve.options}
        state = {name: t.float() for name, t in tensors_of(self.folder).items() if t.is_floating_point()}
        for name, chosen in choices.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            matrix = state[name].reshape(-1, chosen.option.recipe.columns)
            parts = chosen.parts()
            cut = matrix.split([rows for rows, _ in parts])
            coded = [
                through_channel(part, relative[name, recipe], recipe.row_scales, generator)
                for part, (_, recipe) in zip(cut, parts, strict=True)
            ]
            state[name] = torch.cat(coded).view(state[name].shape)
        return state


def through_channel(part: Tensor, error: float, row_scales: bool, generator: torch.Generator) -> Tensor:
    """What a code at the bound of rate and distortion leaves of a Gaussian source: less of it, and noise."""
    error = min(max(error, 0.0), 1.0)
    power = part.square().mean(1, keepdim=True) if row_scales else part.square().mean()
    noise = torch.randn(part.shape, generator=generator)
    return (1 - error) * part + (error * (1 - error) * power).sqrt() * noise


def _times(curve: Curve, factor: float) -> Curve:
    return replace(curve, options=tuple(replace(o, error=o.error * factor) for o in curve.options))
