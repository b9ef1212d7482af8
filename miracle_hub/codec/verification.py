"""Whether a repository is what it claims to be: every byte is read, every tensor decoded and compared."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miracle_hub.code import MAX_STAGES
from miracle_hub.codec.decompress import StoredTensor, read_stage_digests, stored_digest, stored_tensors
from miracle_hub.codec.network import STREAM
from miracle_hub.codec.source import (
    SourceTensor,
    indexed_files,
    list_tensors,
    refuse_leaving,
    weight_files,
)
from miracle_hub.codec.stages import stage_of
from miracle_hub.codec.tensor import TORCH_DTYPES, decode_payload
from miracle_hub.coding.backend import Backend, choose
from miracle_hub.errors import ChecksumError, FormatError, MiracleError, NonFiniteWeightError, SourceError
from miracle_hub.files.container import files_kept_open
from miracle_hub.format.network import read_start
from miracle_hub.format.payload import is_payload

_CHUNK = 1 << 20
_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_INDEX_ENDING = ".safetensors.index.json"
_STAGES_INDEX = re.compile(r"model\.stages-([1-9])\.safetensors\.index\.json")
_SHARD = re.compile(r"model(\.stage-[1-9])?(-\d{5}-of-\d{5})?\.safetensors")
# Of the squared error that a payload promises: its digits in float32, and another order of summation.
_ERROR_TOLERANCE = 1e-4


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
    """

    files: tuple[FileReport, ...]
    digest: str
    n_coded: int
    defects: tuple[str, ...]

    def require(self) -> None:
        """
        Raises:
            ChecksumError: there is a defect; the message has the first.
        """
        for defect in self.defects:
            n_others = len(self.defects) - 1
            raise ChecksumError(f"{defect} (and {n_others} more)" if n_others else defect)


@files_kept_open()
def verify_folder(path: Path, *, dense: Path | None = None, backend: str = "auto") -> Verification:
    """See `miracle_hub.verify`."""
    chosen, n_coded, reports = choose(backend), 0, []
    source = None if dense is None else list_tensors(weight_files(dense))
    for file in [path] if path.is_file() else list(visible_files(path)):
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        n_bytes, sha256 = file.stat().st_size, sha256_of(file)
        try:
            _check_cached(file, sha256)
            found, coded = _check_file(file, chosen)
            n_coded += coded
            reports.append(FileReport(name, n_bytes, sha256, found))
        except MiracleError as error:
            reports.append(FileReport(name, n_bytes, sha256, "", str(error)))
    defects = [report.defect for report in reports if report.defect]
    digest = ""
    if not defects:  # else the whole could only repeat what is wrong with a part
        try:
            digest = _check_whole(path, source, chosen)
        except (FormatError, SourceError) as error:
            defects.append(str(error))
    return Verification(tuple(reports), digest, n_coded, tuple(defects))


def visible_files(folder: Path) -> Iterator[Path]:
    """Every file of a folder but hidden ones, in order.

    Raises:
        SourceError: one is a link that leaves the folder.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            refuse_leaving(path, folder)
            yield path


def sha256_of(*paths: Path) -> str:
    """SHA-256 of files, one after the other, hexadecimal; a piece of them is in memory at a time."""
    checksum = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                checksum.update(chunk)
    return checksum.hexdigest()


def _check_cached(file: Path, sha256: str) -> None:
    """In the Hub's cache a file is a link to a blob that has its hash for a name: SHA-256, or git's.

    Raises:
        ChecksumError: the blob has other content.
    """
    blob = file.resolve()
    if not file.is_symlink() or blob.parent.name != "blobs" or not _HASH.fullmatch(blob.name):
        return
    found = sha256
    if len(blob.name) != len(sha256):
        data = file.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if found != blob.name:
        raise ChecksumError(
            f"{file}: expected content of hash {blob.name}, as the Hub announced it, found {found}; the "
            "cached file is damaged: delete it and download it again"
        )


def _check_file(file: Path, backend: Backend) -> tuple[str, int]:
    """What is in a file, for people, and how many payloads and streams.

    Raises:
        MiracleError: it is not sound.
    """
    if file.suffix == ".safetensors":
        counts = Counter(_check_tensor(tensor, backend) for tensor in list_tensors([file]))
        found = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        return found or "no tensors", sum(n for kind, n in counts.items() if kind != _PLAIN)
    if file.name.endswith(_INDEX_ENDING):
        return _check_index(file), 0
    if file.suffix == ".json":
        _read_json(file)
        return "JSON", 0
    return "read", 0


_PAYLOAD = "decoded, digest agrees"
_STREAM = "network in one stream, CRC-32 agrees (load compares its digest: names and shapes are the module's)"
_PLAIN = "plain, finite"


def _check_tensor(tensor: SourceTensor, backend: Backend) -> str:
    """
    Raises:
        FormatError: a payload or a stream is not sound. NonFiniteWeightError: a plain tensor is not finite.
    """
    values = tensor.load()
    if values.dtype == torch.uint8 and values.ndim == 1:
        if is_payload(values[:4].numpy().tobytes()):
            decode_payload(values, tensor.name, backend=backend)
            return _PAYLOAD
        if tensor.name == STREAM:
            read_start(values.numpy().tobytes(), f"{tensor.path}: {STREAM}")
            return _STREAM
    if (values.is_floating_point() or values.is_complex()) and not _is_finite(values):
        raise NonFiniteWeightError(
            f"{tensor.path}: {tensor.name}: expected finite numbers, found NaN or infinity; download the "
            "file again, or repair the model that it was made from"
        )
    return _PLAIN


def _is_finite(values: Tensor) -> bool:
    few_bits = values.is_floating_point() and values.element_size() == 1  # float8, of which torch knows less
    return bool(torch.isfinite(values.float() if few_bits else values).all())


def _read_json(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: expected JSON, found {error}; download it again") from None


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
    later = _STAGES_INDEX.fullmatch(index.name)
    most = int(later[1]) if later else MAX_STAGES
    shards = [path for path in index.parent.glob("model*.safetensors") if _SHARD.fullmatch(path.name)]
    return [path for path in shards if stage_of(path) <= most]


def _check_whole(path: Path, source: list[SourceTensor] | None, backend: Backend) -> str:
    """The digest; files together are what config.json promises, and what the source was compressed to.

    Raises:
        FormatError, SourceError: they are not.
    """
    stages = len(read_stage_digests(path)) if path.is_dir() else 1
    tensors: list[StoredTensor] = []
    for n in range(1, stages + 1):
        tensors = stored_tensors(path, n if path.is_dir() else None)
    if source is not None:
        _compare(tensors, source, path, backend)
    return stored_digest(tensors)


def _compare(tensors: list[StoredTensor], source: list[SourceTensor], path: Path, backend: Backend) -> None:
    """
    Raises:
        SourceError: the source is another model, or its tensors became others than the files promise.
    """
    originals = {tensor.name: tensor for tensor in source}
    if different := sorted(originals.keys() ^ {tensor.stored.name for tensor in tensors}):
        raise SourceError(
            f"{path}: expected the tensors of the dense model, found {different[0]} in only one of the two; "
            "give the model that was compressed"
        )
    for tensor in tensors:
        original = originals[tensor.stored.name].load()
        fault = _plain_fault(tensor, original) if tensor.header is None else _fault(tensor, original, backend)
        if fault:
            raise SourceError(
                f"{path}: {tensor.stored.name}: {fault}; give the model that was compressed, or compress it "
                "again"
            )


def _plain_fault(tensor: StoredTensor, original: Tensor) -> str:
    """Why a plain tensor is not the source's, rounded to float16 where the file says so."""
    found = tensor.load()
    narrowed = tensor.dtype == "F32" and tensor.stored.dtype == "F16"
    expected = original.half().float() if narrowed else original
    same = found.dtype == expected.dtype and found.shape == expected.shape
    # As bytes: -0.0 counts.
    same = same and torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    return "" if same else "expected the bits of the dense model's plain tensor, found others"


def _fault(tensor: StoredTensor, original: Tensor, backend: Backend) -> str:
    """Why a coded tensor does not have the shape, dtype and squared error that were promised."""
    if tuple(original.shape) != tensor.shape or original.dtype != TORCH_DTYPES[tensor.dtype]:
        return f"expected {original.dtype} {list(original.shape)}, found {tensor.dtype} {list(tensor.shape)}"
    parts = [tensor, *tensor.refinements]
    promised = float(np.prod([part.header.relative_error for part in parts if part.header is not None]))
    decoded = [decode_payload(p.stored.load(), tensor.stored.name, backend=backend)[0].cpu() for p in parts]
    power = float(original.double().square().sum())
    difference = float((sum(decoded[1:], decoded[0]) - original.float()).double().square().sum())
    found = difference / power if power else 0.0
    # Tensors that training coded promise no error.
    if promised == 0 or abs(found - promised) <= _ERROR_TOLERANCE * promised:
        return ""
    return f"expected a relative squared error of {promised:.6g}, found {found:.6g}"
