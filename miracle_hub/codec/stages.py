"""Stages: a base and refinements of it, each in files of its own, which together are one repository.

FORMAT.md, "Stages". Here is how refinements are coded; `stored` adds them up.
"""

from collections.abc import Mapping

from miracle_hub.code import Code
from miracle_hub.codec import trellis
from miracle_hub.codec.naming import stage_name, stem_of
from miracle_hub.codec.payloads import Request
from miracle_hub.codec.plan import Coded, Plan
from miracle_hub.codec.rates import Choice
from miracle_hub.codec.repository import OutputFile, sharded
from miracle_hub.errors import SourceError
from miracle_hub.format.spec import TensorSpec, bytes_entry

# 4/7 bits per weight leave 0.485 and 0.477 of a Gaussian's squared error with windows of 12 and 14 bits (10:
# 0.499, which short tensors miss), 1/2 bit leaves 0.529 and 0.521 (benchmarks/rate_distortion.py).
_STEP_BITS, _STEP_WEIGHTS = 4, 7
_FEWEST_WINDOW_BITS = 12


def refinement_code(window_bits: int, seed: int) -> Code:
    """The code of all stages above the first."""
    return Code(max(window_bits, _FEWEST_WINDOW_BITS), _STEP_BITS, _STEP_WEIGHTS, seed)


def refinement(source: TensorSpec, request: Request) -> Choice:
    """How what the stages before leave of a tensor is coded."""
    return trellis.refinement(source, request.rotation, refinement_code(request.window_bits, request.seed))


def refined_files(
    plans: Mapping[str, Plan], request: Request, stage: int, max_shard_bytes: int
) -> list[OutputFile]:
    """The files of a stage above the first.

    Raises:
        SourceError: a tensor of the source has the name of a refinement.
    """
    entries = []
    for plan in plans.values():
        if isinstance(plan, Coded):
            spec = TensorSpec(stage_name(plan.source.name, stage), "F32", plan.source.shape)
            n_bytes = trellis.TRELLIS.payload_bytes(spec, refinement(plan.source, request))
            entries.append(bytes_entry(spec.name, n_bytes))
    for entry in entries:
        if entry.name in plans:
            raise SourceError(
                f"{entry.name}: expected no tensor of this name, which stage {stage} of another takes; "
                "compress without stages"
            )
    return sharded(sorted(entries, key=lambda e: e.name), max_shard_bytes, stem_of(stage))
