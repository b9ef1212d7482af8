"""A file appears whole or not at all, and what killed writings leave is removed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from miracle_hub.errors import OutputWriteError
from miracle_hub.files.whole import clear_up, whole_file

KILLED = """
import os, signal, sys
from pathlib import Path
from miracle_hub.files.whole import whole_file
with whole_file(Path(sys.argv[1])) as path:
    path.write_text("half of a fi")
    if sys.argv[2] == "inside":
        os.kill(os.getpid(), signal.SIGKILL)
    replace = Path.replace
    def killed(self, target):
        replace(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
    Path.replace = killed
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_only_once_its_writing_is_over(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with whole_file(tmp_path / "file.txt") as path:
            path.write_text(text)
            assert path.name == "file.txt" and path.parent != tmp_path
            assert (tmp_path / "file.txt").exists() == (text == "second")
        assert (tmp_path / "file.txt").read_text() == text and names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_writing_that_fails_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    with pytest.raises(type(error)), whole_file(tmp_path / "file") as path:
        path.write_text("half of a fi")
        raise error
    assert (tmp_path / "file").read_text() == "before" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("how", ["written again", "cleared up"])
@pytest.mark.parametrize("moment", ["inside", "at the end"])
def test_what_a_killed_writing_leaves_is_hidden_and_goes(moment: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "file"), moment]
    assert subprocess.run(arguments, timeout=600).returncode == -signal.SIGKILL
    expected = "before" if moment == "inside" else "half of a fi"
    assert (tmp_path / "file").read_text() == expected
    left = names(tmp_path)
    assert len(left) == 2 and left[0].startswith(".file.") and left[1] == "file"
    if how == "written again":
        with whole_file(tmp_path / "file") as path:
            path.write_text("after")
    else:
        clear_up(tmp_path / "file")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == ("after" if how == "written again" else expected)


def test_a_place_without_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputWriteError, match="nowhere/file: cannot be written"):
        with whole_file(tmp_path / "nowhere" / "file"):
            pass
