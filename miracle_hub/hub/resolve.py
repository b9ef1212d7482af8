"""A folder or a Hub id → a local folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from miracle_hub.code import MAX_STAGES
from miracle_hub.codec.detector import TO_DECODE, Taken, detect, refuse_others, require
from miracle_hub.codec.kinds import Found, Kind, refusal, told_by_names
from miracle_hub.codec.naming import WEIGHTS_ENDING, stage_patterns
from miracle_hub.codec.purpose import STAYING_PATTERNS, why_staying
from miracle_hub.codec.source import names_in
from miracle_hub.files.snapshots import CLIENT_ERRORS, download, snapshot, unreadable


def local_folder(
    source: str | Path, revision: str | None = None, stages: int | None = None, taken: Taken = TO_DECODE
) -> Path:
    """The folder (or file) itself, or a snapshot of the Hub repository of that id.

    Args:
        stages: files of later ones are not downloaded; None means all.
        taken: the kinds of models that the verb takes.

    Raises:
        SourceError: there is neither, or the Hub cannot be read and has not been read before.
        MissingWeightsError: the repository has no safetensors file.
        SourceKindError: it is a model of another kind. PickleRefusedError: it has only pickle weights. Where
            names of files tell it, nothing is downloaded.
    """
    if os.path.exists(source):  # unlike Path.exists, False for names that no file can have
        require(Path(source), taken)
        return Path(source)
    listed = _listed(str(source), revision)
    if isinstance(listed, list):
        _refuse_by_names(str(source), listed, taken)
    patterns = [*STAYING_PATTERNS, *stage_patterns(after=stages or MAX_STAGES)]
    folder = _snapshot_of(str(source), revision, listed, ignore_patterns=patterns)
    if not any(folder.glob(f"*{WEIGHTS_ENDING}")):
        raise refusal(taken.expected, Found(Kind.NOTHING, str(source)))
    found = detect(folder)
    refuse_others(found._replace(where=str(source)) if found.where == str(folder) else found, taken)
    return folder


def _snapshot_of(
    repo_id: str, revision: str | None, listed: list[str] | BaseException, **options: Any
) -> Path:
    """See `snapshot`; where the Hub could not even be asked, it is not asked again: what is cached must do.

    Raises:
        SourceError: see `snapshot`.
    """
    if isinstance(listed, list):
        return snapshot(repo_id, revision=revision, **options)
    try:
        if isinstance(listed, RevisionNotFoundError):
            raise listed
        return download(repo_id, revision=revision, local_files_only=True, **options)
    except CLIENT_ERRORS:
        raise unreadable(repo_id, revision, listed) from listed


def not_downloaded(source: str | Path, revision: str | None, folder: Path) -> dict[str, str]:
    """Files of a Hub repository that its snapshot has not, and why; none of a local folder.

    Offline nobody can tell them.
    """
    if os.path.exists(source):
        return {}
    listed = _listed(str(source), folder.name if folder.parent.name == "snapshots" else revision)
    names = listed if isinstance(listed, list) else []
    left = [name for name in names if not (folder / name).exists()]
    return {name: why_staying(name) or "not downloaded" for name in left}


def file_names(source: str | Path) -> list[str]:
    """Paths of all files of a folder or a Hub repository; none where the Hub cannot be asked."""
    if os.path.exists(source):
        return names_in(Path(source))
    listed = _listed(str(source), None)
    return listed if isinstance(listed, list) else []


def require_kind(source: str | Path, taken: Taken, revision: str | None = None) -> None:
    """Refuse what a verb does not take that loads its source by itself.

    Raises:
        SourceError: and its subclasses, see `local_folder`; of a Hub repository, as far as JSON and the names
            of its files tell.
    """
    if os.path.exists(source):
        found = detect(Path(source))
        if found.kind is Kind.NOTHING:
            raise refusal(taken.expected, found)
        refuse_others(found, taken)
        return
    listed = _listed(str(source), revision)
    folder = _snapshot_of(str(source), revision, listed, allow_patterns=["*.json"])
    if isinstance(listed, list):
        _refuse_by_names(str(source), listed, taken)
        refuse_others(detect(folder, listed), taken)


def _refuse_by_names(repo_id: str, names: Sequence[str], taken: Taken) -> None:
    """
    Raises:
        SourceError: and its subclasses: names of files tell that there is nothing that the verb takes.
    """
    found = told_by_names(repo_id, names)
    if found is not None:
        refuse_others(found, taken)


def _listed(repo_id: str, revision: str | None) -> list[str] | BaseException:
    """Paths of a repository's files, or why the Hub does not tell them."""
    try:
        info = HfApi().model_info(repo_id, revision=revision)
    except CLIENT_ERRORS as error:
        return error
    return [file.rfilename for file in info.siblings or ()]
