"""Whether a repository is what it claims to be: every byte is read, every tensor decoded and compared."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from miracle_hub.codec.base import names_left_out
from miracle_hub.codec.companions import of_repository, of_source
from miracle_hub.codec.comparing import TUNED, check_finite, compare, compare_based, compare_plain
from miracle_hub.codec.config import read_quantization
from miracle_hub.codec.detector import TO_COMPRESS, require
from miracle_hub.codec.dtypes import TORCH_DTYPES, is_bytes
from miracle_hub.codec.finite import NON_FINITE
from miracle_hub.codec.guard import Contents
from miracle_hub.codec.guarded import check_config, check_own_guard, unguarded
from miracle_hub.codec.naming import (
    CONFIG,
    INDEX_ENDING,
    STREAM,
    WEIGHTS_ENDING,
    is_of_stage,
    is_shard,
    stage_of,
    stages_of_index,
)
from miracle_hub.codec.payloads import OntoBase, Payload
from miracle_hub.codec.reading import FileReading, Reading, read_all
from miracle_hub.codec.repository import Repository, repository_of
from miracle_hub.codec.source import SourceTensor, indexed_files, list_tensors, weight_files
from miracle_hub.codec.stored import StoredTensor
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.errors import ChecksumError, FormatError, MiracleError, SourceError
from miracle_hub.files.container import files_kept_open
from miracle_hub.files.digests import Hashes, sha256_of
from miracle_hub.format.network import read_start

_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


@dataclass(frozen=True)
class FileReport:
    """One file, read whole.

    Attributes:
        name: relative to the repository.
        found: what was checked in it, for people; `defect` is what is wrong with it, empty if nothing is.
    """

    name: str
    n_bytes: int
    sha256: str
    found: str
    defect: str = ""


@dataclass(frozen=True)
class Verification:
    """What reading all of a repository found.

    Attributes:
        digest: of all payloads, as decoded; empty where the repository as a whole is not sound.
        n_coded: payloads and networks' streams in its files.
        defects: of files and of the repository as a whole; none means that it is sound.
        weights_sha256: of the files of weights right in the folder, one after the other.
        repository: that the files were found to be; None where there is a defect.
    """

    files: tuple[FileReport, ...]
    digest: str
    n_coded: int
    defects: tuple[str, ...]
    weights_sha256: str = ""
    repository: Repository | None = field(default=None, repr=False)

    def require(self) -> None:
        """
        Raises:
            ChecksumError: there is a defect; the message has the first.
        """
        for defect in self.defects:
            n_others = len(self.defects) - 1
            raise ChecksumError(f"{defect} (and {n_others} more)" if n_others else defect)


@files_kept_open()
def verify_folder(
    path: Path, *, dense: Path | None = None, backend: str = "auto", base: Path | None = None
) -> Verification:
    """See `miracle_hub.verify`. Every file is read once; with `dense`, those of several stages twice, as are
    those of differences to a base.
    """
    copied = set() if path.is_file() else set(of_repository(path).weights)
    lists = (_listed(path, NON_FINITE), _listed(path, TUNED))
    check = _Check(choose(backend), _originals(dense), copied, *lists)
    reading = read_all(path, check.look)
    reports = [check.report(file) for file in reading.files]
    defects, repository = [report.defect for report in reports if report.defect], None
    if dense is not None and path.is_dir():
        defects += _changed_companions(reading, dense)
    if not defects:  # else the whole could only repeat what is wrong with a part
        try:
            repository = _check_whole(reading, check, base)
        except (FormatError, SourceError) as error:
            defects.append(str(error))
    digest = repository.digest if repository else ""
    return Verification(
        tuple(reports), digest, check.n_coded, tuple(defects), reading.weights_sha256, repository
    )


def _originals(dense: Path | None) -> dict[str, SourceTensor] | None:
    if dense is None:
        return None
    require(dense, TO_COMPRESS)
    return {tensor.name: tensor for tensor in list_tensors(weight_files(dense))}


def _changed_companions(reading: Reading, dense: Path) -> Iterator[str]:
    """What is wrong with files that the dense model has beside its weights, and that were to be copied."""
    found = {file.name: file.hashes.sha256 for file in reading.files}
    for name in of_source(dense, weight_files(dense)).carried:
        if name not in found:
            yield f"{reading.path}: expected {name} of {dense}, found none; compress the model again"
        elif found[name] != sha256_of(dense / name):
            yield f"{reading.path / name}: expected the bytes of {dense / name}, found others; copy it again"


def _listed(path: Path, field: str) -> list[str]:
    """Tensors that a folder's config.json names in a field; what is wrong with it is found later."""
    try:
        found = read_quantization(path).get(field) if path.is_dir() else None
    except SourceError:
        found = None
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


_PAYLOAD = "decoded, digest agrees"
_STREAM = "network in one stream, CRC-32 agrees (load compares its digest: names and shapes are the module's)"
_PLAIN, _TUNED = "plain, finite", "plain, finite, tuned to what is coded"


class _Check:
    """What is asked of every tensor on the way, and of every file at its end."""

    def __init__(
        self,
        backend: Backend,
        originals: dict[str, SourceTensor] | None,
        copied: set[Path],
        non_finite: Collection[str],
        tuned: Collection[str],
    ) -> None:
        self.backend, self.originals = backend, originals
        self.copied, self.non_finite, self.tuned = copied, non_finite, tuned
        self.kinds: dict[Path, Counter[str]] = {}

    @property
    def n_coded(self) -> int:
        """Payloads and streams so far."""
        return sum(
            n for kinds in self.kinds.values() for kind, n in kinds.items() if kind in (_PAYLOAD, _STREAM)
        )

    def look(self, tensor: StoredTensor, payload: Payload | None, entry: Tensor) -> None:
        """
        Raises:
            FormatError: a payload or a stream is not sound. NonFiniteWeightError: a plain tensor is not
            finite. SourceError: it is not what the dense model's tensor was compressed to.
        """
        path = tensor.parts[0].path
        self.kinds.setdefault(path, Counter())[self._kind(tensor, payload, entry)] += 1

    def _kind(self, tensor: StoredTensor, payload: Payload | None, entry: Tensor) -> str:
        is_copied = tensor.parts[0].path in self.copied  # its names are not those of the model
        original = None if is_copied else (self.originals or {}).get(tensor.name)
        if isinstance(payload, OntoBase):  # decoded when the base is at hand
            return _PAYLOAD
        if payload is not None:
            # What stages, and differences to a base, add up to is known when all of them were read.
            is_part = is_of_stage(tensor.parts[0].path) or payload.facts.is_difference
            is_whole = not is_part or tensor.is_exact
            weights = payload.decode(self.backend, rounded=is_whole)
            if is_whole:
                check_finite(tensor, weights, self.non_finite)
            if is_whole and original is not None:
                compare(tensor, weights.cpu(), original, lambda: payload.decode(self.backend).cpu())
            return _PAYLOAD
        if tensor.name == STREAM and is_bytes(entry):
            read_start(entry.numpy().tobytes(), f"{tensor.parts[0].path}: {STREAM}")
            return _STREAM
        check_finite(tensor, entry, self.non_finite)
        is_tuned = not is_copied and tensor.name in self.tuned
        if original is not None:
            compare_plain(tensor, entry, original, is_tuned)
        return _TUNED if is_tuned else _PLAIN

    def report(self, file: FileReading) -> FileReport:
        """What is in a file, for people."""
        found, defect = "", file.defect
        try:
            _check_cached(file.path, file.hashes)
            found = self._found(file)
        except MiracleError as error:
            defect = str(error)  # that a cached file is damaged says more than what is in it
        return FileReport(file.name, file.hashes.n_bytes, file.hashes.sha256, "" if defect else found, defect)

    def _found(self, file: FileReading) -> str:
        """
        Raises:
            FormatError: and its subclasses: it is JSON that is none, an index that does not fit, or a
                config.json that is another than its guard states.
        """
        if file.contents is not None:
            kinds = sorted(self.kinds.get(file.path, Counter()).items())
            found = ", ".join(f"{n} {kind}" for kind, n in kinds) or "no tensors"
            return "; ".join(filter(None, (found, _said_of_guard(file.contents))))
        if file.name.endswith(INDEX_ENDING):
            return _check_index(file.path)
        return _check_json(file.path) if file.path.suffix == ".json" else "read"


def _check_cached(file: Path, hashes: Hashes) -> None:
    """In the Hub's cache a file is a link to a blob that has its hash for a name: SHA-256, or git's.

    Raises:
        ChecksumError: the blob has other content.
    """
    blob = file.resolve()
    if not file.is_symlink() or blob.parent.name != "blobs" or not _HASH.fullmatch(blob.name):
        return
    found = hashes.sha256 if len(blob.name) == len(hashes.sha256) else hashes.git_blob
    if found != blob.name:
        raise ChecksumError(
            f"{file}: expected content of hash {blob.name}, as the Hub announced it, found {found}; the "
            "cached file is damaged: delete it and download it again"
        )


def _said_of_guard(contents: Contents) -> str:
    return unguarded(contents) if contents.stated is None else "guard agrees"


def _check_json(file: Path) -> str:
    """
    Raises:
        FormatError: it is none. ChecksumError: a config.json is another than its guard states.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: expected JSON, found {error}; download it again") from None
    if file.name != CONFIG or not isinstance(found, dict):
        return "JSON"
    guards = [check_config(file, found), check_own_guard(file, found)]
    return "JSON, guard agrees" if any(guards) else "JSON"


def _check_index(index: Path) -> str:
    """
    Raises:
        FormatError: it does not name exactly the tensors of its files.
    """
    files = {*indexed_files(index.parent, index), *_shards_of(index)}
    held = {t.name: t.path.name for t in list_tensors(sorted(files))}
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if named != held:
        wrong = sorted(name for name in named.keys() | held.keys() if named.get(name) != held.get(name))
        raise FormatError(
            f"{index}: expected the file of every tensor and no others, found {wrong[0]} in "
            f"{named.get(wrong[0], 'no file')}, which is in {held.get(wrong[0], 'no file')}; download the "
            "folder again"
        )
    return f"index of {len(held)} tensors"


def _shards_of(index: Path) -> list[Path]:
    """Files that an index should name, by their own names."""
    most = stages_of_index(index)
    shards = [path for path in index.parent.glob(f"model*{WEIGHTS_ENDING}") if is_shard(path.name)]
    return [path for path in shards if stage_of(path) <= most]


def _check_whole(reading: Reading, check: _Check, base: Path | None) -> Repository:
    """Files together are what config.json promises, and what the source was compressed to.

    Raises:
        FormatError, SourceError: they are not.
    """
    repository = repository_of(reading, base)
    is_guarded = any(file.contents and file.contents.stated for file in reading.files)
    if not (check.n_coded or repository.facts or is_guarded or check.originals):
        raise SourceError(
            f"{reading.path}: expected a compressed folder, found one without any payload, and so without a "
            "digest to compare; run miracle compress first, or compare with --dense"
        )
    if check.originals is not None:
        _require_same_names(repository, check.originals)
    _check_sums(repository, check)
    return repository


def _require_same_names(repository: Repository, originals: dict[str, SourceTensor]) -> None:
    """
    Raises:
        SourceError: the source has other tensors.
    """
    if different := sorted(originals.keys() ^ {tensor.name for tensor in repository.tensors}):
        raise SourceError(
            f"{repository.path}: expected the tensors of the dense model, found {different[0]} in only one "
            "of the two; give the model that was compressed"
        )


def _check_sums(repository: Repository, check: _Check) -> None:
    """What stages, or differences to a base, add up to is finite, and what they promise.

    Raises:
        SourceError: it is not. BaseModelError: the base is another.
    """
    left_out = names_left_out(repository.facts, repository.path)
    for tensor in repository.tensors:
        if tensor.base is not None:
            original = None if tensor.name in left_out else (check.originals or {}).get(tensor.name)
            _check_based(tensor, original, check)
            continue
        # Only float16 has a range that a sum of finite parts can leave.
        if len(tensor.parts) > 1 and (check.originals is not None or tensor.dtype == "F16"):
            total, dtype = tensor.sum(check.backend).cpu(), TORCH_DTYPES[tensor.dtype]
            check_finite(tensor, total.to(dtype), check.non_finite)
            if check.originals is not None:
                compare(tensor, total.to(dtype), check.originals[tensor.name], lambda total=total: total)


def _check_based(tensor: StoredTensor, original: SourceTensor | None, check: _Check) -> None:
    """A tensor with a base; `original` is None where nothing can be compared.

    Raises:
        SourceError: it is not what was compressed. BaseModelError: the base is another.
    """
    weights = tensor.load(backend=check.backend).cpu()
    if tensor.is_coded:
        check_finite(tensor, weights, check.non_finite)
    if original is not None:
        compare_based(tensor, weights, original)
