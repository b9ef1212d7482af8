"""Coding with refits: every weight ends up as the file has it, and what is coded never moves again."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from miracle_hub.errors import OptionError, TrainingError
from miracle_hub.training.coder import CodingOptions, code_model
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.convert import make_variational, posterior_mean
from miracle_hub.training.guard import check_finite
from miracle_hub.training.journal import Journal
from miracle_hub.training.stream import message_of

from .networks import (
    IMAGES,
    assert_same_state,
    blocks_of,
    code_of,
    decoded,
    loss_of,
    message_in,
    part_of,
    snapshot,
    streams_of,
    variational_net,
)

# Every option at least once with every other kind of stream.
COMBINATIONS: list[dict[str, Any]] = [
    {"streams": streams, "code": code, "parametrization": parametrization, "selection": selection}
    for streams, code, parametrization, selection in [
        ("tensor", "sliding", "mean-kl", "best"),
        ("tensor", "sliding", "mean-var", "sample"),
        ("tensor", "block", "mean-kl", "sample"),
        ("tensor", "block", "mean-var", "best"),
        ("network", "sliding", "mean-kl", "sample"),
        ("network", "sliding", "mean-var", "best"),
        ("network", "block", "mean-kl", "best"),
        ("network", "block", "mean-var", "sample"),
        ("tensor", "sliding", "test-channel", "best"),
        ("tensor", "block", "test-channel", "sample"),
        ("network", "sliding", "test-channel", "best"),
    ]
]


def code(model: nn.Module, **options: Any) -> Journal:
    loss = loss_of(model) if options.get("refit_steps") else None
    return code_model(model, loss, options=CodingOptions(**options), progress=False)


def assert_weights_are_the_messages(model: nn.Module) -> None:
    dense = dict(posterior_mean(model.eval()).named_parameters())
    for stream in streams_of(model):
        for member, weight in zip(stream.members, decoded(stream), strict=True):
            assert torch.equal(dense[member.name], weight.to(member.dtype)), member.name
            assert torch.equal(weight_of(model, member.name), dense[member.name])
            # In training too: a coded weight has no noise.
            assert torch.equal(weight_of(model.train(), member.name), dense[member.name])
            model.eval()


def weight_of(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute)


@pytest.mark.parametrize("order", ["random", "largest-kl"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: "-".join(c.values()))
def test_weights_are_those_of_the_messages_and_what_is_coded_never_moves(
    combination: dict[str, Any], order: str
) -> None:
    model, seen = variational_net(**combination), []

    def validate() -> float:
        seen.append(snapshot(model))
        for stream, (_, _, scales) in zip(streams_of(model), seen[-1], strict=True):
            # Rounded and fixed before the first block.
            assert not any(n.endswith("log_scales") and p.requires_grad for n, p in stream.named_parameters())
            assert torch.equal(scales, scales.bfloat16().float())
        return 0.0

    options = CodingOptions(groups=5, refit_steps=2, order=order)
    code_model(model, loss_of(model), options=options, validate=validate, progress=False)
    assert 2 < len(seen) <= 5
    for before, after in zip(seen, seen[1:], strict=False):
        for (coded, where, scales), (later, still, same) in zip(before, after, strict=True):
            assert torch.equal(scales, same) and bool(still[where].all())
            assert torch.equal(later[where], coded[where])
    assert all(bool(where.all()) for _, where, _ in seen[-1])
    assert_weights_are_the_messages(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_hold_the_rounded_weights(dtype: torch.dtype) -> None:
    model = nn.Linear(16, 16).to(dtype)
    make_variational(model, VariationalConfig(rate=2.0, window_bits=8))
    code(model, groups=2)
    assert weight_of(model, "weight").dtype == dtype
    assert_weights_are_the_messages(model)


@pytest.mark.parametrize("kind", ["hash", "tile"])
def test_shared_weights_are_coded_too(kind: str) -> None:
    model = variational_net(streams="network", sharing={"hidden.weight": 4.5}, sharing_kind=kind)
    code(model, groups=3, refit_steps=1)
    (stream,) = streams_of(model)
    assert stream.n_values == 473 - 360 + 80
    assert_weights_are_the_messages(model)


@pytest.mark.parametrize("kind", ["sliding", "block"])
@pytest.mark.parametrize("streams", ["tensor", "network"])
@pytest.mark.parametrize("groups", [1, 1000])
def test_one_group_and_more_groups_than_values(groups: int, streams: str, kind: str) -> None:
    model = variational_net(streams=streams, code=kind)
    journal = code(model, groups=groups, refit_steps=1 if groups == 1 else 0)
    n_blocks = max(stream.kl_nats().numel() for stream in streams_of(model))
    assert len(journal.rows) == (1 if groups == 1 else n_blocks)
    assert_weights_are_the_messages(model)


def test_no_group_ends_inside_a_block_whose_rest_would_get_the_budget_of_what_is_coded() -> None:
    model = variational_net(streams="network", kl_block_weights=32)
    (stream,) = streams_of(model)
    seen = set()

    def validate() -> float:
        blocks = message_in(stream).is_coded.split(blocks_of(stream).block_weights)
        seen.update(len(set(block.tolist())) for block in blocks)
        return 0.0

    options = CodingOptions(groups=6, refit_steps=1)
    journal = code_model(model, loss_of(model), options=options, validate=validate, progress=False)
    assert len(journal.rows) > 3 and seen == {1}


@pytest.mark.parametrize("n_values", [5, 97, 1118, 12_406])
def test_the_last_block_of_a_sliding_stream_is_nearly_full(n_values: int) -> None:
    model = nn.Linear(n_values, 1, bias=False)
    make_variational(model, VariationalConfig(rate=2.0, window_bits=4, kl_block_weights=64))
    (stream,) = streams_of(model)
    n_steps = blocks_of(stream).block_weights // code_of(stream).step_weights
    assert n_steps * code_of(stream).step_weights == blocks_of(stream).block_weights <= 80
    assert -code_of(stream).steps(n_values) % n_steps <= 0.1 * n_steps


@pytest.mark.parametrize("kind", ["sliding", "block"])
def test_one_value_is_a_message_of_one_window(kind: str) -> None:
    model = nn.Linear(1, 1, bias=False)
    config = VariationalConfig(message_bits=12, streams="network", code=kind, window_bits=12)
    code(make_variational(model, config), groups=3)
    (stream,) = streams_of(model)
    assert code_of(stream).message_bits(1) <= 12 and len(message_of(stream)) == 2
    assert_weights_are_the_messages(model)


@pytest.mark.parametrize("kind", ["sliding", "block"])
def test_the_journal_has_the_kl_and_the_importance_weights_of_torchs_distributions(kind: str) -> None:
    model = variational_net(streams="network", code=kind)
    (stream,) = streams_of(model)
    mean, variance = (x.double() for x in stream.moments())
    (row,) = code(model, groups=1).rows
    q, p, z = Normal(mean, variance.sqrt()), Normal(0.0, 1.0), message_in(stream).values.double()
    kl = float(torch.distributions.kl_divergence(q, p).sum()) / math.log(2)
    log_weight = float((q.log_prob(z) - p.log_prob(z)).sum()) / math.log(2)
    assert row.kl_bits == pytest.approx(kl, rel=1e-6)
    assert row.log_weight_gap_bits == pytest.approx(log_weight - kl, rel=1e-5)
    # The message has as many bits as the KL, up to the first window and the last block.
    assert abs(row.kl_bits - stream.code.message_bits(473)) < 32 * 3


@pytest.mark.parametrize("kind", ["sliding", "block"])
@pytest.mark.parametrize("streams", ["network", "tensor"])
def test_the_journal_tells_the_kl_of_single_blocks(kind: str, streams: str) -> None:
    model = variational_net(streams=streams, code=kind, parametrization="mean-var")
    for stream in streams_of(model):
        stream.begin_coding()  # which rounds the scales
    kl_bits = torch.cat([stream.kl_nats().detach() for stream in streams_of(model)]) / math.log(2)
    rows = code(model, groups=3).rows
    assert len(rows) > 1 and sum(row.blocks for row in rows) == len(kl_bits)
    assert min(row.least_block_kl_bits for row in rows) == pytest.approx(float(kl_bits.min()), rel=1e-5)
    assert max(row.largest_block_kl_bits for row in rows) == pytest.approx(float(kl_bits.max()), rel=1e-5)
    for row in rows:
        assert row.least_block_kl_bits <= row.kl_bits / row.blocks <= row.largest_block_kl_bits


def test_the_best_candidates_have_larger_importance_weights_than_sampled_ones() -> None:
    gaps = {}
    for selection in ("best", "sample"):
        model = variational_net(streams="network", code="block", selection=selection)
        gaps[selection] = code(model, groups=1).rows[0].log_weight_gap_bits
    assert gaps["sample"] < gaps["best"] - 10


def test_refits_make_up_for_what_is_coded() -> None:
    losses = {}
    for refit_steps in (0, 60):
        model = variational_net(dropout=0.0, streams="network")
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(100):
            optimizer.zero_grad()
            loss_of(model)(step).backward()
            optimizer.step()
        options = CodingOptions(groups=8, refit_steps=refit_steps, learning_rate=3e-3)
        code_model(model, loss_of(model), options=options, progress=False)
        model.eval()
        with torch.no_grad():
            losses[refit_steps] = sum(float(loss_of(model)(i)) for i in range(5))
    assert losses[60] < 0.8 * losses[0]


def test_a_model_that_was_coded_in_part_goes_on_where_it_was() -> None:
    model, calls = variational_net(streams="network", code="block"), []

    def stop_in_group_three(number: int) -> Tensor:
        calls.append(number)
        return loss_of(model)(number) * (math.nan if number == 6 else 1)

    options = CodingOptions(groups=6, refit_steps=2)
    with pytest.raises(TrainingError):
        code_model(model, stop_in_group_three, options=options, progress=False)
    before = snapshot(model)
    calls.clear()
    journal = code_model(
        model, lambda i: calls.append(i) or loss_of(model)(i), options=options, progress=False
    )
    assert [row.group for row in journal.rows] == [5, 6] and calls == [8, 9]
    for (coded, where, _), (later, _, _) in zip(before, snapshot(model), strict=True):
        assert torch.equal(coded[where], later[where])


class Bad:
    """A loss that is fine until a step, which has notes of the state that the step found."""

    def __init__(self, model: nn.Module, step: int, kind: str) -> None:
        self.model, self.step, self.kind, self.state = model, step, kind, {}

    def __call__(self, number: int) -> Tensor:
        if number != self.step:
            return loss_of(self.model)(number)
        self.state = copy.deepcopy(self.model.state_dict())
        if self.kind == "input":  # which a batch norm averages
            return self.model(IMAGES * math.nan).sum()
        output = self.model(IMAGES)
        if self.kind == "gradient":  # d√x/dx at 0
            return (output * 0).square().sum().sqrt()
        return output.sum() * math.inf


@pytest.mark.parametrize(
    ("kind", "what"),
    [("input", "loss, found nan"), ("infinity", "loss, found "), ("gradient", "gradient, found nan")],
)
@pytest.mark.parametrize("streams", ["tensor", "network"])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_leaves_the_state_before_it(
    streams: str, kind: str, what: str
) -> None:
    model = variational_net(streams=streams, parametrization="mean-var")
    bad = Bad(model, 4, kind)
    with pytest.raises(TrainingError) as raised:
        code_model(model, bad, options=CodingOptions(groups=4, refit_steps=3), progress=False)
    assert str(raised.value).startswith(f"refit step 4 after group 2: expected a finite {what}")
    assert str(raised.value).endswith(
        "; the model is as it was after the step before: lower the learning rate, or look at the batch"
    )
    assert_same_state(model.state_dict(), bad.state)
    assert all(p.grad is None for p in model.parameters())
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())
    code_model(model, loss_of(model), options=CodingOptions(groups=4, refit_steps=1), progress=False)
    assert_weights_are_the_messages(model)


def test_every_module_is_left_in_the_mode_that_it_had() -> None:
    for training in (True, False):
        model: Any = variational_net().train(training)
        frozen = model.norm.eval()
        average = frozen.running_mean.clone()
        modes: list[tuple[bool, bool]] = []
        code_model(
            model,
            lambda i, m=model, seen=modes: seen.append((m.training, m.norm.training)) or loss_of(m)(i),
            options=CodingOptions(groups=2, refit_steps=1),
            progress=False,
        )
        # A batch norm that was frozen in a model that is trained stays frozen in refits.
        assert modes == [(True, not training)] and model.training == training
        assert torch.equal(frozen.running_mean, average) == training


def test_a_stream_that_is_not_coded_has_no_message() -> None:
    stream = streams_of(variational_net(streams="network"))[0]
    for _ in range(2):
        with pytest.raises(OptionError) as raised:
            message_of(stream)
        assert str(raised.value) == (
            "conv.weight: expected a coded stream, found one that is not; call code_model(model, …) first"
        )
        stream.begin_coding()


def test_a_model_without_posteriors_is_refused() -> None:
    with pytest.raises(
        OptionError, match="^model: expected a variational model, found Linear without posteriors; "
    ):
        code_model(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"order": "sorted"},
            "order: expected one of ('random', 'largest-kl'), found 'sorted'; choose one of them",
        ),
        (
            {"groups": 0},
            "groups, refit_steps, learning_rate: expected at least one group, no negative number of steps "
            "and a positive rate, found 0, 60 and None",
        ),
        ({"refit_steps": -1}, "groups, refit_steps, learning_rate: expected at least one group, "),
        ({"learning_rate": math.nan}, "groups, refit_steps, learning_rate: expected at least one group, "),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        CodingOptions(**options)
    assert str(raised.value).startswith(message)


def test_progress_counts_values(capfd: pytest.CaptureFixture[str]) -> None:
    model = variational_net(streams="network")
    code_model(model, options=CodingOptions(groups=2))
    assert "code: 100%" in capfd.readouterr().err
    check_finite(torch.zeros(()), "nowhere")
    assert part_of(model).kl_bits() == 0
