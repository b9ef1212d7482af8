"""Stages: a base and refinements of it, each in files of its own, which together are one repository.

FORMAT.md, "Stages", has their names and the order of additions. A refinement holds what the stages before
leave of a tensor.
"""

import re
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.codec.artifact import OutputFile, repository_digest, shard_entries, write_index
from miracle_hub.codec.plan import TensorPlan
from miracle_hub.codec.tensor import TORCH_DTYPES, SegmentPlan, decode_payload, encode_tensor
from miracle_hub.coding.backend import Backend
from miracle_hub.coding.matrix import ROW_SCALE_COLUMNS
from miracle_hub.errors import OptionError, SourceError
from miracle_hub.files.container import Entry, opened
from miracle_hub.format.payload import Header, Segment

# 4/7 bits per weight leave 0.485 and 0.477 of a Gaussian's squared error with windows of 12 and 14 bits (10:
# 0.499, which short tensors miss), 1/2 bit leaves 0.529 and 0.521 (benchmarks/rate_distortion.py).
_STEP_BITS, _STEP_WEIGHTS = 4, 7
_FEWEST_WINDOW_BITS = 12
_FILE = re.compile(r"model\.stage-([1-9])[-.].*safetensors")


def refinement_code(window_bits: int, seed: int) -> Code:
    """The code of all stages above the first."""
    return Code(max(window_bits, _FEWEST_WINDOW_BITS), _STEP_BITS, _STEP_WEIGHTS, seed)


def encode_refinement(plan: TensorPlan, code: Code, folder: Path, stage: int, backend: Backend) -> bytes:
    """The payload of what the stages before, which `folder` holds, leave of a tensor."""
    name, segment = plan.source.name, _segment(plan, code)
    left = plan.source.load().to(backend.device).float()
    for payload in _earlier(folder, name, stage):
        left = left - decode_payload(payload, name, backend=backend)[0]
    return encode_tensor(left, [segment], plan.rotation, where=name, backend=backend)


def _segment(plan: TensorPlan, code: Code) -> SegmentPlan:
    rows = plan.source.n_weights // plan.columns
    return SegmentPlan(rows, code, row_scales=plan.columns >= ROW_SCALE_COLUMNS)


def _entry(plan: TensorPlan, code: Code, stage: int) -> Entry:
    """A refinement as the output file will hold it."""
    segment = _segment(plan, code)
    segments = (Segment(segment.rows, code, segment.row_scales),)
    n_bytes = Header("F32", plan.source.shape, plan.columns, plan.rotation, segments).payload_bytes
    return Entry(stage_name(plan.source.name, stage), "U8", (n_bytes,), n_bytes)


def stage_name(name: str, stage: int) -> str:
    """The entry of a tensor's refinement."""
    return name if stage == 1 else f"{name}.stage_{stage}"


def stage_of(file: Path) -> int:
    """The stage that a file belongs to; 1 for files of repositories without stages."""
    match = _FILE.fullmatch(file.name)
    return int(match[1]) if match else 1


def index_name(stages: int, n_stages: int) -> str:
    """The index of the first `stages` of `n_stages`."""
    return f"model.{'' if stages == n_stages else f'stages-{stages}.'}safetensors.index.json"


def lay_out_stage(
    plans: dict[str, TensorPlan], code: Code, stage: int, max_shard_bytes: int
) -> list[OutputFile]:
    """The files of a stage above the first.

    Raises:
        SourceError: a tensor of the source has the name of a refinement.
    """
    entries = [_entry(plan, code, stage) for plan in plans.values() if not plan.reason]
    for entry in entries:
        if entry.name in plans:
            raise SourceError(
                f"{entry.name}: expected no tensor of this name, which stage {stage} of another takes; "
                "compress without stages"
            )
    return shard_entries(sorted(entries, key=lambda e: e.name), max_shard_bytes, stem=stem_of(stage))


def stem_of(stage: int) -> str:
    """What the names of a stage's files begin with."""
    return f"model.stage-{stage}"


def write_indices(folder: Path, stages: Sequence[list[OutputFile]]) -> None:
    """An index for all stages, and one for every smaller number of them."""
    for n in range(1, len(stages) + 1):
        files = [file for stage in stages[:n] for file in stage]
        write_index(folder, files, index_name(n, len(stages)))


def stage_digests(stages: Sequence[dict[str, int]]) -> list[str]:
    """The digest of the first n stages for every n, from the digests of each stage's payloads."""
    return [repository_digest(dict(ChainMap(*stages[:n]))) for n in range(1, len(stages) + 1)]


def check_stages(stages: object, n_stages: int, where: str) -> int:
    """The number of stages asked for; None means all.

    Raises:
        OptionError: it is not one of them.
    """
    if stages is None:
        return n_stages
    if not isinstance(stages, int) or isinstance(stages, bool) or not 1 <= stages <= n_stages:
        raise OptionError(
            f"{where}: stages: expected a number from 1 to {n_stages}, found {stages!r}; leave it out for all"
        )
    return stages


def decode_stages(
    base: Tensor, later: Sequence[Tensor], where: str, *, verify: bool = True, backend: Backend | str = "auto"
) -> Tensor:
    """The weights of a payload and its refinements, in the dtype of the payload's source.

    The order of the additions is part of the format.

    Raises:
        FormatError: and its subclasses, when a payload is not sound.
    """
    weights, header = decode_payload(base, where, verify=verify, rounded=not later, backend=backend)
    for payload in later:
        weights = weights + decode_payload(payload, where, verify=verify, backend=backend)[0]
    return weights.to(TORCH_DTYPES[header.dtype])


def _earlier(folder: Path, name: str, stage: int) -> list[Tensor]:
    """The payloads of a tensor's stages before `stage`, in order."""
    wanted, found = {stage_name(name, i): i for i in range(1, stage)}, {}
    for path in [path for path in folder.glob("*.safetensors") if stage_of(path) < stage]:
        with opened(path) as file:
            found |= {wanted[key]: file.get_tensor(key) for key in wanted.keys() & set(file.keys())}
    return [found[i] for i in sorted(found)]
