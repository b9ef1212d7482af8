"""Snapshots of repositories of the Hub: folders in its client's cache, all files of one commit."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (httpx's or httpx2's, as the client is built)
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from miracle_hub.errors import SourceError

_BEYOND_THE_END = 416  # a range of a file

# What the client raises: the first for a connection that breaks (the client's own errors are
# OSErrors), the last for an id that is none and for an answer that is no JSON.
CLIENT_ERRORS = (HTTPError, OSError, ValueError)


def snapshot(repo_id: str, *, revision: str | None, **options: Any) -> Path:
    """The folder in the cache that holds a repository's files, all of one commit; see `snapshot_download`.

    Raises:
        SourceError: there is no such repository, or it cannot be read and has not been read before.
    """
    try:
        return download(repo_id, revision=revision, **options)
    except CLIENT_ERRORS as error:
        raise unreadable(repo_id, revision, error) from error


def unreadable(repo_id: str, revision: str | None, error: BaseException) -> SourceError:
    """What to say where a repository cannot be had."""
    return SourceError(
        f"{repo_id}: expected a local folder or a Hub repository; there is no such folder, "
        f"and {_reason(repo_id, revision, error)}"
    )


def download(repo_id: str, **options: Any) -> Path:
    """`snapshot_download`, also where older clients (1.5 is one) give up for good.

    Those keep what a broken download has left and go on from its end, even where it is longer than the file.
    """
    try:
        return Path(snapshot_download(repo_id, **options))
    except HfHubHTTPError as error:
        if error.response.status_code != _BEYOND_THE_END:
            raise
    cache = Path(options.get("cache_dir") or constants.HF_HUB_CACHE)
    for left in (cache / repo_folder_name(repo_id=repo_id, repo_type="model")).glob("blobs/*.incomplete"):
        left.unlink(missing_ok=True)
    return Path(snapshot_download(repo_id, **options))


def _reason(repo_id: str, revision: str | None, error: BaseException) -> str:
    """Why the repository cannot be had, and what to do."""
    if isinstance(error, HFValidationError):
        return "this is no Hub id (name or owner/name); check the spelling"
    if isinstance(error, GatedRepoError):
        return (
            f"the repository is gated; ask for access at {constants.ENDPOINT}/{repo_id}, then log in "
            "with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the Hub has no such repository; check the spelling, or log in with `hf auth login` "
            "if the repository is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no branch, tag or commit {revision!r}; check the spelling"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return (
            f"the cache {constants.HF_HUB_CACHE} cannot be written ({error}); make room there, or set "
            "HF_HOME to a folder that can be written"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not hold all of it; load it "
            "once without"
        )
    if isinstance(error, LocalEntryNotFoundError):  # of which only later clients say why
        error = error.__cause__ or error
    first_line = str(error).strip().partition("\n")[0]
    return (
        f"the Hub could not be read ({type(error).__name__}: {first_line}); check the connection and try "
        "again, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
    )
