"""Runs that are killed or race: what one leaves, the next clears up, and what others have stays."""

import errno
import fcntl
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import miracle_hub.files.whole as folder_module
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.errors import OutputExistsError, OutputWriteError
from miracle_hub.files.whole import output_folder
from tests.codec.outputs import Compress, names, write
from tests.forks import Fork

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import miracle_hub.codec.trellis as module
from miracle_hub.codec.compress import compress_folder
from miracle_hub.options import CompressOptions

encode = module.encode_tensor
def slow_encode(*args, **kwargs):
    (parent / f"ready-{os.getpid()}").touch()
    while len(list(parent.glob("ready-*"))) < processes:
        time.sleep(0.01)
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*args, **kwargs)

module.encode_tensor = slow_encode
parent, processes, die = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "die"
try:
    options = CompressOptions(bits_per_weight=3.0, window_bits=8, progress=False)
    compress_folder(parent / "model", parent / "out", options)
except Exception as error:
    print(type(error).__name__, error)
"""


def start(folder: Path, processes: int, fate: str) -> Fork:
    return Fork(SCRIPT, folder, str(processes), fate)


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    return tmp_path / "out"


def test_a_killed_process_leaves_no_output_and_the_next_one_clears_up(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    assert start(tmp_path, 1, "die").wait().returncode == -signal.SIGKILL
    left = names(tmp_path)
    assert "out" not in left and [name for name in left if name.startswith(".out.")]
    compress(model, tmp_path / "out")
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]


def leave(folder: Path, *left: str) -> None:
    """What killed runs may have left: folders with a file each."""
    for name in left:
        (folder / name).mkdir()
        (folder / name / "old.txt").write_text(name)


def test_what_other_outputs_and_living_runs_have_beside_the_output_stays(tmp_path: Path) -> None:
    others = [".out.abcdefgh.tmp", ".out.abc.miracle.tmp", ".out2.abcdefgh.miracle.tmp", "out.settings"]
    leave(tmp_path, *others, ".out.abcdefgh.miracle.tmp", ".out.ijklmnop.miracle.old")
    (tmp_path / ".out.qrstuvwx.miracle.tmp").symlink_to(tmp_path / others[0])
    with output_folder(tmp_path / "out", False) as alive:
        leave(alive, "data")
        write(tmp_path / "out")
        assert names(alive) == ["data"]
        assert names(tmp_path) == sorted([*others, alive.name, ".out.qrstuvwx.miracle.tmp", "out"])
        shutil.rmtree(tmp_path / "out")
    assert names(tmp_path / "out") == ["data"] and names(tmp_path / others[0]) == ["old.txt"]


@pytest.mark.parametrize("was_replaced", [False, True])
def test_what_a_killed_run_had_set_aside_comes_back_unless_it_was_replaced(
    was_replaced: bool, tmp_path: Path
) -> None:
    """Where two names cannot be exchanged, a kill between two renames leaves the old folder hidden."""
    leave(tmp_path, ".out.abcdefgh.miracle.old", "out" if was_replaced else ".out.abcdefgh.miracle.tmp")
    with pytest.raises(OutputExistsError):
        with output_folder(tmp_path / "out", False):
            pass
    write(tmp_path / "other")
    if was_replaced:
        assert (tmp_path / "out" / "old.txt").read_text() == "out"
    else:
        assert (tmp_path / "out" / "old.txt").read_text() == ".out.abcdefgh.miracle.old"
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["other", "out"] and names(tmp_path / "out") == ["new.txt"]


def test_without_locks_a_run_works_and_leaves_what_others_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    leave(tmp_path, ".out.abcdefgh.miracle.tmp")
    write(tmp_path / "out")
    assert names(tmp_path) == [".out.abcdefgh.miracle.tmp", "out"]


def test_a_folder_that_another_run_takes_for_a_dead_ones_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkdtemp, []

    def robbed(**options: Any) -> str:
        made.append(make(**options))
        if len(made) == 1:
            shutil.rmtree(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", robbed)
    write(tmp_path / "out")
    assert len(made) == 2 and names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new.txt"]


def test_overwriting_never_leaves_the_name_without_a_folder(
    existing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform != "linux":
        pytest.skip("names are exchanged in one step on Linux only")
    monkeypatch.setattr(folder_module.os, "rename", lambda *names: pytest.fail("renamed"))
    write(existing, overwrite=True)
    assert names(existing.parent) == ["out"] and names(existing) == ["new.txt"]


def test_of_two_processes_on_one_output_exactly_one_wins_and_its_result_is_whole(
    model: Path, compress: Compress, tmp_path: Path
) -> None:
    said = [process.wait().stdout for process in [start(tmp_path, 2, "live") for _ in range(2)]]
    assert sorted(text.split(" ")[0] for text in said) == ["", "OutputExistsError"]
    assert f"{tmp_path / 'out'}: " in "".join(said)
    compress(model, tmp_path / "alone")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert not [name for name in names(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_appears_meanwhile_is_kept_unless_overwriting(overwrite: bool, tmp_path: Path) -> None:
    def raced() -> None:
        with output_folder(tmp_path / "out", overwrite) as temporary:
            (temporary / "new.txt").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "other.txt").write_text("other")

    if overwrite:
        raced()
    else:
        with pytest.raises(OutputExistsError):
            raced()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new.txt" if overwrite else "other.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_losing_the_very_last_race_keeps_the_winners_folder(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def raced(source: Path, target: Path) -> None:
        if Path(source).suffix == ".tmp":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "other.txt").write_text("other")
        rename(source, target)

    monkeypatch.setattr(folder_module.os, "rename", raced)
    monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)
    if overwrite:
        (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError) as raised, output_folder(tmp_path / "out", overwrite) as temporary:
        (temporary / "new.txt").write_text("new")
    assert str(raised.value) == (
        f"{tmp_path / 'out'}: expected no such folder, found one that another process has just written; it "
        "was left as it is: run one of the two at a time"
    )
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["other.txt"]


@pytest.mark.parametrize("failure", [PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
def test_a_rename_that_fails_gives_the_old_folder_back(
    failure: BaseException, existing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).suffix == ".tmp":
            raise failure
        rename(source, target)

    monkeypatch.setattr(folder_module.os, "rename", failing)
    monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)
    expected = OutputWriteError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected), output_folder(existing, True) as temporary:
        (temporary / "new.txt").write_text("new")
    assert names(existing.parent) == ["out"] and names(existing) == ["precious.txt"]


def test_the_loser_of_a_race_can_still_read_the_winners_model(
    model: Path, tensors: dict[str, Tensor], compress: Compress, tmp_path: Path
) -> None:
    compress(model, tmp_path / "out")
    with pytest.raises(OutputExistsError):
        compress(model, tmp_path / "out")
    assert load_state_dict(tmp_path / "out").keys() == tensors.keys()
