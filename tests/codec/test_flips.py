"""Damage is never silent: whoever reads a damaged repository gets a named error, or what was there before."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

import miracle_hub
from miracle_hub.errors import FormatError, MiracleError

from ..training.networks import SMALL
from .flips import LOUD, TRANSFORMERS, outcome_of, quiet, sweep
from .subjects import Found, Reader, Subject, coded, copy_of, found_in, subjects, verified

NAMES = [
    "bert",
    "bert in BF16",
    "shards",
    "stages",
    "tied language model",
    "network, streams=network",
    "mixin, streams=network",
    "network, streams=tensor",
    "mixin, streams=tensor",
]
CASES, PLUGIN_CASES = 60, 40  # per repository; `make chaos` has ten thousand


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """Every kind of repository; whoever damages one makes it whole again."""
    with quiet():
        return {subject.name: subject for subject in subjects(tmp_path_factory.mktemp("flips"))}


def test_every_kind_of_repository_is_damaged(made: dict[str, Subject]) -> None:
    assert list(made) == NAMES


PLUGIN = pytest.param(True, id="plug-in")


@pytest.mark.parametrize(
    ("name", "by_plugin"),
    [
        *((name, False) for name in NAMES),
        *(pytest.param(name, True, id=f"{name}, by the plug-in") for name in NAMES[:5]),
    ],
)
def test_no_damage_is_silent_and_no_error_unnamed(
    name: str, by_plugin: bool, made: dict[str, Subject]
) -> None:
    n_cases = PLUGIN_CASES if by_plugin else CASES
    counts = sweep([read_by(made[name], by_plugin)], range(n_cases))
    print(counts.table())
    assert sum(counts.outcomes.values()) == n_cases
    assert not counts.faults, f"{len(counts.faults)} of {n_cases}: " + "; ".join(counts.faults[:4])


def read_by(subject: Subject, by_plugin: bool) -> Subject:
    """The same repository for those of its readers that go through transformers, or for the others."""
    readers = {name: read for name, read in subject.readers.items() if (name in TRANSFORMERS) == by_plugin}
    return replace(subject, readers=readers)


def bytes_of(folder: Path, file: Path) -> Found:
    """A reader that looks at nothing."""
    return {"bytes": file.read_bytes()}


def raising(error: type[Exception]) -> Reader:
    """A reader that sees all damage, and says it so."""

    def read(folder: Path, file: Path) -> Found:
        if file.read_bytes() != b"{}":
            raise error("damaged")
        return {}

    return read


@pytest.mark.parametrize(
    ("read", "expected", "n_faults"),
    [
        (bytes_of, "SILENT", 20),
        (raising(KeyError), "unnamed", 20),
        (raising(FormatError), "named", 0),
        (lambda folder, file: {}, "equal", 0),
    ],
)
def test_the_count_sees_silence_and_errors_without_a_name(
    read: Reader, expected: str, n_faults: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    counts = sweep([Subject("control", tmp_path, {"read": read})], range(20))
    assert counts.outcomes == {("read", "config", expected): 20}
    assert len(counts.faults) == n_faults


# A network's stream alone in its file.


def layer() -> nn.Module:
    """A network without buffers: its stream holds all of it."""
    return nn.Sequential(nn.Linear(4, 4))


def into_layer(folder: Path, file: Path) -> Found:
    return found_in(miracle_hub.load(file, layer()).state_dict())


@pytest.fixture
def stream_alone(tmp_path: Path) -> Path:
    path, options = tmp_path / "model.safetensors", {**SMALL, "target_modules": "all", "streams": "network"}
    miracle_hub.save(coded(miracle_hub.make_variational(layer(), **options)), path)
    return path


def silent_flips(path: Path, read: Reader) -> list[str]:
    """Every bit of a file that may flip without an error or another result."""
    data, expected, silent = path.read_bytes(), read(path.parent, path), []
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        outcome, said = outcome_of(read, path.parent, path, expected, (MiracleError,))
        if outcome not in ("named", "equal"):
            silent.append(f"byte {bit // 8}, bit {bit % 8}: {outcome}: {said}")
    return silent


def test_a_stream_alone_needs_no_guard_since_every_bit_of_its_file_is_covered(stream_alone: Path) -> None:
    assert b"__metadata__" not in stream_alone.read_bytes()
    assert silent_flips(stream_alone, into_layer) == []


def test_verify_sees_every_flipped_bit_of_a_stream_alone(stream_alone: Path) -> None:
    assert silent_flips(stream_alone, verified(into_layer)) == []


# config.json and the weights beside it.


def damaged_config(
    made: dict[str, Subject], name: str, folder: Path, change: Callable[[Any], Any]
) -> Subject:
    """A copy with another config.json."""
    subject = copy_of(made[name], folder / "damaged")
    config = json.loads((subject.folder / "config.json").read_text(encoding="utf-8"))
    (subject.folder / "config.json").write_text(json.dumps(change(config)))
    return subject


def refusals(subject: Subject) -> dict[str, str]:
    """What every reader of the folder says."""
    found = {}
    with quiet():
        for name, read in subject.readers.items():
            if not name.endswith("(file)"):
                try:
                    read(subject.folder, subject.folder / "model.safetensors")
                except (MiracleError, *LOUD["config"]) as error:
                    found[name] = f"{type(error).__name__}: {error}"
    return found


def readers_of_folders(subject: Subject) -> set[str]:
    """All but those that are given a file."""
    return {name for name in subject.readers if not name.endswith("(file)")}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize("name", NAMES[:5])
def test_a_config_without_its_quantization_config_is_refused(
    name: str, made: dict[str, Subject], tmp_path: Path
) -> None:
    """transformers, which then does not know who could decode, refuses the sizes."""
    subject = damaged_config(made, name, tmp_path, lambda config: without(config, "quantization_config"))
    said = refusals(subject)
    assert said.keys() == readers_of_folders(subject)
    for reader in ("load_state_dict", "decompress", "verify"):
        assert "expected a quantization_config with a guard" in said[reader]


@pytest.mark.parametrize("by_plugin", [False, PLUGIN])
@pytest.mark.parametrize("name", NAMES[:5])
@pytest.mark.parametrize("lost", [("digest", "stage_digests"), ("guard", "digest", "stage_digests")], ids=str)
def test_a_quantization_config_of_another_repository_is_refused(
    name: str, lost: tuple[str, ...], by_plugin: bool, made: dict[str, Subject], tmp_path: Path
) -> None:
    """Even one that says nothing about tensors."""
    other = made["bert in BF16" if name == "bert" else "bert"].folder / "config.json"
    facts = without(json.loads(other.read_text(encoding="utf-8"))["quantization_config"], *lost)
    subject = damaged_config(made, name, tmp_path, lambda config: config | {"quantization_config": facts})
    subject = read_by(subject, by_plugin)
    assert refusals(subject).keys() == readers_of_folders(subject)


@pytest.mark.parametrize("name", ["shards", "stages"])
def test_the_index_guards_the_files_of_a_folder_without_config(
    name: str, made: dict[str, Subject], tmp_path: Path
) -> None:
    """A file of another version may have no guard, or one that agrees with it: only all together tell."""
    subject = copy_of(made[name], tmp_path / "mixed")
    (subject.folder / "config.json").unlink()
    assert miracle_hub.load_state_dict(subject.folder)
    first = min(subject.folder.glob("*.safetensors"))
    stored = load_file(first)
    changed = next(key for key, tensor in stored.items() if tensor.is_floating_point())
    save_file({**stored, changed: stored[changed] + 1}, first, {"format": "pt", "narrowed_from_F32": "*"})
    with pytest.raises(MiracleError, match=r"index\.json: metadata\.miracle_guard: expected files of digest"):
        miracle_hub.load_state_dict(subject.folder)
