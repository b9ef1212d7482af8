"""Names of files and entries that mean something. The only place that reads them.

model.safetensors                       all tensors
model-00001-of-00003.safetensors        a shard, and model.safetensors.index.json
model.stage-<n>….safetensors            what stage n adds, see `stages`
model.stages-<n>.safetensors.index.json the tensors of the first n stages
model.<variant>.safetensors             another network of a mixin's repository
<tensor>.stage_<n>                      the entry of a refinement
miracle                                 the entry of a network's stream
adapter_model.safetensors               all tensors of an adapter, beside adapter_config.json
"""

import re
from pathlib import Path

from miracle_hub.code import MAX_STAGES

CONFIG, CARD = "config.json", "README.md"
ADAPTER_CONFIG, ADAPTER, ADAPTER_STEM = "adapter_config.json", "adapter_model.safetensors", "adapter_model"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS_ENDING, INDEX_ENDING = ".safetensors", ".safetensors.index.json"
STREAM = "miracle"
_STAGE_FILE = re.compile(r"model\.stage-([1-9])[-.].*safetensors")
_STAGES_INDEX = re.compile(r"model\.stages-([1-9])\.safetensors\.index\.json")
_SHARD = re.compile(r"model(\.stage-[1-9])?(-\d{5}-of-\d{5})?\.safetensors")
_VARIANT = re.compile(
    r"model\.(?!stages?-[1-9][-.])[\w-]+?(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.[\w-]+\.json"
)
_WEIGHTS = re.compile(r"model(\.stages?-\d)?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def stem_of(stage: int, n_stages: int = MAX_STAGES) -> str:
    """What the names of a stage's files begin with; a repository of one stage has no number in them."""
    return "model" if n_stages == 1 else f"model.stage-{stage}"


def stage_patterns(after: int) -> list[str]:
    """Shell patterns of the files of all stages after one."""
    return [f"{stem_of(stage)}[-.]*" for stage in range(after + 1, MAX_STAGES + 1)]


def shard_names(stem: str, n_shards: int) -> list[str]:
    """The names of files that hold a set of tensors together, as on the Hub."""
    if n_shards == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05}-of-{n_shards:05}.safetensors" for i in range(1, n_shards + 1)]


def variant_name(variant: str | None) -> str:
    """As transformers names the weights of a variant."""
    return f"model.{variant}.safetensors" if variant else SINGLE


def index_name(stages: int, n_stages: int) -> str:
    """The index of the first `stages` of `n_stages`."""
    return f"model.{'' if stages == n_stages else f'stages-{stages}.'}safetensors.index.json"


def stages_of_index(index: Path) -> int:
    """How many stages an index names the tensors of."""
    match = _STAGES_INDEX.fullmatch(index.name)
    return int(match[1]) if match else MAX_STAGES


def stage_of(file: Path) -> int:
    """The stage that a file belongs to; 1 for files of repositories without stages."""
    match = _STAGE_FILE.fullmatch(file.name)
    return int(match[1]) if match else 1


def is_of_stage(file: Path) -> bool:
    """Whether a file is one of a repository of several stages."""
    return _STAGE_FILE.fullmatch(file.name) is not None


def stage_name(name: str, stage: int) -> str:
    """The entry of a tensor's refinement."""
    return name if stage == 1 else f"{name}.stage_{stage}"


def refined_name(entry: str, stage: int) -> str:
    """The tensor whose refinement an entry is; the mirror of `stage_name`."""
    return entry if stage == 1 else entry.removesuffix(f".stage_{stage}")


def is_shard(name: str) -> bool:
    """Whether a file is named as weights that an index names."""
    return _SHARD.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether `from_pretrained` would look at a file of this name; those of a variant have other names."""
    return _WEIGHTS.fullmatch(name) is not None


def is_variant(name: str) -> bool:
    """Whether a file is named as weights, or an index, for `from_pretrained(variant=…)` alone."""
    return _VARIANT.fullmatch(name) is not None and not is_weights(name)
