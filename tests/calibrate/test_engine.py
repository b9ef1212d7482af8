"""What errors cost, feedback, refits and tuning: that each does what it is for, and touches nothing else."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, GPT2LMHeadModel

from miracle_hub.calibrate.journal import Journal
from miracle_hub.calibrate.matrix import MatrixInMaking
from miracle_hub.calibrate.models import load_dense
from miracle_hub.calibrate.outputs import divergence, sampled_gradient
from miracle_hub.calibrate.refits import RefitOptions, Refits, first_peak
from miracle_hub.calibrate.sensitivity import measure
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.calibrate.trials import kind_of, with_damping
from miracle_hub.calibrate.tuning import Tuning
from miracle_hub.code import Code
from miracle_hub.codec.curvature import Curvature
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.kept import Kept
from miracle_hub.codec.knowledge import weighed
from miracle_hub.codec.rates import Choice, Curve, Option
from miracle_hub.codec.source import SourceTensor, list_tensors
from miracle_hub.codec.trellis import TRELLIS, Recipe, decode_payload
from miracle_hub.coding.backend import choose
from tests.calibrate.test_compress import Saved

BACKEND = choose("cpu")


class Layers(nn.Module):
    """Two layers whose inputs are far from white."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Layers, dict[str, SourceTensor], list[dict[str, Tensor]]]:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model, mix = Layers().eval(), torch.randn(32, 32, generator=generator) * torch.logspace(1, -1, 32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    sources = {tensor.name: tensor for tensor in list_tensors([tmp_path / "model.safetensors"])}
    return model, sources, [{"x": torch.randn(64, 32, generator=generator) @ mix} for _ in range(8)]


def job_of(source: SourceTensor, curvature: Curvature | None, rotation: int = 32) -> Job:
    rows, columns = source.shape
    recipe = Recipe(Code(10, 2, 1), True, columns, rotation)
    return Job(source, "", Choice(rows, Option(recipe, 0, 0.0)), curvature=curvature)


def making_of(job: Job, values: Tensor) -> MatrixInMaking:
    return MatrixInMaking(job, nn.Parameter(values.clone(), requires_grad=False), BACKEND)


def decoded(payload: bytes) -> Tensor:
    return decode_payload(torch.frombuffer(bytearray(payload), dtype=torch.uint8), "w")[0]


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_a_small_error_costs_what_was_measured(layers: Any, name: str) -> None:
    model, _, batches = layers
    found = measure(model, batches, {"first.weight", "second.weight"}, 0)
    weight = dict(model.named_parameters())[name].data
    curvature = found.curvature(name, weight.shape)
    assert curvature is not None and curvature.columns is not None
    dense = [model(**batch) for batch in batches]
    error = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    predicted = 0.5 * float((curvature.rows[:, None] * error * (error @ curvature.columns)).sum())
    weight += error
    with torch.no_grad():
        pairs = zip(batches, dense, strict=True)
        measured = sum(float(divergence("logits", model(**batch), answer)) for batch, answer in pairs)
    assert predicted == pytest.approx(measured / len(batches), rel=0.5)


def test_gradients_that_are_drawn_have_the_moments_of_the_fisher_matrix() -> None:
    logits = 2 * torch.randn(5, generator=torch.Generator().manual_seed(1))
    p, draws = logits.softmax(-1), logits.expand(100_000, 5)
    drawn = sampled_gradient("logits", draws, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.T @ drawn / len(drawn), p.diag() - p.outer(p), atol=5e-3)
    assert torch.allclose(drawn.mean(0), torch.zeros(5), atol=5e-3)


@pytest.mark.parametrize("cls", [BertForMaskedLM, GPT2LMHeadModel])
def test_tied_weights_are_known_by_all_of_their_names(saved: Saved, cls: Any) -> None:
    """A file has any one of them; GPT-2's layers are stored the other way round."""
    _, folder = saved(cls, tie_word_embeddings=True, n_embd=8, n_head=2, n_layer=1, n_positions=32)
    model = load_dense(folder)
    shapes = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1}
    found = measure(model, [{"input_ids": torch.randint(0, 25, (4, 16))}], set(shapes), 0)
    assert all(found.curvature(name, shape) is not None for name, shape in shapes.items())
    assert len(found.sums) < len(shapes)


def test_feedback_keeps_errors_out_of_directions_that_matter(layers: Any) -> None:
    model, sources, batches = layers
    curvature = measure(model, batches, {"first.weight"}, 0).curvature("first.weight", (64, 32))
    assert curvature is not None and curvature.columns is not None
    weights, job = sources["first.weight"].load(), job_of(sources["first.weight"], curvature)
    costs, errors = [], []
    for known in (curvature, None):
        error = decoded(TRELLIS.encode(weights, job.choice, "w", BACKEND, curvature=known)) - weights
        costs.append(float((curvature.rows[:, None] * error * (error @ curvature.columns)).sum()))
        errors.append(float(error.square().sum()))
    assert costs[0] < 0.5 * costs[1] and errors[0] > errors[1]


@pytest.mark.parametrize("damping", [None, 0.1])
def test_a_matrix_in_parts_becomes_a_payload_of_the_planned_size(layers: Any, damping: float | None) -> None:
    """Without a rotation, with which scales are rounded once more, its values are those of the model."""
    model, sources, batches = layers
    source = sources["second.weight"]
    found = measure(model, batches, {"second.weight"}, 0).curvature("second.weight", source.shape)
    matrix = making_of(job := job_of(source, found if damping else None, rotation=1), source.load())
    for share in (0.3, 0.6, 1.0):
        matrix.code(matrix.columns_at(share))
    payload = matrix.payload()
    assert len(payload) == TRELLIS.payload_bytes(source, job.choice)
    assert torch.equal(decoded(payload), matrix.parameter.data)


def test_what_is_coded_stays_while_the_rest_is_fitted(layers: Any) -> None:
    _, sources, _ = layers
    matrix = making_of(job_of(sources["second.weight"], None), sources["second.weight"].load())
    matrix.code(matrix.columns_at(0.5))
    coded = matrix.rotated()[:, : matrix.n_coded].clone()
    matrix.parameter.data += torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    matrix.keep(coded)
    assert torch.allclose(matrix.rotated()[:, : matrix.n_coded], coded, atol=1e-5)
    assert not torch.allclose(matrix.rotated()[:, matrix.n_coded :], coded, atol=0.1)


def making(layers: Any, options: RefitOptions) -> tuple[Refits, Tuning]:
    """Refits of the layers, and the tuning after them, without feedback."""
    model, sources, batches = layers
    model.requires_grad_(False)
    matrices = [
        MatrixInMaking(job_of(sources[f"{name}.weight"], None), getattr(model, name).weight, BACKEND)
        for name in ("first", "second")
    ]
    vectors, teacher = [model.first.bias, model.second.bias], Teacher(model, batches[:6])
    refits = Refits(teacher, Journal(model, Teacher(model, batches[6:])), matrices, vectors, options)
    return refits, Tuning(matrices, vectors, options.end_rate, partial(teacher.divergence, model))


@pytest.mark.parametrize(
    ("gains", "place"), [([1.0, 0.5, 2.0], 0), ([0.2, 0.5, 0.1], 1), ([-1.0, 3.0], 1), ([0.0], 0)]
)
def test_rates_are_tried_until_one_gains_less_than_the_one_before_it(gains: list[float], place: int) -> None:
    tried = iter(gains)
    assert first_peak(tried) == place
    assert list(tried) == gains[place + 2 :]


def test_refits_and_tuning_each_bring_answers_nearer(layers: Any) -> None:
    model, before = layers[0], {n: v.clone() for n, v in layers[0].state_dict().items()}
    plain, _ = making(layers, RefitOptions())
    plain.run()
    model.load_state_dict(before)
    refits, tuning = making(layers, RefitOptions(groups=4, steps=40, end_rate=0.01))
    refits.run()
    tuning.run(list(range(6)) * 7, Kept(), "")
    refits.journal.report_or_undo("tuned", tuning.undo)
    (_, without), (_, refitted), (what, tuned) = plain.journal.losses[-1], *refits.journal.losses[-2:]
    assert refitted < 0.9 * without and tuned < 0.7 * without and what == "tuned"
    assert refits.matrices[0].gains.ne(1).all()


def test_refits_and_tuning_that_do_not_help_are_undone_and_said(
    layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refits, tuning = making(layers, RefitOptions(groups=2, steps=4, rates=(0.001,)))
    rising = iter(range(100))
    monkeypatch.setattr(Teacher, "mean_divergence", lambda teacher, model: float(next(rising)))
    biases = [vector.clone() for vector in refits.vectors]
    refits.run()
    coded = [matrix.parameter.clone() for matrix in refits.matrices]
    tuning.run([0, 1, 2, 3], Kept(), "")
    refits.journal.report_or_undo("tuned", tuning.undo)
    undone = [what for what, _ in refits.journal.losses if what.endswith("undone")]
    assert undone == ["refitted after 75% at a rate of 0.004: undone", "tuned: undone"]
    assert all(torch.equal(a, b) for a, b in zip(biases, refits.vectors, strict=True))
    assert all(torch.equal(matrix.gains, torch.ones(64)) for matrix in refits.matrices)
    assert all(torch.allclose(a, m.parameter) for a, m in zip(coded, refits.matrices, strict=True))


def test_trials_choose_a_damping_and_leave_the_model_as_it_was(layers: Any) -> None:
    model, sources, batches = layers
    found = measure(model, batches, {"first.weight", "second.weight"}, 0)
    names = ("first.weight", "second.weight")
    jobs = [job_of(sources[name], found.curvature(name, sources[name].shape)) for name in names]
    before, own = {n: v.clone() for n, v in model.state_dict().items()}, dict(model.named_parameters())
    chosen = with_damping(jobs, model, own, Teacher(model, batches[:2]), BACKEND)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [job.source.name for job in chosen] == list(names)
    assert chosen[0].curvature != jobs[0].curvature  # none of those tried is the one of before
    assert kind_of("layers.3.mlp.7.up") == kind_of("layers.11.mlp.0.up") != kind_of("layers.3.mlp.7.down")


def test_what_no_answer_depends_on_is_worth_what_others_are() -> None:
    curves = [Curve(name, 4, (Option(None, 8, 1.0), Option(None, 16, 0.5))) for name in "abcd"]
    costs = {"a": torch.tensor([4.0]), "b": torch.tensor([16.0]), "c": torch.tensor([64.0])}
    found = {c.name: c.options[0].error for c in weighed(curves, costs, dict.fromkeys("abcd", 1024))}
    assert found["d"] == found["b"] and found["a"] < found["b"] < found["c"]
    assert weighed(curves, {"a": torch.zeros(1)}, {"a": 1024}) == curves


def test_words_that_are_used_more_have_curves_of_their_own() -> None:
    rows = 1 << 13
    curve = Curve("words", rows, (Option(None, 8 * rows, 1.0), Option(None, 16 * rows, 0.5)))
    cost = torch.linspace(1, 0, rows) ** 4
    parts = weighed([curve], {"words": cost}, {"words": rows * 64})
    errors = [part.options[0].error / part.rows for part in parts]
    assert 4 < len(parts) <= 16 and sum(part.rows for part in parts) == rows
    assert (
        errors == sorted(errors, reverse=True) and errors[-1] > 0.005 * errors[0]
    )  # rare words keep a floor
    (flat,) = weighed([curve], {"words": torch.ones(rows)}, {"words": rows * 64})
    assert flat.rows == rows
