"""What a compressed repository holds, read from its headers: nothing is decoded."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miracle_hub.code import Code
from miracle_hub.codec.artifact import read_quantization
from miracle_hub.codec.decompress import StoredTensor, stored_digest, stored_tensors
from miracle_hub.codec.plan import OUT_OF_RANGE, reason_plain
from miracle_hub.codec.source import companion_files, list_tensors, weight_files
from miracle_hub.codec.tensor import check_payload
from miracle_hub.errors import FormatError
from miracle_hub.files.container import files_kept_open


@dataclass(frozen=True)
class TensorReport:
    """One tensor. For plain tensors `reason` says why; the code's fields are then empty.

    Attributes:
        bits_per_weight: stored bytes of this tensor over its weights.
        relative_error: ‖decoded - source‖² / ‖source‖², measured by the encoder; 0 for plain ones.
        scale: median prior scale.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    n_weights: int
    reason: str
    codes: tuple[Code, ...] = ()
    rotation: int = 1
    row_scales: bool = False
    scale: float = 0.0
    relative_error: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights if self.n_weights else 0.0


@dataclass(frozen=True)
class Plot:
    """A PNG; `absent` says why there is none, empty if there is one."""

    path: Path
    absent: str = ""


@dataclass(frozen=True)
class Inspection:
    """A repository. `bits_per_weight` counts whole files, `payload_bits_per_weight` payloads alone."""

    tensors: tuple[TensorReport, ...]
    file_bytes: int
    n_weights: int
    digest: str
    plots: tuple[Plot, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.file_bytes / self.n_weights if self.n_weights else 0.0

    @property
    def payload_bits_per_weight(self) -> float:
        coded = [tensor for tensor in self.tensors if not tensor.reason]
        n_weights = sum(tensor.n_weights for tensor in coded)
        return 8 * sum(tensor.n_bytes for tensor in coded) / n_weights if n_weights else 0.0


@files_kept_open()
def inspect_folder(path: Path, stages: int | None = None) -> Inspection:
    """See `miracle_hub.inspect`."""
    stored = stored_tensors(path, stages)
    excluded = _excluded(path)
    reports = [_report(tensor, excluded) for tensor in stored]
    files = {part.stored.path for tensor in stored for part in (tensor, *tensor.refinements)}
    for nested in _copied_files(path):
        reports += _copied_reports(path, nested)
        files.add(nested)
    return Inspection(
        tensors=tuple(reports),
        file_bytes=sum(file.stat().st_size for file in files),
        n_weights=sum(report.n_weights for report in reports),
        digest=stored_digest(stored),
    )


def _excluded(path: Path) -> list[str]:
    facts = read_quantization(path) if path.is_dir() else {}
    names = facts.get("modules_to_not_convert") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(
            f"{path / 'config.json'}: modules_to_not_convert: expected a list of names, found "
            f"{str(names)[:80]!r}; download it again"
        )
    return names


def _copied_files(path: Path) -> list[Path]:
    """safetensors files in subfolders, which are not compressed but are part of the size."""
    if path.is_file():
        return []
    companions = companion_files(path, weight_files(path))
    return [path / relative for relative in companions if relative.suffix == ".safetensors"]


def _copied_reports(folder: Path, file: Path) -> list[TensorReport]:
    where = file.parent.relative_to(folder).as_posix()
    return [
        TensorReport(f"{where}/{t.name}", t.shape, t.dtype, t.n_bytes, t.n_weights, "in a subfolder, copied")
        for t in list_tensors([file])
    ]


def _report(tensor: StoredTensor, excluded: list[str]) -> TensorReport:
    stored, header = tensor.stored, tensor.header
    n_bytes = stored.n_bytes + sum(later.stored.n_bytes for later in tensor.refinements)
    common = (stored.name, tensor.shape, tensor.dtype, n_bytes, tensor.n_weights)
    if header is None:
        reason = reason_plain(stored.name, tensor.dtype, tensor.shape, excluded)
        return TensorReport(*common, reason=reason or OUT_OF_RANGE)
    payload = stored.load().numpy().tobytes()
    start = check_payload(payload, stored.name)[1]
    scales = np.frombuffer(payload, "<u2", header.n_scales, start).astype(np.uint32) << 16
    headers = [header, *(later.header for later in tensor.refinements if later.header is not None)]
    return TensorReport(
        *common,
        reason="",
        codes=tuple(segment.code for each in headers for segment in each.segments),
        rotation=header.rotation,
        row_scales=any(segment.row_scales for segment in header.segments),
        scale=float(np.median(scales.view(np.float32))),
        relative_error=math.prod(each.relative_error for each in headers),
    )
