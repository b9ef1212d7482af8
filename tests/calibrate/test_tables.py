"""Words and positions: what is looked up, what an error of it costs, and when it is coded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertModel, GPT2LMHeadModel, LlamaForCausalLM

from miracle_hub.calibrate.inputs import inputs_of
from miracle_hub.calibrate.journal import Journal
from miracle_hub.calibrate.known import tables_of
from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.outputs import divergence
from miracle_hub.calibrate.recipe import knowledge_of
from miracle_hub.calibrate.refits import RefitOptions, Refits
from miracle_hub.calibrate.rows import tokens_of
from miracle_hub.calibrate.sensitivity import measure
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.source import SourceTensor, list_tensors
from tests.calibrate.test_compress import Saved
from tests.calibrate.test_engine import BACKEND, job_of


class LookedUp(nn.Module):
    """Rows of a table, and a matrix that takes some of their directions far more than others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(64, 32), nn.Linear(32, 16)
        self.out.weight.data *= torch.logspace(1, -1, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.table(input_ids)).flatten(0, 1)


def looked_up() -> tuple[LookedUp, list[dict[str, Tensor]], Curvature]:
    generator = torch.Generator().manual_seed(0)
    model, often = LookedUp().eval(), 1 / (1 + torch.arange(64.0))
    ids = [torch.multinomial(often, 64, replacement=True, generator=generator).view(4, 16) for _ in range(16)]
    batches = [{"input_ids": each} for each in ids]
    found = measure(model, batches, {"table.weight"}, 0).curvature("table.weight", (64, 32))
    assert found is not None and found.columns is not None
    return model, batches, found


def test_a_small_error_of_words_costs_what_was_measured() -> None:
    model, batches, curvature = looked_up()
    assert curvature.columns is not None
    with torch.no_grad():
        dense = [model(**batch) for batch in batches]
        error = 0.003 * torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
        predicted = 0.5 * float((curvature.rows[:, None] * error * (error @ curvature.columns)).sum())
        model.table.weight += error
        pairs = zip(batches, dense, strict=True)
        measured = sum(float(divergence("logits", model(**batch), answer)) for batch, answer in pairs)
    assert predicted == pytest.approx(measured / len(batches), rel=0.3)


@pytest.fixture
def table(tmp_path: Path) -> tuple[SourceTensor, Curvature]:
    model, _, curvature = looked_up()
    save_file({"table.weight": model.table.weight.data}, tmp_path / "model.safetensors")
    return list_tensors([tmp_path / "model.safetensors"])[0], curvature


def test_feedback_keeps_errors_of_words_out_of_directions_that_matter(
    table: tuple[SourceTensor, Curvature],
) -> None:
    (source, curvature), costs = table, []
    assert curvature.columns is not None
    for known in (curvature, None):
        matrix = MatrixInMaking(job_of(source, known), nn.Parameter(source.load(), False), BACKEND)
        matrix.code(matrix.columns)
        error = matrix.parameter.detach() - source.load()
        costs.append(float((curvature.rows[:, None] * error * (error @ curvature.columns)).sum()))
    assert costs[0] < 0.7 * costs[1]


@pytest.mark.parametrize(
    ("cls", "tied", "found"),
    [
        (BertModel, False, {"word", "position", "token_type"}),
        (BertForMaskedLM, True, {"position", "token_type"}),
        (BertForMaskedLM, False, {"word", "position", "token_type"}),
        (GPT2LMHeadModel, True, {"wpe"}),
        (LlamaForCausalLM, True, set()),
        (LlamaForCausalLM, False, {"embed_tokens"}),
    ],
)
def test_tables_are_what_is_looked_up_and_nothing_else(
    saved: Saved, cls: Any, tied: bool, found: set[str]
) -> None:
    also = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 32} if cls is GPT2LMHeadModel else {}
    model, _ = saved(cls, tie_word_embeddings=tied, **also)
    assert {name.split(".")[-2].removesuffix("_embeddings") for name in tables_of(model)} == found


def test_tables_cost_more_beside_refits(saved: Saved, text_file: Path) -> None:
    _, folder = saved(BertModel)
    sources, known = list_tensors([folder / "model.safetensors"]), knowledge_of(folder, text_file, effort=0)
    without = [known.curvature(source) for source in sources]
    known.options = RefitOptions(groups=2, steps=1)
    for source, before in zip(sources, without, strict=True):
        beside = known.curvature(source)
        if before is not None and beside is not None:
            times = float(beside.rows.sum() / before.rows.sum())
            assert times > 2 if source.name in tables_of(known.model) else times == 1
            assert torch.equal(torch.as_tensor(beside.columns), torch.as_tensor(before.columns))


def test_tables_are_coded_before_anything_is_refitted(table: tuple[SourceTensor, Curvature]) -> None:
    """So that their payloads are those without refits."""
    source, curvature = table
    payloads, (model, batches, _) = [], looked_up()
    for groups in (1, 3):
        parameter = nn.Parameter(source.load(), False)
        matrix = MatrixInMaking(job_of(source, curvature), parameter, BACKEND, is_first=True)
        model.table.weight, teacher = parameter, Teacher(model, batches)
        Refits(teacher, Journal(model, teacher), [matrix], [model.out.bias], RefitOptions(groups, 4)).run()
        payloads.append(matrix.payload())
    assert payloads[0] == payloads[1]


def test_texts_are_batched_by_tokens_and_the_first_batches_have_all_lengths(
    saved: Saved, text_file: Path
) -> None:
    model, folder = saved(BertModel)
    found = inputs_of(model, folder, text_file, n_tokens=10_000, batch_rows=64, batch_tokens=40)
    sizes = [(len(batch["input_ids"]), batch["input_ids"][0].numel()) for batch in found.batches]
    assert all(rows == 1 or rows * length <= 40 for rows, length in sizes)
    assert (
        sum(rows * length for rows, length in sizes)
        == found.n_tokens
        == sum(tokens_of({"input_ids": row}) for batch in found.batches for row in batch["input_ids"])
    )
    lengths = {length for _, length in sizes}
    assert len({length for _, length in sizes[: 2 * len(lengths)]}) > len(lengths) / 2
