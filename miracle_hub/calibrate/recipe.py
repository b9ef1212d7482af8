"""How long a calibration takes: effort → tokens, groups and steps; and what is known of a model by then."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from miracle_hub.calibrate.block_refits import BlockOptions
from miracle_hub.calibrate.inputs import SELF, Inputs, inputs_of
from miracle_hub.calibrate.kept_knowledge import kept_inputs, kept_sensitivity
from miracle_hub.calibrate.known import Known
from miracle_hub.calibrate.modality import Modality, modality_of, takes_sounds, takes_texts
from miracle_hub.calibrate.models import load_dense
from miracle_hub.calibrate.outputs import require_repeatable
from miracle_hub.calibrate.refits import RefitOptions
from miracle_hub.calibrate.remembered import remembers
from miracle_hub.calibrate.sensitivity import measure
from miracle_hub.codec.kept import Kept
from miracle_hub.codec.naming import CONFIG

# Multiplications and additions per second of two cores that multiply in bfloat16: MiniLM's steps of 1,024
# tokens take 0.8 CPU seconds, SmolLM2's 9.
SPEED = 2e11
# Of the dense model's answer, and of a step of the optimizer, per weight and token.
WORK = 8
STEP_TOKENS = 1024
# Whoever has no more tokens sees them again: 1,000 that SmolLM2 wrote took 5.6 CPU seconds.
_MOST_SELF_MADE = 64 * STEP_TOKENS
# Steps that see other texts each, and how often texts are seen by more steps: the dense model's answers to
# them take a third of a step. A choice.
_STEPS_OF_OTHERS, _SEEN = 256, 4
_WINDOW = 512
# Smaller models have the time of one of so many weights; their steps are bounded by their number.
_SMALL = 1e8
_ROWS = 64
# Of pictures, which have 64 tokens and more each. ResNet-20 at 2 bits, of dev: 640 steps of 16 pictures end
# at 0.313 nats (85.0 % agree), 160 steps of 64, in nearly the same time, at 0.350 (82.5 %).
_PICTURES = 16
# So their steps are a quarter of others', and four times as many.
_STEPS_OF_PICTURES = 4
# Of scales, in nets with batch norms: 300 steps take ResNet-20 at 2 bits from 0.403 nats on held-out pictures
# to 0.385 and 0.373 with rates of 0.001 and 0.005, and, from 0.360, to 0.282 with 0.02. No other net was
# tried beside; ResNet-44 was kept apart.
_END_RATE_OF_NORMS = 0.02
# Refits of the whole model need so many steps between two groups; with fewer, blocks are refitted.
_FEWEST_STEPS = 32
_FEWEST_BLOCK_STEPS = 8
# Of the steps, those that tune at the end, of whole models that were refitted and of others.
_END, _END_OF_BLOCKS = 0.2, 0.4
# Batches that go through all blocks, dense and coded; twice forth costs as much as so many steps.
_BLOCK_BATCHES, _BLOCK_PASSES = 24, 16


@dataclass(frozen=True)
class Effort:
    """What one level of effort spends on refits.

    Attributes:
        minutes: per 100 million weights, of two cores.
        looks: batches that the sensitivity is measured on.
        groups: of columns, where the whole model is refitted.
        most_steps: of small models, whose steps take no time.
        block_groups: of columns, where blocks are refitted.
    """

    minutes: float
    looks: int
    groups: int
    most_steps: int
    block_groups: int


EFFORTS = (
    Effort(0, 4, 1, 0, 1),
    Effort(1, 12, 4, 240, 2),
    Effort(8, 64, 8, 960, 4),
    Effort(40, 64, 16, 4800, 8),
    Effort(150, 256, 16, 12000, 16),
    Effort(600, 256, 32, 48000, 16),
)


def steps_of(effort: int, n_weights: int, n_multiplied: int, takes_pictures: bool = False) -> int:
    """Through the whole model, that an effort has time for.

    Args:
        n_multiplied: weights that every token is multiplied by.
    """
    level = EFFORTS[effort]
    work = level.minutes * 60 * SPEED * max(n_weights, _SMALL) / 1e8
    most = level.most_steps * (_STEPS_OF_PICTURES if takes_pictures else 1)
    return min(most, int(work / (WORK * max(n_multiplied, 1) * STEP_TOKENS)))


def refit_options(
    effort: int, n_weights: int, n_multiplied: int, takes_pictures: bool = False
) -> RefitOptions:
    """Groups and steps of an effort: of the whole model where there is time for them, else of its blocks.

    Args:
        n_multiplied: weights that every token is multiplied by.
    """
    level, steps = EFFORTS[effort], steps_of(effort, n_weights, n_multiplied, takes_pictures)
    end_steps = int(steps * _END)
    of_group = (steps - end_steps) // level.groups  # rates are tried in as many steps
    if of_group >= _FEWEST_STEPS:
        return RefitOptions(level.groups, of_group, end_steps)
    end_steps = int(steps * _END_OF_BLOCKS)
    left = steps - end_steps - _BLOCK_PASSES
    of_group = left // max(1, level.block_groups - 1)
    if of_group < _FEWEST_BLOCK_STEPS:
        return RefitOptions(end_steps=steps)
    blocks = BlockOptions(level.block_groups, of_group, _BLOCK_BATCHES)
    return RefitOptions(end_steps=end_steps, blocks=blocks)


def knowledge_of(
    folder: Path,
    data: Any = SELF,
    *,
    effort: int = 1,
    seed: int = 0,
    model: nn.Module | None = None,
    progress: bool = False,
    kept: Kept | None = None,
    device: torch.device | str = "cpu",
) -> Known:
    """What there is to know of the model of a folder: it is run on data, or on inputs of its own making.

    Args:
        data: see `inputs.inputs_of`.
        effort: 0 to 5.
        model: the folder's, where transformers cannot tell; float32, in evaluation mode. It is changed.
        kept: what a run of the same arguments has kept, and where this one keeps it.
        device: where the model runs.

    Raises:
        CalibrationError: the model cannot be run, or nothing is known that it could be run on.
        DataError: the data cannot be read, are none that the model takes, or too few.
        ResumeError: the data are others than before.
    """
    kept = kept or Kept()
    model = (load_dense(folder) if model is None else model).to(device)
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    options = refit_options(effort, n_weights, _multiplied(model), _takes_pictures(model))
    if remembers(model):
        options = replace(options, end_rate=_END_RATE_OF_NORMS)
    is_self = isinstance(data, str) and data == SELF
    looked = EFFORTS[effort].looks * STEP_TOKENS
    asked = {"n_tokens": tokens_for(modality_of(model), options.n_batches, looked, is_self), "seed": seed}
    asked |= _batch_size(model)
    inputs = kept_inputs(kept, lambda: inputs_of(model, folder, data, **asked), is_self)
    require_repeatable(model, inputs.batches[0])
    kept = kept.given(inputs.digest)
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1}
    looked_at = _first(inputs, looked)
    found = kept_sensitivity(kept, lambda: measure(model, looked_at, names, seed, progress))
    given = {"states_tuned": (folder / CONFIG).is_file(), "seed": seed, "progress": progress, "kept": kept}
    return Known(found, model, inputs, options, **given)


def tokens_for(modality: Modality, steps: int, looked: int, is_self_made: bool) -> int:
    """To calibrate on. Words drawn for an encoder cost nothing."""
    if takes_texts(modality):
        steps = min(steps, max(_STEPS_OF_OTHERS, steps // _SEEN))
    wanted = max(looked, steps * STEP_TOKENS)
    return min(wanted, _MOST_SELF_MADE) if is_self_made and modality is not Modality.TEXT else wanted


def _first(inputs: Inputs, n_tokens: int) -> tuple[dict, ...]:
    """As many batches as have so many tokens."""
    share = min(1.0, n_tokens / max(inputs.n_tokens, 1))
    return inputs.batches[: max(1, round(share * len(inputs.batches)))]


def _multiplied(model: nn.Module) -> int:
    """Weights of all layers but embeddings, which a tied head counts as its own."""
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    weights = [getattr(module, "weight", None) for module in layers]
    return sum(w.numel() for w in weights if isinstance(w, nn.Parameter) and w.dim() > 1)


def _takes_pictures(model: nn.Module) -> bool:
    has_filters = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return modality_of(model) in (Modality.IMAGE, Modality.ARRAY) and has_filters


def _batch_size(model: nn.Module) -> dict[str, int]:
    """Rows and tokens of a batch: long rows are few, and steps take about as long as each other."""
    modality = modality_of(model)
    if modality is Modality.CAUSAL:
        return {"batch_rows": STEP_TOKENS // _WINDOW}
    if takes_texts(modality) or takes_sounds(modality):
        return {"batch_rows": STEP_TOKENS, "batch_tokens": STEP_TOKENS}
    return {"batch_rows": _PICTURES if _takes_pictures(model) else _ROWS}
