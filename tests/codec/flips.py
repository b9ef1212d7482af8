"""Random damage to repositories, and what every reader makes of it: an error, the same, or silence.

A case is one damage (a flipped bit, a truncation, inserted bytes, two tensors that changed places) to one
file of one repository, read by one reader. It is drawn from a seed and a number, which reproduce it.
"""

import random
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from safetensors import SafetensorError

from miracle_hub.errors import MiracleError
from tests.codec.damage import damage
from tests.codec.subjects import Found, Reader, Subject

# Of our own readers a MiracleError is asked for. transformers opens config.json, index and weights before it
# calls the plug-in, and says in its own words what it cannot read.
LOUD: dict[str, tuple[type[Exception], ...]] = {
    # Not JSON (OSError); no such model type, or an option that a configuration refuses (ValueError); no such
    # dtype in torch (AttributeError); the method's name is lost, so that payloads have the wrong sizes
    # (RuntimeError).
    "config": (OSError, ValueError, AttributeError, RuntimeError),
    # Not JSON (ValueError), without a weight_map (KeyError), or with the name of no file (OSError).
    "index": (ValueError, KeyError, OSError),
    # A header that is not sound, of which the dtype was to be read.
    "weights": (SafetensorError, OSError),
}
TRANSFORMERS = ("from_pretrained", "keep_compressed")


@dataclass
class Counts:
    """Outcomes by reader, kind of file and outcome; and what was silent, or loud without a name."""

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Lines of figures, a reader and a kind of file each."""
        kinds = ("equal", "named", "unnamed", "SILENT")
        lines = [f"{'reader':24}{'file':8}" + "".join(f"{kind:>9}" for kind in kinds)]
        for reader, file in sorted({key[:2] for key in self.outcomes}):
            figures = "".join(f"{self.outcomes[reader, file, kind]:9}" for kind in kinds)
            lines.append(f"{reader:24}{file:8}{figures}")
        totals = {kind: sum(n for key, n in self.outcomes.items() if key[2] == kind) for kind in kinds}
        lines.append(f"{'all':32}" + "".join(f"{totals[kind]:9}" for kind in kinds))
        return "\n".join(lines)


def sweep(all_subjects: list[Subject], cases: range, seed: int = 0) -> Counts:
    """Cases of the given numbers, each undone before the next."""
    counts = Counts()
    with quiet():
        for number in cases:
            draw = random.Random(f"damage {seed} {number}")
            subject = draw.choice(all_subjects)
            file = draw.choice(subject.files)
            is_weights = file.endswith(".safetensors")
            kind = "weights" if is_weights else "config" if file == "config.json" else "index"
            reader = draw.choice([r for r in subject.readers if is_weights or not r.endswith("(file)")])
            expected = subject.expected(reader, file)
            path = subject.folder / file
            whole = path.read_bytes()
            what, left = damage(whole, file, draw)
            path.write_bytes(left)
            try:
                allowed = (MiracleError, *(LOUD[kind] if reader in TRANSFORMERS else ()))
                outcome, said = outcome_of(subject.readers[reader], subject.folder, path, expected, allowed)
            finally:
                path.write_bytes(whole)
            counts.outcomes[reader, kind, outcome] += 1
            if outcome in ("named", "unnamed"):
                counts.errors[reader, said] += 1
            if outcome in ("unnamed", "SILENT"):
                where = f"case {number} of seed {seed}: {subject.name}, {reader}, {file}"
                counts.faults.append(f"{outcome}: {where}: {what}: {said}")
    return counts


def outcome_of(
    read: Reader, folder: Path, path: Path, expected: Found, allowed: tuple[type[Exception], ...]
) -> tuple[str, str]:
    """Which of the four outcomes, and the error's name or what differs."""
    try:
        found = read(folder, path)
    except allowed as error:
        return "named", type(error).__name__
    except Exception as error:
        return "unnamed", f"{type(error).__name__}: {str(error)[:80]}"
    if found == expected:
        return "equal", ""
    differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return "SILENT", ", ".join(differ[:3])


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' reports and bars would fill pages."""
    logging, before = transformers.utils.logging, transformers.utils.logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
