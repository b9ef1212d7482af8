"""What a model writes by itself: texts of a causal language model, answers of an encoder and decoder."""

from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from miracle_hub.calibrate.modality import inputs_by_name, positions_of
from miracle_hub.calibrate.precision import fast_if_large
from miracle_hub.calibrate.rows import Row, met_length, rows_of_batch
from miracle_hub.errors import CalibrationError


@torch.no_grad()
def continued(
    model: Any,
    ids: Int64[Tensor, "rows start"],
    length: int,
    generator: torch.Generator | None,
    *,
    end: int | None = None,
    **encoded: Any,
) -> Int64[Tensor, "rows length"]:
    """Tokens that a model writes after others, until there are `length` of them.

    Args:
        generator: draws every token at temperature 1; None takes the likeliest ones.
        end: a token after which a row is finished; once all are, nothing more is written.
        encoded: what an encoder made of the input.

    Raises:
        CalibrationError: what it predicts is not finite.
    """
    name = "decoder_input_ids" if encoded else "input_ids"
    kept = next((n for n in ("cache", "past_key_values") if n in inputs_by_name(model)), None)
    cache, step, ids = None, ids, ids.to(model.device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while ids.shape[1] < length and not done.all():
        options = {kept: cache, "use_cache": True} if kept else {}
        with fast_if_large(model):
            outputs = model(**{name: ids if cache is None else step}, **options, **encoded)
        cache = getattr(outputs, kept or "", None)
        step = _next(model, outputs.logits[:, -1].float(), generator)
        ids = torch.cat((ids, step), 1)
        done |= (step == end)[:, 0] if end is not None else done
    return ids


def _next(model: Any, logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """
    Raises:
        CalibrationError: they are not finite.
    """
    if not torch.isfinite(logits.amax(1)).all():
        raise CalibrationError(
            f"{type(model).__name__}: expected predictions to write texts by, found NaN or infinite ones; "
            "repair the model, or give data (--calibrate DATA)"
        )
    if generator is None:
        return logits.argmax(1, keepdim=True)
    return _drawn(logits.cpu(), generator).to(logits.device)


def _drawn(logits: Float32[Tensor, "rows n"], generator: torch.Generator) -> Int64[Tensor, "rows 1"]:
    """By one uniform number per row.

    `multinomial` draws one per word, which took 77 of the 360 ms of 64 tokens of SmolLM2; this takes 13. On
    the CPU, so that a seed means the same texts on every device.
    """
    below = logits.softmax(-1, dtype=torch.float64).cumsum(1)
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    return torch.searchsorted(below, uniform * below[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)


@torch.no_grad()
def answered(
    model: Any, rows: list[Row], most: int, generator: torch.Generator | None, *, batch_rows: int = 16
) -> list[Row]:
    """Rows of an encoder with what its decoder answers.

    Args:
        most: tokens of an answer, which has no more than the model has positions.
        generator: as in `continued`.

    Raises:
        CalibrationError: the model has no token to begin with, or its predictions are not finite.
    """
    most = min(most, getattr(model.config, "max_target_positions", None) or positions_of(model) or most)
    start, end = _token(model, "decoder_start_token_id"), _token(model, "eos_token_id")
    if start is None:
        raise CalibrationError(
            f"{type(model).__name__}: expected a decoder_start_token_id in its config, found none, so that "
            "it cannot answer; set it, or give its decoder_input_ids as arrays"
        )
    alike: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault(next(iter(row.values())).shape, []).append(i)
    answers: dict[int, Row] = {}
    for numbers in alike.values():
        for some in (numbers[at : at + batch_rows] for at in range(0, len(numbers), batch_rows)):
            batch = {name: torch.stack([rows[i][name] for i in some]) for name in rows[some[0]]}
            placed = {name: values.to(model.device) for name, values in batch.items()}
            encoded = {"encoder_outputs": model.get_encoder()(**placed)}
            if "attention_mask" in placed:
                encoded["attention_mask"] = placed["attention_mask"]
            first = torch.full((len(some), 1), start)
            ids = continued(model, first, most, generator, end=end, **encoded).cpu()
            answers |= zip(some, map(_until(end), rows_of_batch({"decoder_input_ids": ids})), strict=True)
    return [{**row, **answers[i]} for i, row in enumerate(rows)]


def _until(end: int | None) -> Any:
    """Answers without their end, which is never an input, cut to lengths that others have."""

    def cut(row: Row) -> Row:
        ids = row["decoder_input_ids"]
        ends = (ids[1:] == end).nonzero().flatten() if end is not None else ids[:0]
        length = int(ends[0]) + 1 if len(ends) else len(ids)
        return {"decoder_input_ids": ids[: met_length(length)]}

    return cut


def _token(model: Any, name: str) -> int | None:
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
        if isinstance(found, list) and found:
            return int(found[0])
    return None
