"""What a model in memory, and each of its parts, says of the repository that it came from."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from miracle_hub.codec.parts import FACTS, facts_of_part, is_miracle, remove_facts

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


def forget_facts(model: "PreTrainedModel", *, is_kept: bool, is_staged: bool) -> None:
    """Leave the configs of a model and of its parts as if the checkpoint had been dense.

    Args:
        is_kept: layers stayed compressed, and so does what is saved of them.
        is_staged: the repository has stages, of which a saved model knows nothing.
    """
    for config in _configs(model):
        if is_staged:
            for name in ("stages", "transformers_weights"):
                vars(config).pop(name, None)
        if not is_kept:
            remove_facts(vars(config))


def repeat_facts(model: "PreTrainedModel", facts: Mapping[str, Any]) -> None:
    """Tell the parts of a model that is saved compressed what their loader needs."""
    for config in _configs(model):
        if is_miracle(vars(config).get(FACTS)):
            vars(config)[FACTS] = facts_of_part(facts)


def _configs(model: "PreTrainedModel") -> list[PretrainedConfig]:
    """The configs of a model and of its parts at any depth; modules may hold copies of them."""
    found: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        _collect(getattr(module, "config", None), found)
    return list(found.values())


def _collect(config: object, found: dict[int, PretrainedConfig]) -> None:
    if isinstance(config, PretrainedConfig) and id(config) not in found:
        found[id(config)] = config
        for value in vars(config).values():
            _collect(value, found)
