"""RefitBatches: a number has always the same rows, of like lengths where the Trainer groups them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from miracle_hub.errors import OptionError
from miracle_hub.finetune.refit_batches import RefitBatches


def batches(folder: Path, data: Any, seed: int = 0, **options: Any) -> RefitBatches:
    small = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=50
    )
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, seed=seed, use_cpu=True, report_to=[], **options
    )
    return RefitBatches(Trainer(BertForSequenceClassification(small), arguments, train_dataset=data))


def sentences(n: int) -> list[dict[str, Any]]:
    """Rows of 1 to 40 tokens that say their own number."""
    return [{"input_ids": [i] * (1 + 7 * i % 40), "labels": i} for i in range(n)]


GROUPED: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}


@pytest.mark.parametrize("options", [{}, GROUPED])
def test_a_batch_is_a_function_of_its_number_and_the_seed(tmp_path: Path, options: dict[str, Any]) -> None:
    first, again = (batches(tmp_path, sentences(30), **options) for _ in range(2))
    numbers = [0, 1, 6, 7, 8, 100]
    drawn = {number: first.rows(number) for number in numbers}
    assert all(again.rows(number) == drawn[number] for number in reversed(numbers))
    assert all(len(rows) == 4 for rows in drawn.values())
    assert drawn[0] != drawn[1]
    other = batches(tmp_path, sentences(30), seed=1, **options)
    assert any(other.rows(number) != drawn[number] for number in numbers)


def test_grouped_batches_need_less_padding_and_pass_over_no_row_twice_in_an_epoch(tmp_path: Path) -> None:
    def padded(found: RefitBatches) -> int:
        return sum(4 * max(len(row["input_ids"]) for row in found.rows(i)) for i in range(50))

    grouped = batches(tmp_path, sentences(200), **GROUPED)
    assert padded(grouped) < 0.75 * padded(batches(tmp_path, sentences(200)))
    for epoch in (range(50), range(50, 100)):
        assert sorted(row["labels"] for i in epoch for row in grouped.rows(i)) == list(range(200))
    lengths = [len(grouped.rows(i)[0]["input_ids"]) for i in range(50)]
    assert lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize("options", [{}, GROUPED])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_fewer_rows_than_two_batches_are_enough(tmp_path: Path, n: int, options: dict[str, Any]) -> None:
    found = batches(tmp_path, sentences(n), **options)
    assert all(0 < len(found.rows(number)) <= 4 for number in range(5))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield from sentences(3)


class Counted(Stream):
    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    "data, found", [([], "an empty"), (Stream(), "an iterable"), (Counted(), "an iterable")]
)
def test_data_that_refits_cannot_use_are_refused(tmp_path: Path, data: Any, found: str) -> None:
    with pytest.raises(OptionError) as raised:
        batches(tmp_path, data, max_steps=1)
    assert str(raised.value) == (
        f"train_dataset: expected a map-style one with at least one row for refits, found {found} one; pass "
        "another, or CodingOptions(refit_steps=0)"
    )
