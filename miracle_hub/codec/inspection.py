"""What a compressed repository holds, read from its headers: nothing is decoded."""

from dataclasses import dataclass
from pathlib import Path

from miracle_hub.code import Code
from miracle_hub.codec.base import said_of_base
from miracle_hub.codec.companions import of_repository
from miracle_hub.codec.config import LOSSLESS, excluded_names
from miracle_hub.codec.naming import WEIGHTS_ENDING, is_variant
from miracle_hub.codec.plan import Why, why_plain
from miracle_hub.codec.repository import Repository, open_repository
from miracle_hub.codec.source import SourceTensor, list_tensors
from miracle_hub.codec.stored import StoredTensor
from miracle_hub.files.container import files_kept_open

# The others depend on what a compression was told, which files do not say.
_PROVEN = (Why.NOT_FLOATING, Why.OTHER_DTYPE, Why.EMPTY, Why.EXCLUDED)


@dataclass(frozen=True)
class TensorReport:
    """One tensor.

    Attributes:
        reason: of a plain or exact tensor, what the files prove of why; empty for a coded one.
        n_bytes: that are stored of it.
        codes: of windows and steps, part after part.
        relative_error: ‖decoded - source‖² / ‖source‖², in the dtype of the source, measured by the encoder;
            0 for plain and exact ones; of a difference to a base over the square of that.
        scale: median prior scale.
        base: the base's tensor that it is, or is a difference to; empty if it is neither.
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
    codec: str = ""
    base: str = ""

    @property
    def rate(self) -> float:
        """Stored bits of this tensor over its weights."""
        return 8 * self.n_bytes / self.n_weights if self.n_weights else 0.0


@dataclass(frozen=True)
class Plot:
    """A PNG; `absent` says why there is none, empty if there is one."""

    path: Path
    absent: str = ""


@dataclass(frozen=True)
class Inspection:
    """A repository. `bits_per_weight` counts whole files, `payload_rate` payloads alone; `base` is the model
    whose tensors it adds to, for people; `lossless` says that it holds every bit of its source.
    """

    tensors: tuple[TensorReport, ...]
    file_bytes: int
    n_weights: int
    digest: str
    plots: tuple[Plot, ...] = ()
    base: str = ""
    lossless: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Of whole files."""
        return 8 * self.file_bytes / self.n_weights if self.n_weights else 0.0

    @property
    def payload_rate(self) -> float:
        """Bits of payloads, headers and scales included, per coded weight."""
        coded = [tensor for tensor in self.tensors if not tensor.reason]
        n_weights = sum(tensor.n_weights for tensor in coded)
        return 8 * sum(tensor.n_bytes for tensor in coded) / n_weights if n_weights else 0.0


@files_kept_open()
def inspect_folder(path: Path, stages: int | None = None, base: Path | None = None) -> Inspection:
    """See `miracle_hub.inspect`."""
    return inspected(open_repository(path, stages, base))


def inspected(repository: Repository) -> Inspection:
    """What a repository holds that was opened before."""
    path = repository.path
    excluded = excluded_names(dict(repository.facts), path)
    reports = [_report(tensor, excluded) for tensor in repository.tensors]
    files = set(repository.files)
    for nested in _copied_files(path):
        reports += _copied_reports(path, nested)
        files.add(nested)
    return Inspection(
        tensors=tuple(reports),
        file_bytes=sum(file.stat().st_size for file in files),
        n_weights=sum(report.n_weights for report in reports),
        digest=repository.digest,
        base=said_of_base(repository.facts, path),
        lossless=repository.facts.get(LOSSLESS) is True
        and all(tensor.is_exact or not tensor.is_coded for tensor in repository.tensors),
    )


def _copied_files(path: Path) -> list[Path]:
    """safetensors files that are not compressed but are part of the size; a variant is another network."""
    found = [] if path.is_file() else of_repository(path).weights
    return [file for file in found if not (file.parent == path and is_variant(file.name))]


def _copied_reports(folder: Path, file: Path) -> list[TensorReport]:
    inner = file.parent.relative_to(folder).as_posix()
    where, reason = inner, "in a subfolder, copied"
    if inner == ".":
        where, reason = file.name.removesuffix(WEIGHTS_ENDING), "beside the model, copied"
    return [_copied_report(where, tensor, reason) for tensor in list_tensors([file])]


def _copied_report(where: str, t: SourceTensor, reason: str) -> TensorReport:
    name = f"{where}/{t.name}"
    return TensorReport(name, t.shape, t.dtype, t.n_bytes, t.n_weights, reason)


def _report(tensor: StoredTensor, excluded: list[str]) -> TensorReport:
    common = (tensor.name, tensor.shape, tensor.dtype, tensor.stored_bytes, tensor.n_weights)
    if tensor.base is not None and not tensor.is_coded:
        return TensorReport(*common, reason="the base's", base=tensor.base.name)
    if not tensor.is_coded:
        return TensorReport(*common, reason=_reason(tensor, excluded))
    first = tensor.facts[0]
    base = "" if tensor.base is None else tensor.base.name
    if first.is_exact:
        reason = "every bit kept, beyond the base's" if base else "every bit kept, in fewer bytes"
        return TensorReport(*common, reason=reason, codec=first.codec, base=base)
    return TensorReport(
        *common,
        reason="",
        codes=tuple(code for facts in tensor.facts for code in facts.codes),
        rotation=first.rotation,
        row_scales=first.row_scales,
        scale=first.scale,
        relative_error=tensor.relative_error,
        codec=first.codec,
        base=base,
    )


def _reason(tensor: StoredTensor, excluded: list[str]) -> str:
    """What the files prove of why a tensor is plain: dtype, emptiness, or that config.json names it."""
    why = why_plain(tensor, excluded)
    if why in _PROVEN:
        return why.text(tensor.dtype)
    return "stored plainly, narrowed from F32 to F16" if tensor.is_narrowed else "stored plainly"
