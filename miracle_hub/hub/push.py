"""A push that cannot lie: verified before the upload, compared with what the Hub holds after it."""

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.hf_api import RepoFile

from miracle_hub.codec.base import read_base
from miracle_hub.codec.config import read_quantization
from miracle_hub.codec.detector import TO_DECODE, require
from miracle_hub.codec.inspection import inspected
from miracle_hub.codec.naming import CARD, CONFIG, WEIGHTS_ENDING, is_weights
from miracle_hub.codec.source import weight_files
from miracle_hub.codec.verification import Verification
from miracle_hub.errors import DataError, RemoteMismatchError, SourceError, UploadError
from miracle_hub.files.digests import hashes_of, sha256_of
from miracle_hub.files.folders import visible_files
from miracle_hub.files.snapshots import CLIENT_ERRORS
from miracle_hub.hub.card import carried_facts, update_card, verify_with_card
from miracle_hub.hub.facts import CardFacts, facts_of_folder, read_facts
from miracle_hub.hub.plots import read_journal, write_plots

_PLOTS = "plots"


@dataclass(frozen=True)
class PushReport:
    """What the Hub now holds.

    Attributes:
        url: of the commit.
        digest: of the decoded tensors.
        n_files, n_bytes: that were compared with the Hub's, bit for bit.
    """

    url: str
    commit: str
    digest: str
    n_files: int
    n_bytes: int


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    base: str | None = None,
    dense: str | Path | None = None,
    facts: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> PushReport:
    """Verify a compressed folder, write its card and plots, upload it, and compare what the Hub holds.

    Nothing is uploaded unless every tensor decodes to its digest. After an interruption, push again: what has
    arrived is not sent a second time.

    Args:
        folder: what `compress`, `fit` or a mixin's `save_pretrained` wrote; hidden files stay here.
        repo_id: "user/name"; it is created where it does not exist. Files of the weights that it has and
            `folder` has not are removed, so that nothing shadows what is uploaded.
        private: refuse to upload to a repository that is public.
        base: Hub id of the dense model, for the card.
        dense: the folder that was compressed, to verify against; see `verify`.
        facts: a JSON file of measured facts for the card: `hardware`, `versions`, `certificate`, `limits`,
            `evaluations` (a list of `what`, `before`, `after`, `command`).
        revision: a branch, created where it does not exist.
        token: of the Hub; by default the one that `hf auth login` stored.

    Raises:
        SourceError: the folder is missing, or not compressed. SourceKindError: it is another kind of model.
        ChecksumError: it is not sound; nothing was uploaded.
        DataError: the facts are none, or those of other files.
        UploadError: the Hub did not take it. RemoteMismatchError: what it holds differs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(f"{folder}: expected a compressed folder, found none; run miracle compress first")
    require(folder, TO_DECODE)
    _require_named_base(folder)
    verification = verify_with_card(folder, None if dense is None else Path(dense))
    has_weights = any(file.name.endswith(WEIGHTS_ENDING) for file in verification.files)
    if has_weights and not verification.n_coded and not any(file.defect for file in verification.files):
        raise SourceError(
            f"{folder}: expected a compressed folder, found one without any payload; run miracle compress "
            "first, or upload a dense model with hf upload"
        )
    verification.require()
    _complete_card(folder, verification, repo_id, base, dense, facts)
    commit = upload(
        folder, repo_id, _checksums(folder, verification), private=private or None, revision=revision,
        token=token, replace_weights=True,
    )  # fmt: skip
    sizes = [path.stat().st_size for path in visible_files(folder)]
    return PushReport(str(commit), commit.oid, verification.digest, len(sizes), sum(sizes))


def _require_named_base(folder: Path) -> None:
    """
    Raises:
        SourceError: the folder is a difference to a base that no stranger finds.
    """
    base = read_base(read_quantization(folder), folder / CONFIG)
    if base is not None and not base.repository:
        raise SourceError(
            f"{folder}: expected a difference to a base on the Hub, found one to a folder that only its "
            "writer has; push that base, and compress again with its Hub id as base"
        )


def _complete_card(
    folder: Path,
    verification: Verification,
    repo_id: str,
    base: str | None,
    dense: str | Path | None,
    facts: str | Path | None,
) -> None:
    """Plots, and a card of what the files say, what its head carries, and what the caller measured."""
    assert verification.repository is not None
    inspection = inspected(verification.repository)
    found = carried_facts(folder, facts_of_folder(folder, inspection, verification.weights_sha256))
    if dense is not None:
        found = replace(found, dense_bytes=sum(path.stat().st_size for path in weight_files(Path(dense))))
    if facts is not None:
        found = _with_given(found, facts)
    plots = write_plots(inspection, read_journal(folder), folder / _PLOTS)
    names = tuple(f"{_PLOTS}/{plot.path.name}" for plot in plots if not plot.absent)
    update_card(folder, replace(found, plots=names), base=base, repo_id=repo_id, name=base or folder.name)


def _with_given(found: CardFacts, path: str | Path) -> CardFacts:
    given = read_facts(path)
    if given.get("sha256", found.sha256) != found.sha256:
        raise DataError(
            f"{path}: expected facts of the weight files of SHA-256 {found.sha256}, found those of "
            f"{given['sha256']}; measure this model"
        )
    return found.with_carried(given, str(path))


def _checksums(folder: Path, verification: Verification) -> dict[str, str]:
    """SHA-256 of every file to upload: as verified, but for the card and the plots, which are newer."""
    verified = {report.name: report.sha256 for report in verification.files}
    found = {}
    for path in visible_files(folder):
        name = path.relative_to(folder).as_posix()
        is_new = name == CARD or name.startswith(f"{_PLOTS}/")
        found[name] = verified[name] if name in verified and not is_new else sha256_of(path)
    return found


def upload(
    folder: Path,
    repo_id: str,
    checksums: Mapping[str, str],
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str = "Push with miracle-hub",
    path_in_repo: str = "",
    replace_weights: bool = False,
    keep_card: bool = False,
    **options: Any,
) -> CommitInfo:
    """Upload files of a folder, and compare size and hash of each with what the Hub then holds.

    Args:
        checksums: SHA-256 of every file to upload, by its path in the folder.
        replace_weights: remove other files of weights that the repository has.
        keep_card: leave a README.md that the repository has as it is.
        options: others of `upload_folder`.

    Raises:
        UploadError: the Hub did not take them. RemoteMismatchError: what it holds differs.
    """
    api, prefix = HfApi(token=token), f"{path_in_repo}/" if path_in_repo else ""
    with _uploading(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise UploadError(
                f"{repo_id}: expected a private repository, found a public one; nothing was uploaded: change "
                "its visibility on the Hub, or push without private"
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if keep_card and api.file_exists(repo_id, f"{prefix}{CARD}", revision=revision):
            checksums = {name: value for name, value in checksums.items() if name != CARD}
        if replace_weights:
            options["delete_patterns"] = _shadows(api, repo_id, revision, checksums)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, path_in_repo=path_in_repo or None, revision=revision,
            commit_message=message, allow_patterns=[glob.escape(name) for name in checksums], **options,
        )  # fmt: skip
        remote = {
            entry.path: entry
            for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit.oid)
            if isinstance(entry, RepoFile)
        }
    _compare(folder, checksums, remote, prefix, f"{repo_id}, commit {commit.oid}")
    return commit


def _compare(
    folder: Path, checksums: Mapping[str, str], remote: Mapping[str, RepoFile], prefix: str, where: str
) -> None:
    """
    Raises:
        RemoteMismatchError: a file on the Hub is missing or has other bytes.
    """
    for name, sha256 in checksums.items():
        if fault := _difference(folder / name, sha256, remote.get(prefix + name)):
            raise RemoteMismatchError(
                f"{where}: {prefix}{name}: {fault} after the upload; do not use this commit: push again, and "
                "report it if that does not help"
            )


def _shadows(api: HfApi, repo_id: str, revision: str | None, names: Mapping[str, str]) -> list[str]:
    """Files of the weights that a repository has and the new ones have not: readers might prefer them."""
    found = api.list_repo_files(repo_id, revision=revision)
    return [glob.escape(name) for name in found if is_weights(name) and name not in names]


def _difference(path: Path, sha256: str, remote: RepoFile | None) -> str:
    """How a remote file differs from the local one as it was verified; empty if it does not."""
    if remote is None:
        return "expected the file on the Hub, found none"
    size = path.stat().st_size
    if remote.size != size:
        return f"expected {size} bytes on the Hub, found {remote.size}"
    if remote.lfs is not None:
        found, expected = remote.lfs.sha256, sha256
    else:
        local = hashes_of(path)
        found, expected = remote.blob_id, local.git_blob
        if local.sha256 != sha256:
            return "the local file was changed while it was uploaded"
    return "" if found == expected else f"expected content of hash {expected} on the Hub, found {found}"


@contextmanager
def _uploading(repo_id: str) -> Iterator[None]:
    """Turn the client's errors into one that says what to do."""
    try:
        yield
    except UploadError:
        raise
    except (*CLIENT_ERRORS, RuntimeError) as error:  # the last: a file that did not arrive
        status = getattr(getattr(error, "response", None), "status_code", None)
        todo = "push again: what has arrived is not sent a second time"
        if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
            todo = "log in with `hf auth login`, with a token that may write there"
        cause = error.__cause__ or error
        found = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
        raise UploadError(f"{repo_id}: expected the Hub to take the files, found {found}; {todo}") from error
