"""What a model card states: facts that somebody measured, and where they come from.

Facts about the files are read from them. The others (evaluations, hardware, a certificate, …) are given by
whoever measured them, travel in the card's metadata under the key `miracle`, and hold for the files of one
SHA-256 only.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from miracle_hub.code import Code, SplitCode
from miracle_hub.codec.companions import of_repository
from miracle_hub.codec.inspection import Inspection
from miracle_hub.codec.naming import STREAM
from miracle_hub.codec.network import read_network
from miracle_hub.codec.report import told_by_reason
from miracle_hub.codec.source import files_of_weights
from miracle_hub.errors import DataError
from miracle_hub.files.digests import sha256_of
from miracle_hub.format.network import NetworkHeader, read_start
from miracle_hub.format.spec import item_bits
from miracle_hub.names import near, offer

_PACKAGES = ("miracle-hub", "torch")


@dataclass(frozen=True)
class Evaluation:
    """One figure of the model.

    Attributes:
        what: data, split and unit, such as "STS-B test, Spearman × 100".
        after: of the compressed model; `before` of what was compressed, None where nobody measured it.
        command: what repeats it.
    """

    what: str
    after: float
    before: float | None = None
    command: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What a card states; what is empty or None was not measured, and the card has no line of it.

    Attributes:
        n_bytes: of all safetensors files.
        sha256: of the files of the weights, one after the other.
        n_weights: that these stand for; None where only the module knows.
        digest: of the decoded tensors.
        code: the code's parameters, for people.
        dense_bytes: of the files that were compressed, or else of the same tensors stored plainly.
        versions: of the packages that compressed.
        hardware: that compressed and evaluated.
        calibration: what the model was run on while it was compressed, and what came of it.
        copied: files that hold, or may hold, weights and are as the source had them; and how large.
        left_out: files of the source that are not here, and why.
        plots: paths of PNGs, relative to the card.
        is_stream: of a network's stream, of which its files do not say everything.
        added_to: the base to which the repository is a difference, for people.
        lossless: its tensors are the source's, bit for bit.
    """

    n_bytes: int
    sha256: str
    n_weights: int | None = None
    digest: str = ""
    code: str = ""
    seed: int | None = None
    dense_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ""
    evaluations: tuple[Evaluation, ...] = ()
    certificate: str = ""
    calibration: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()
    is_stream: bool = False
    added_to: str = ""
    lossless: bool = False

    @property
    def bits_per_weight(self) -> float | None:
        """Of whole files."""
        return 8 * self.n_bytes / self.n_weights if self.n_weights else None

    def carried(self) -> dict[str, Any]:
        """Those that cannot be read from the files again, as JSON has them, and the files they hold for."""
        names = (*_CARRIED, *(_OF_MODULE if self.is_stream else ()))
        found = {name: value for name, value in asdict(self).items() if name in names and value}
        if self.evaluations:
            rows = [vars(evaluation).items() for evaluation in self.evaluations]
            found["evaluations"] = [{n: v for n, v in row if v not in (None, "")} for row in rows]
        return json.loads(json.dumps({"sha256": self.sha256, **found})) if found else {}

    def with_carried(self, given: object, where: str) -> "CardFacts":
        """These and what somebody else measured of the same files; of other files nothing is taken over.

        Raises:
            DataError: `given` is not what `carried` gives.
        """
        found = _checked(given, where)
        if found.pop("sha256", self.sha256) != self.sha256:
            return self
        if not self.is_stream:
            found = {name: value for name, value in found.items() if name not in _OF_MODULE}
        return replace(self, **found)


_CARRIED = (
    *("dense_bytes", "versions", "hardware", "evaluations", "calibration", "certificate", "limits"),
    "left_out",
)
# What only the module of a network's stream knows.
_OF_MODULE = ("n_weights", "digest", "code")


def _checked(given: object, where: str) -> dict[str, Any]:
    """Carried facts, typed; a stranger may have written them."""
    texts: dict[str, type] = dict.fromkeys(("sha256", "hardware", "certificate", "digest", "code"), str)
    texts |= {"dense_bytes": int, "n_weights": int}
    lists = {"evaluations": _evaluation, "calibration": _text, "limits": _text, "left_out": _text}
    if not isinstance(given, dict):
        raise _unfit(where, "a JSON object of measured facts", given)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in texts and isinstance(value, texts[name]) and not isinstance(value, bool):
            found[name] = value
        elif name == "versions" and isinstance(value, dict):
            found[name] = {_text(key, where): _text(number, where) for key, number in value.items()}
        elif name in lists and isinstance(value, list):
            found[name] = tuple(lists[name](each, where) for each in value)
        else:
            known = ("sha256", *_CARRIED)
            close = "" if name in known or not near(name, known) else f" ({offer(name, known)})"
            raise _unfit(where, f"facts named {', '.join(known)}{close}", {name: value})
    return found


def _evaluation(given: Any, where: str) -> Evaluation:
    known = {f.name for f in fields(Evaluation)}
    is_complete = isinstance(given, dict) and {"what", "after"} <= set(given) <= known
    if not is_complete or not all(
        isinstance(given.get(name, kind()), kind) for name, kind in (("what", str), ("command", str))
    ):
        raise _unfit(where, "evaluations with what, after and perhaps before and command", given)
    numbers = (given["after"], given.get("before") or 0.0)
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise _unfit(where, "numbers in before and after", given)
    return Evaluation(**given)


def _text(given: Any, where: str) -> str:
    if not isinstance(given, str):
        raise _unfit(where, "a text", given)
    return given


def _unfit(where: str, expected: str, found: object) -> DataError:
    return DataError(f"{where}: expected {expected}, found {str(found)[:80]!r}; correct it, or leave it out")


def read_facts(path: str | Path) -> dict[str, Any]:
    """Facts that a user gives in a JSON file, for `CardFacts.with_carried`.

    Raises:
        DataError: it cannot be read, or is none of them.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, found {error}; correct the file") from error
    _checked(given, str(path))
    return given


def facts_of_folder(folder: Path, inspection: Inspection, sha256: str) -> CardFacts:
    """What the files of a compressed repository say of themselves.

    Args:
        sha256: of its files of weights, one after the other.

    Raises:
        FormatError: and its subclasses: a file is not sound.
    """
    files = files_of_weights(folder)
    coded = [tensor for tensor in inspection.tensors if not tensor.reason]
    codes = {code for tensor in coded for code in tensor.codes}
    if len(files) == 1 and any(tensor.name == STREAM for tensor in inspection.tensors):
        return _facts_of_stream(files[0], sha256)
    rotation = max((tensor.rotation for tensor in coded), default=1)
    return CardFacts(
        n_bytes=inspection.file_bytes,
        sha256=sha256,
        n_weights=inspection.n_weights,
        digest=inspection.digest if coded or inspection.lossless else "",
        code=_code_text(codes, rotation),
        seed=_only_seed(codes),
        dense_bytes=sum(t.n_weights * item_bits(t.dtype) // 8 for t in inspection.tensors),
        copied=tuple(told_by_reason(of_repository(folder).carried)),
        added_to=inspection.base,
        lossless=inspection.lossless,
    )


def facts_of_network(path: Path, header: NetworkHeader | None, n_weights: int) -> CardFacts:
    """The same of a file of `save`, whose stream's header is read with the module; None: it has none."""
    sha256 = sha256_of(path)
    found = _facts_of_stream(path, sha256) if header else CardFacts(path.stat().st_size, sha256)
    if header is not None:
        bits = header.code.message_bits(header.n_values)
        code = f"{found.code}; a message of {bits:,} bits stands for {header.n_values:,} values"
        found = replace(found, code=code, digest=f"{header.digest:016x}")
    return replace(found, n_weights=n_weights)


def _facts_of_stream(path: Path, sha256: str) -> CardFacts:
    stream = read_network(path)[0] or b""
    found, n_tensors, _ = read_start(stream, str(path))
    codes = (found.first, found.rest) if isinstance(found, SplitCode) else (found,)
    rate = " and ".join(f"{code.rate:.4g}" for code in codes)
    code = f"one stream of {n_tensors} tensors, windows of {found.window_bits} bits, {rate} bits per value"
    return CardFacts(path.stat().st_size, sha256, code=code, seed=found.seed, is_stream=True)


def versions() -> dict[str, str]:
    """Of the packages by which this process compresses."""
    return {name: version(name) for name in _PACKAGES}


def _code_text(codes: set[Code], rotation: int) -> str:
    if not codes:
        return ""
    windows = sorted({code.window_bits for code in codes})
    rates = [code.rate for code in codes]
    low, high = (f"{rate:.4g}" for rate in (min(rates), max(rates)))
    rate = f"{low} bits per weight" if low == high else f"{low} to {high} bits per weight, by tensor and row"
    turned = f", Hadamard rotation up to {rotation} wide" if rotation > 1 else ""
    return f"windows of {' and '.join(map(str, windows))} bits, {rate}{turned}"


def _only_seed(codes: set[Code]) -> int | None:
    seeds = {code.seed for code in codes}
    return seeds.pop() if len(seeds) == 1 else None
