"""What a model is run on while it is compressed: the user's own data, or inputs of its own making."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from miracle_hub.calibrate.given import rows_of
from miracle_hub.calibrate.modality import inputs_by_name, modality_of, takes_texts
from miracle_hub.calibrate.rows import LEAST_ROWS, Found, Row, order_of, tokens_of
from miracle_hub.calibrate.self_made import self_made
from miracle_hub.errors import CalibrationError, DataError

SELF = "self"
Refusal: TypeAlias = type[DataError] | type[CalibrationError]  # of what was given, or of what was made
# One row of so many is kept aside, and of few rows more, up to some: choices.
_HELD_OUT, _HELD_OUT_OF_FEW, _FEW = 8, 4, 4


@dataclass(frozen=True)
class Inputs:
    """What a model is run on while it is compressed, without labels.

    Attributes:
        batches: keyword arguments of the model's forward, to calibrate on. Rows of a batch have one length,
            and no padding.
        held_out: the same of rows kept aside, equal to none of `batches`, by which it is decided what is
            accepted.
        said: what they are, for the report and the card.
        n_tokens: in `batches`, as `tokens_of` counts them.
        digest: SHA-256 of all tensors, by which a resumed run knows changed data.
    """

    batches: tuple[dict[str, Tensor], ...]
    held_out: tuple[dict[str, Tensor], ...]
    said: str
    n_tokens: int
    digest: str

    def tensors(self) -> dict[str, Tensor]:
        """All batches, for a file; see `of_tensors`."""
        parts = {"batches": self.batches, "held_out": self.held_out}
        return {
            f"{part}.{i}.{name}": values
            for part, batches in parts.items()
            for i, batch in enumerate(batches)
            for name, values in batch.items()
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What they are beside their tensors, as JSON has it: the names of every batch in their order too."""
        names = {"batches": [list(b) for b in self.batches], "held_out": [list(b) for b in self.held_out]}
        return {"said": self.said, "n_tokens": self.n_tokens, "digest": self.digest, **names}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "Inputs":
        """What `tensors` and `facts` are of."""
        batches, held_out = (
            tuple({n: tensors[f"{part}.{i}.{n}"] for n in names} for i, names in enumerate(facts[part]))
            for part in ("batches", "held_out")
        )
        return cls(batches, held_out, facts["said"], facts["n_tokens"], facts["digest"])


def inputs_of(
    model: nn.Module,
    folder: Path,
    data: str | Path | Any,
    *,
    n_tokens: int,
    max_length: int | None = None,
    batch_rows: int = 8,
    batch_tokens: int | None = None,
    seed: int = 0,
) -> Inputs:
    """Inputs of a model, and some of them held out. The same arguments give the same inputs.

    Args:
        model: dense, in evaluation mode. It may write its own texts and answers.
        folder: with its tokenizer, image processor or feature extractor, where it needs one.
        data: "self" for inputs of the model's own making; or texts (txt, csv, tsv, json, jsonl, parquet), a
            folder of images or of wav files, an npz or npy of the model's inputs, a Hub id; or, in Python, a
            list of texts, a data set of `datasets`, a tensor, arrays by name, or an iterable of batches.
            Labels are left out.
        n_tokens: about how many to calibrate on; a seventh of it is held out besides, of few rows up to a
            quarter of all.
        max_length: tokens of a text at most; by default 512 of given texts and 256 of self-made ones, and
            never more than the model has positions.
        batch_rows: rows of a batch at most.
        batch_tokens: of a batch of several rows at most.

    Raises:
        CalibrationError: it is not known how inputs of this model are made, or it does not run on them.
        DataError: the data cannot be read, are none that the model takes, or too few.
        SourceError: a tokenizer or processor is missing that the data need.
    """
    is_self = isinstance(data, str) and data == SELF
    wanted = n_tokens + -(-n_tokens // (_HELD_OUT - 1))
    make = self_made if is_self else rows_of
    kind = CalibrationError if is_self else DataError
    try:
        found = make(model, folder, data, wanted=wanted, max_length=max_length, seed=seed)
    except ImportError as error:
        raise kind(
            f"{data}: expected the packages that reading it needs, found one missing ({error}); install it"
        ) from error
    where = SELF if is_self else found.where
    kept, held_out, twice = _split(found, seed, where, kind)
    batches, aside = (_batches(rows, batch_rows, batch_tokens, seed) for rows in (kept, held_out))
    _require_run(model, batches[0], where, kind)
    return Inputs(
        batches, aside, _said(model, found, kept, held_out, twice), sum(map(tokens_of, kept)),
        _digest([*batches, *aside]),
    )  # fmt: skip


def _split(found: Found, seed: int, where: str, kind: Refusal) -> tuple[list[Row], list[Row], int]:
    """Rows to calibrate on, rows held out, and how many were there before.

    Raises:
        kind: there are too few, or all are equal.
    """
    rows = list({_row_digest(row): row for row in found.rows}.values())
    if len(rows) == 1 < len(found.rows):
        raise kind(
            f"{where}: expected rows that differ, found {len(found.rows)} equal ones, which say nothing of "
            "what the model is used for; give others"
        )
    if len(rows) < LEAST_ROWS:
        raise kind(
            f"{where}: expected at least {LEAST_ROWS} rows that differ, of which some are held out, found "
            f"{len(rows)}; give more or longer ones"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    n_aside = max(min(_FEW, len(rows) // _HELD_OUT_OF_FEW), len(rows) // _HELD_OUT)
    aside, kept = sorted(order[:n_aside]), sorted(order[n_aside:])
    return [rows[i] for i in kept], [rows[i] for i in aside], len(found.rows) - len(rows)


def _batches(
    rows: Sequence[Row], batch_rows: int, batch_tokens: int | None, seed: int
) -> tuple[dict[str, Tensor], ...]:
    """Rows of equal shapes together, in an order drawn at random: the first ones are from everywhere."""
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple((name, tuple(x.shape), x.dtype) for name, x in row.items())
        alike.setdefault(key, []).append(row)
    found = []
    for group in alike.values():
        fitting = batch_rows if batch_tokens is None else batch_tokens // tokens_of(group[0])
        n = max(1, min(batch_rows, fitting))
        parts = (group[start : start + n] for start in range(0, len(group), n))
        found += [{name: torch.stack([row[name] for row in some]) for name in some[0]} for some in parts]
    return tuple(found[i] for i in order_of(len(found), seed))


@torch.no_grad()
def _require_run(model: Any, batch: dict[str, Tensor], where: str, kind: Refusal) -> None:
    """Run one row.

    Raises:
        kind: the model does not run on it.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        model(**{name: values[:1].to(device) for name, values in batch.items()})
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        shapes = ", ".join(f"{name} {x.dtype} {list(x.shape)}" for name, x in batch.items())
        todo = "give what its forward expects" if kind is DataError else "give data (--calibrate DATA)"
        raise kind(
            f"{where}: expected inputs that {type(model).__name__} takes, found {shapes} "
            f"({str(error).partition(chr(10))[0]}); {todo}"
        ) from error


def _said(model: nn.Module, found: Found, kept: list[Row], aside: list[Row], twice: int) -> str:
    modality, n_tokens = modality_of(model), sum(map(tokens_of, kept))
    amount = f"{n_tokens:,} tokens in " if takes_texts(modality) else ""
    known, others = inputs_by_name(model), {"input_ids", "pixel_values", "input_features", "input_values"}
    never = sorted(others & set(known) - set(kept[0])) if len(others & set(known)) > 1 else []
    unseen = f"; {' and '.join(never)} never given" if never else ""
    repeated = f", {twice:,} repeated ones left out" if twice else ""
    amount += f"{len(kept):,} rows"
    return f"{found.where}: {found.said}; {amount} to calibrate on, {len(aside):,} held out{repeated}{unseen}"


def _row_digest(row: Row) -> bytes:
    return _hashed([row]).digest()


def _digest(batches: Sequence[Row]) -> str:
    return _hashed(batches).hexdigest()


def _hashed(batches: Sequence[Row]) -> Any:
    found = hashlib.sha256()
    for batch in batches:
        for name, values in batch.items():
            found.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
            found.update(values.contiguous().numpy().tobytes())
    return found
