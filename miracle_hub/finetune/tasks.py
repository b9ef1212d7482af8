"""The tasks of `fit`: for each the model, what makes batches, and what makes its inputs of rows of data."""

import logging
from collections.abc import Callable
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

from miracle_hub.errors import DataError, MiracleError, SourceError
from miracle_hub.evaluate.batches import check_fits, tokenized
from miracle_hub.evaluate.data import Split

_LOGGER = logging.getLogger("miracle_hub")


def pad_with_another(tokenizer: Any) -> None:
    """Texts of a batch are made equally long with a token that the mask hides, whichever it is.

    Raises:
        SourceError: the tokenizer has no token to take.
    """
    others = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    found = next((token for token in others if token is not None), None)
    if found is None:
        raise SourceError(
            "tokenizer: expected a pad token, found none, nor one of end, beginning or unknown words to take "
            "instead; set tokenizer.pad_token and save it beside the model"
        )
    tokenizer.pad_token = found
    _LOGGER.warning(
        "tokenizer: it has no pad token; %r pads texts, under a mask, and is written as such", found
    )


def _loaded(kind: Any, source: Any, **options: Any) -> Any:
    """
    Raises:
        SourceError: the model has no such class, or a head of another size.
    """
    try:
        return kind.from_pretrained(source, **options)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, MiracleError):
            raise
        if "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error):
            raise SourceError(
                f"{source}: expected a head for the {options.get('num_labels')} classes of the data "
                f"({', '.join(list(options.get('label2id', ()))[:8])}), found one of another size; give "
                "labels of the model's own classes, or fine-tune what it was made from, without a head"
            ) from error
        found = str(error).strip().partition("\n")[0]
        raise SourceError(
            f"{source}: expected a model that {kind.__name__} loads, found none ({found}); choose another "
            "--task, or another model"
        ) from error


def classification(source: Any, tokenizer: Any, splits: Split, max_length: int) -> tuple[Any, Any, Callable]:
    """The model with a head for the classes of the data, its collator, and what encodes rows.

    Raises:
        SourceError: the model cannot take the texts.
    """
    names = splits.class_names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = _loaded(AutoModelForSequenceClassification, source, num_labels=len(names), **labels)
    if model.config.pad_token_id is None:  # some models look for it to find a text's end
        model.config.pad_token_id = tokenizer.pad_token_id

    def encode(rows: Any) -> Any:
        def one(batch: dict[str, list]) -> Any:
            texts = [batch[column] for column in splits.text_columns]
            inputs = tokenized(tokenizer, texts, max_length)
            check_fits(model, inputs)
            return {**inputs, "labels": batch["labels"]}

        return rows.map(one, batched=True, remove_columns=rows.column_names)

    return model, DataCollatorWithPadding(tokenizer), encode


def language_model(source: Any, tokenizer: Any, splits: Split, max_length: int) -> tuple[Any, Any, Callable]:
    """The causal language model, its collator, and what cuts rows of text into windows.

    Raises:
        DataError: the texts have nothing to predict. SourceError: the model cannot take them.
    """
    model = _loaded(AutoModelForCausalLM, source)

    def one(batch: dict[str, list]) -> dict[str, list]:
        """Texts one after the other, cut into windows; a last token alone has none to predict."""
        tokens = [t for text in batch[splits.text_columns[0]] for t in tokenizer(text)["input_ids"]]
        windows = [tokens[start : start + max_length] for start in range(0, len(tokens) - 1, max_length)]
        check_fits(model, {"input_ids": windows})
        return {"input_ids": windows, "labels": windows}

    def encode(rows: Any) -> Any:
        windows = rows.map(one, batched=True, remove_columns=rows.column_names)
        if not len(windows):
            raise DataError(
                f"data: expected texts of at least two tokens, found none in {len(rows)} rows to train on or "
                "to evaluate on; look at the file, or give more of them"
            )
        return windows

    # Which pads labels by themselves: that of language modeling takes the pad token, which may be that of the
    # end, out of them wherever it stands.
    return model, DataCollatorForSeq2Seq(tokenizer), encode
