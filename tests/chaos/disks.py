"""Disks that are full or read-only: small file systems of their own, mounted for one process.

A process may mount what it likes in a user namespace of its own, without being root; the mount is gone with
it. Where the system does not let it, files may not grow beyond the disk's size instead, or nothing is tried.
"""

import ctypes
import os
import random
import re
import resource
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from torch import Tensor

import miracle_hub
from miracle_hub.errors import OutputWriteError, SourceError

from .children import forked
from .environment import HUB, WORK
from .kills import reference
from .verbs import VERBS, Verb, compressed, output, tree

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT = 1, 32
_PAGE, _ROOM = 4096, 1 << 26
_FULL = "No space left on device|File too large|expected room for a checkpoint"


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


def enter_namespace() -> None:
    """Let this process, which must have one thread, mount things that no other one sees.

    Raises:
        OSError: the system does not.
    """
    ids = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    for name, own in ids.items():
        Path(f"/proc/self/{name}").write_text(f"0 {own} 1")


def mount(folder: Path, n_bytes: int, flags: int = 0) -> None:
    """An empty disk of a size in place of a folder, or the one that is there changed."""
    folder.mkdir(parents=True, exist_ok=True)
    _call("mount", b"none", os.fsencode(folder), b"tmpfs", flags, f"size={n_bytes}".encode())


@cache
def has_namespaces() -> bool:
    def probe() -> None:
        enter_namespace()
        mount(WORK / "probe", _PAGE)

    try:
        return forked(probe) == ""
    except AssertionError:
        return False


def leave_room(folder: Path, n_bytes: int) -> None:
    """Let so many bytes more be written on a folder's own disk, or, without one, into any file."""
    if has_namespaces():
        mount(folder, shutil.disk_usage(folder).used + n_bytes, _MS_REMOUNT)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))


def write_on(verb: Verb, folder: Path, n_bytes: int) -> None:
    """Run a verb on a disk with little room, and once more when there is enough.

    Raises:
        OutputWriteError: there was too little, and everything else is as it should be.
    """
    if has_namespaces():
        enter_namespace()
        mount(folder, _ROOM)
    verb.prepare(folder)
    leave_room(folder, n_bytes)
    before = tree(folder)
    try:
        verb.run(folder)
    except OutputWriteError:
        assert verb.lives > 1 or tree(folder) == before, "something was left behind"
        assert verb.made(folder) == reference(verb.name).before
        leave_room(folder, _ROOM)
        verb.run(folder)
        raise
    finally:
        assert verb.made(folder) == reference(verb.name).made


def read_through(home: Path, n_bytes: int) -> None:
    """Load from the Hub into a cache on a small disk, then a read-only one, then where there is room.

    Raises:
        SourceError: the disk was too small; a read-only one said the same, and with room all is well.
    """
    enter_namespace()
    mount(home, n_bytes)
    expected = miracle_hub.load_state_dict(compressed())
    failure = _load_error(expected)
    mount(home, n_bytes, _MS_REMOUNT | _MS_RDONLY)
    assert bool(_load_error(expected)) == bool(failure)  # what was read before is read again
    mount(home, _ROOM, _MS_REMOUNT)
    assert _load_error(expected) is None
    if failure:
        raise failure


def _load_error(expected: dict[str, Tensor]) -> SourceError | None:
    try:
        found = miracle_hub.load_state_dict("user/stored")
    except SourceError as error:
        assert f"the cache {HF_HUB_CACHE} cannot be written" in str(error), error
        return error
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return None


def starve(seed: int, number: int, ends: Counter[str]) -> None:
    """One verb, or a load from the Hub, on a disk of a random size.

    Raises:
        AssertionError: it ended otherwise than in success or a named error, or left something behind.
    """
    rng = random.Random(f"disk {seed} {number}")
    names = [name for name, verb in VERBS.items() if verb.made is output]
    if has_namespaces():
        names.append("load")
    name = names[number % len(names)]
    most = sum(map(len, (tree(compressed()) if name == "load" else reference(name).written).values()))
    most *= 4 if name == "fit" else 1  # for it wants room for checkpoints that are gone in the end
    n_bytes = rng.randrange(_PAGE, most + 12 * _PAGE, _PAGE)
    folder = WORK / "disk"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        if name == "load":
            HUB.add("user/stored", compressed())
            said = forked(lambda: read_through(WORK / "home", n_bytes))
        else:
            said = forked(lambda: write_on(VERBS[name], folder, n_bytes))
        kind = said.partition(":")[0]
        assert not said or (kind in ("OutputWriteError", "SourceError") and re.search(_FULL, said)), said
    except BaseException:
        print(f"disk {number} of seed {seed}: {name} on {n_bytes} bytes")
        raise
    ends[f"{name} on a small disk: {kind or 'done'}"] += 1
