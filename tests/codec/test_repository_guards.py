"""Guards of a repository: its files together, its config.json and its index are what was written."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miracle_hub.codec.guard import (
    GUARD,
    GUARD_ALONE,
    Contents,
    config_guard,
    guards_of_stages,
    repository_guard,
    with_guard,
    with_own_guard,
)
from miracle_hub.codec.guarded import check_config, check_files, check_index, check_own_guard, stated_guard
from miracle_hub.errors import ChecksumError, FormatError
from tests.codec.guards import CONFIG, ENTRIES, METADATA, with_line, write


def folder_of(tmp_path: Path, key: str = GUARD) -> tuple[Path, list[Contents], dict[str, Any]]:
    """Two files, and the config.json that goes with them."""
    files = [write(tmp_path / f"{i}.safetensors", key, ENTRIES[i::2]) for i in range(2)]
    config = with_guard(CONFIG, [repository_guard(file.digest for file in files)])
    return tmp_path / "config.json", files, config


def test_a_whole_repository_passes_in_any_order(tmp_path: Path) -> None:
    path, files, config = folder_of(tmp_path)
    check_config(path, config)
    check_files(files, path, config)
    check_files(files[::-1], path, config)
    check_files(files, path, None)


@pytest.mark.parametrize("change", ["missing", "twice", "another", "unguarded and damaged"])
def test_files_together_are_what_config_promises(change: str, tmp_path: Path) -> None:
    path, files, config = folder_of(tmp_path)
    wrong = {
        "missing": files[:1],
        "twice": [*files, files[1]],
        "another": [files[0], write(tmp_path / "2.safetensors", entries=ENTRIES[:1])],
        "unguarded and damaged": [files[0], replace(files[1], metadata={**METADATA, "x": ""})],
    }[change]
    with pytest.raises(ChecksumError, match=r"quantization_config\.guard: expected files of digest"):
        check_files(wrong, path, config)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path, files, config = folder_of(tmp_path)
    with pytest.raises(ChecksumError, match=r"1\.safetensors: expected what guard"):
        check_files([files[0], with_line(files[1], 0, dtype="F8")], path, config)


def quantization(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, "quantization_config": {**config["quantization_config"], **changes}}


@pytest.mark.parametrize("lost", ["all", "guard", "method"])
def test_a_config_that_lost_its_guard_is_refused(lost: str, tmp_path: Path) -> None:
    path, files, config = folder_of(tmp_path)
    damaged = {
        "all": {"model_type": "bert"},
        "guard": CONFIG,
        "method": quantization(config, quant_method="x"),
    }
    with pytest.raises(FormatError, match=r"expected a quantization_config with a guard, as 0\.safetensors"):
        check_files(files, path, damaged[lost])


def test_files_that_stand_alone_or_are_old_need_no_config(tmp_path: Path) -> None:
    path, files, _ = folder_of(tmp_path, GUARD_ALONE)
    check_files(files, path, {"width": 5})
    check_files([replace(file, metadata=METADATA) for file in files], path, CONFIG)
    with pytest.raises(ChecksumError):
        check_files([with_line(files[0], 0, name="x")], path, {"width": 5})


@pytest.mark.parametrize(
    "guard",
    [5, [], {}, {"tensors": "0" * 64}, {"tensors": []}, {"tensors": [5]}, {"tensors": ["0" * 63]}],
    ids=str,
)
def test_what_is_no_guard_is_refused(guard: Any, tmp_path: Path) -> None:
    path, files, config = folder_of(tmp_path)
    with pytest.raises(FormatError, match=r"config\.json: quantization_config\.guard: expected"):
        check_files(files, path, quantization(config, guard=guard))


def test_stages_have_guards_of_their_own(tmp_path: Path) -> None:
    path, files, _ = folder_of(tmp_path)
    config = with_guard(CONFIG, guards_of_stages([files[:1], files[1:]]))
    check_files(files[:1], path, config, 1)
    check_files(files, path, config, 2)
    for found, stages in ((files, 1), (files[:1], 2), (files[1:], 2)):
        with pytest.raises(ChecksumError):
            check_files(found, path, config, stages)
    with pytest.raises(FormatError, match="expected 3 or more SHA-256 digests"):
        check_files(files, path, config, 3)


def stated(config: dict[str, Any]) -> dict[str, Any]:
    """The guard that a config.json states."""
    return config["quantization_config"]["guard"]


def test_layout_and_order_of_a_config_do_not_count() -> None:
    config = with_guard(CONFIG, ["0" * 64])
    again = json.loads(json.dumps(dict(reversed(config.items())), indent=7))
    assert config_guard(again) == config["quantization_config"]["guard"]["config"]
    check_config(Path("config.json"), again)


def test_the_guard_of_a_config_is_what_the_format_says() -> None:
    config = with_guard({"ß": 1.0, "a": [None, True], "quantization_config": {"quant_method": "miracle"}}, [])
    text = (
        '{"a":[null,true],"quantization_config":{"guard":{"tensors":[]},"quant_method":"miracle"},'
        '"\\u00df":1.0}'
    )
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert config["quantization_config"]["guard"] == {"tensors": [], "config": expected}


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config | {"layer_norm_eps": 1e-11},
        lambda config: config | {"model_typf": "bert"},
        lambda config: {key: value for key, value in config.items() if key != "lone"},
        lambda config: quantization(config, seed=0),
        lambda config: quantization(config, digest=None),
        lambda config: quantization(config, guard=stated(config) | {"tensors": ["1" * 64]}),
        lambda config: quantization(config, guard=stated(config) | {"config": "1"}),
        lambda config: quantization(config, guard=stated(config) | {"config": None}),
        lambda config: quantization(config, guard=stated(config) | {"more": 1}),
    ],
)
def test_every_field_of_a_config_is_covered(change: Any) -> None:
    config = with_guard(CONFIG, ["0" * 64])
    with pytest.raises(ChecksumError, match=r"^config\.json: expected what guard .* remove config from"):
        check_config(Path("config.json"), change(config))


def test_who_changes_a_config_on_purpose_removes_its_guard_and_keeps_the_tensors(
    tmp_path: Path,
) -> None:
    path, files, config = folder_of(tmp_path)
    only_tensors = {"tensors": stated(config)["tensors"]}
    changed = quantization(config | {"layer_norm_eps": 1e-11}, guard=only_tensors)
    check_config(path, changed)
    check_files(files, path, changed)
    with pytest.raises(ChecksumError):
        check_files(files[:1], path, changed)


def test_old_configs_state_no_guard() -> None:
    for config in (CONFIG, {}, {"quantization_config": None}, {"quantization_config": []}):
        assert stated_guard(Path("config.json"), config) is None
        check_config(Path("config.json"), config)


def test_a_network_s_arguments_are_covered_too() -> None:
    arguments = with_own_guard({"width": 10, "activation": "tanh"})
    check_own_guard(Path("config.json"), arguments)
    check_own_guard(Path("config.json"), {"width": 10})
    for change in ({"activation": "tan"}, {"more": 1}, {GUARD: "0" * 64}, {GUARD: None}):
        with pytest.raises(
            ChecksumError, match=r"^config\.json: .* on purpose, remove miracle_guard from it$"
        ):
            check_own_guard(Path("config.json"), arguments | change)


def test_an_index_guards_its_files(tmp_path: Path) -> None:
    _, files, _ = folder_of(tmp_path)
    index = tmp_path / "model.safetensors.index.json"

    def check(metadata: Any, files: list[Contents] = files) -> None:
        index.write_text(json.dumps({"metadata": metadata, "weight_map": {}}))
        check_index(index, files)

    right = {"total_size": 5, GUARD: repository_guard(file.digest for file in files)}
    check(right)
    check({}, [replace(file, metadata=METADATA) for file in files])
    with pytest.raises(ChecksumError, match=r"index\.json: metadata\.miracle_guard: expected files of"):
        check(right, files[:1])
    for metadata in ({"total_size": 5}, None, []):
        with pytest.raises(FormatError, match=r"expected miracle_guard in its metadata, as 0\.safetensors"):
            check(metadata)
    with pytest.raises(FormatError, match="expected 1 or more SHA-256 digests"):
        check({GUARD: 5})
