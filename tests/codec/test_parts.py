"""Facts reach every part of a composite's config.json, and leave it again, whatever the config looks like."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.codec.config import read_config
from miracle_hub.codec.parts import (
    FACTS,
    first_dtype,
    is_miracle,
    parts_of,
    remove_facts,
    state_in_parts,
    stated_dtype,
)
from miracle_hub.errors import FormatError
from miracle_hub.format.spec import TensorSpec

_OURS = {"quant_method": "miracle", "format_version": 1, "digest": "ab" * 32, "seed": 0, "guard": {}}
_TENSORS = [TensorSpec("a", "BF16", (4,)), TensorSpec("b", "I64", (4,)), TensorSpec("c", "F32", (4,))]
_NAMES = st.sampled_from(["text_config", "decoder", "thinker_config", "rope_parameters", "size", "stages_of"])
_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
)


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """JSON objects, some of which are configs."""
    plain = st.dictionaries(_NAMES, values, max_size=3)
    return st.builds(
        lambda value, kind: value | ({} if kind is None else {"model_type": kind}),
        plain,
        st.none() | st.sampled_from(["clip_text_model", "", "llama"]),
    )


_CONFIGS = objects(st.recursive(_LEAVES, objects, max_leaves=8))


@settings(max_examples=50)
@given(_CONFIGS, st.none() | st.integers(2, 9))
def test_what_is_stated_in_parts_is_taken_out_again(config: dict[str, Any], stages: int | None) -> None:
    changed = copy.deepcopy(config) | {FACTS: dict(_OURS)} | ({} if stages is None else {"stages": stages})
    state_in_parts(changed, _TENSORS)
    for part in parts_of(changed):
        assert is_miracle(part[FACTS]) and part[FACTS]["digest"] == _OURS["digest"]
        assert "guard" not in part[FACTS] and part.get("stages") == stages
    assert remove_facts(changed) and changed == config
    assert not remove_facts(changed)


@settings(max_examples=50)
@given(_CONFIGS)
def test_a_config_without_parts_is_not_changed(config: dict[str, Any]) -> None:
    changed = copy.deepcopy(config) | {FACTS: dict(_OURS)}
    has_parts = bool(list(parts_of(changed)))
    state_in_parts(changed, _TENSORS)
    assert (changed == config | {FACTS: _OURS}) == (not has_parts)


def test_parts_are_found_at_any_depth_and_by_their_usual_names() -> None:
    inner = {"model_type": "c", FACTS: {"model_type": "no part"}}
    config = {"model_type": "a", "thinker_config": {"model_type": "b", "audio_config": inner}}
    config |= {"vision_config": {"depth": 2}, "rope_parameters": {"full": {"theta": 1}}, "encoders": [inner]}
    assert list(parts_of(config)) == [config["thinker_config"], inner, config["vision_config"]]


def test_the_dtype_where_none_is_stated_is_that_of_the_first_floating_tensor() -> None:
    """As transformers reads it from files, whose names safetensors gives in their order."""
    assert first_dtype(_TENSORS) == "bfloat16"
    assert first_dtype(_TENSORS[1:]) == "float32"
    assert first_dtype(_TENSORS[:2]) == "bfloat16"
    assert first_dtype(_TENSORS[1:2]) is None


@pytest.mark.parametrize("dtype", ["save", "int8", 5, ["float32"]], ids=str)
def test_a_dtype_that_is_none_is_refused(dtype: object, tmp_path: Any) -> None:
    with pytest.raises(FormatError, match=r"quantization_config\.dtype: expected one of float32, .*, found"):
        stated_dtype({"dtype": dtype}, tmp_path / "config.json")


def test_a_config_as_deep_as_is_read_is_walked(tmp_path: Any) -> None:
    text = '{"a":' * 99 + '{"model_type": "b"}' + "}" * 99
    (tmp_path / "config.json").write_text(text)
    config = read_config(tmp_path)
    assert len(list(parts_of(config))) == 1
    assert json.dumps(config)
