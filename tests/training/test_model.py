"""Draws and their gradients in every way that torch runs a model, and the annealing of β."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.convert import make_variational
from miracle_hub.training.layout import Joint
from miracle_hub.training.message import Message
from miracle_hub.training.model import anneal, kl_penalty
from miracle_hub.training.posteriors.mean_kl import MeanKL
from tests import forks

from .networks import (
    IMAGES,
    SMALL,
    blocks_of,
    code_of,
    conv_net,
    loss_of,
    part_of,
    posterior_of,
    streams_of,
    variational_net,
)

STREAMS = ["tensor", "network"]
PARAMETRIZATIONS = ["mean-kl", "mean-var"]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


class Twice(nn.Module):
    """A module that is called twice and a tensor that two share, in segments that may be checkpointed."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.third.weight = self.first.weight
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for module in (self.second, self.third, self.second):
            if self.reentrant is None:
                x = torch.tanh(module(x))
            else:
                x = checkpoint(lambda y, m=module: torch.tanh(m(y)), x, use_reentrant=self.reentrant)  # pyright: ignore[reportAssignmentType]
        return self.first(x)


def twice(reentrant: bool | None = None, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Twice(reentrant)
    return make_variational(model, VariationalConfig(**{**SMALL, **options}))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm() / tensor.norm()) < 1e-5, name


@pytest.mark.parametrize("streams", STREAMS)
def test_a_forward_pass_has_one_draw_of_every_tensor_and_the_next_pass_another(streams: str) -> None:
    model: Any = twice(streams=streams)
    seen: list[list[Tensor]] = []
    for module in (model.first, model.second, model.third):
        module.register_forward_hook(lambda m, *_: seen[-1].append(m.weight))
    for _ in range(2):
        seen.append([])
        model(X)
        # A tensor with a stream of its own is there only as long as its layer needs it.
        assert len(part_of(model).kept) == (streams == "network")
    for first, second, third, again, last in seen:
        assert torch.equal(first, third) and torch.equal(first, last) and torch.equal(second, again)
    assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("streams", STREAMS)
def test_gradients_of_accumulated_passes_are_the_sum_over_their_own_draws(streams: str) -> None:
    model, twin = twice(streams=streams), twice(streams=streams)
    for _ in range(3):
        model(X).square().sum().backward()
    total: dict[str, Tensor] = {}
    for number in range(3):
        twin.zero_grad()
        part_of(twin).draw_number.fill_(number)
        twin(X).square().sum().backward()
        total = {name: total.get(name, 0) + grad for name, grad in gradients(twin).items()}
    assert_close(gradients(model), total)


def test_passes_before_one_backward_keep_their_own_noise() -> None:
    """Noise is made again in the backward pass, from the number that the draw had then."""
    together, apart = variational_net(dropout=0.0), variational_net(dropout=0.0)
    (loss_of(together)(0) + loss_of(together)(1)).backward()
    loss_of(apart)(0).backward()
    loss_of(apart)(1).backward()
    assert_close(gradients(together), gradients(apart))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_checkpointed_gradients_equal_those_without(
    parametrization: str, streams: str, reentrant: bool
) -> None:
    plain = twice(streams=streams, parametrization=parametrization)
    checkpointed = twice(reentrant, streams=streams, parametrization=parametrization)
    for _ in range(2):
        for model in (plain, checkpointed):
            model.zero_grad()
            model(X).square().sum().backward()
        assert_close(gradients(checkpointed), gradients(plain))


@pytest.mark.parametrize("streams", STREAMS)
def test_transformers_own_checkpointing_and_tied_embeddings(streams: str) -> None:
    sizes: Any = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 24}
    tokens, found = torch.arange(12).view(1, 12), []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
        )
        make_variational(model, VariationalConfig(**SMALL, streams=streams)).train()
        if reentrant is not None:
            model._set_gradient_checkpointing(
                True, lambda f, *a, r=reentrant: checkpoint(f, *a, use_reentrant=r)
            )
        model(input_ids=tokens, labels=tokens, loss_type="ForCausalLM").loss.backward()
        found.append(gradients(model))
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


@pytest.mark.parametrize("streams", STREAMS)
def test_autocast_multiplies_in_bfloat16_and_parameters_keep_float32(streams: str) -> None:
    model = variational_net(streams=streams, dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IMAGES)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    found = gradients(model)
    assert {grad.dtype for grad in found.values()} == {torch.float32} and len(found) == len(
        list(model.parameters())
    )
    assert all(grad.isfinite().all() and grad.any() for grad in found.values())


# dynamo looks at .grad of the draw, which is no leaf; it hides the warning, but not from pytest.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("streams", "parametrization", "is_hook_compiled"),
    [("tensor", "mean-kl", True), ("network", "mean-var", True), ("network", "mean-kl", False)],
)
def test_torch_compile_compiles_once_for_all_steps_and_has_the_eager_gradients(
    streams: str, parametrization: str, is_hook_compiled: bool
) -> None:
    torch._dynamo.reset()
    model = variational_net(streams=streams, parametrization=parametrization, dropout=0.0)
    if is_hook_compiled:  # torch.compile leaves the hooks of a user's outermost module alone
        model = nn.Sequential(model)
    eager, counter, frames = copy.deepcopy(model), CompileCounterWithBackend("aot_eager"), []
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    optimizers = [torch.optim.SGD(each.parameters(), 1e-3) for each in (model, eager)]
    for step in range(3):
        for each, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            (each(IMAGES).square().sum() + kl_penalty(each)).backward()
        assert_close(gradients(model), gradients(eager))
        for optimizer in optimizers:
            optimizer.step()
        frames.append(counter.frame_count)
        assert int(part_of(model).draw_number) == step + 1
    assert frames[0] == frames[2] > 0
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(IMAGES), eager.eval()(IMAGES))
            next(model.parameters()).mul_(1.1)
            next(eager.parameters()).mul_(1.1)
        frames.append(counter.frame_count)
    assert frames[3] == frames[5]


WORKER = """
import json, os, sys
import torch
import torch.distributed as distributed
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from tests.training.networks import loss_of, part_of, variational_net
torch.set_num_threads(1)
def make():
    return variational_net(streams="network", parametrization="mean-var", dropout=0.0)
def step(model, number):
    model.zero_grad()
    (loss_of(model)(number) + part_of(model).penalty()).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
meeting, rank = sys.argv[2], 0 if os.fork() else 1
distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
shared = DistributedDataParallel(make())
step(shared, 0)
found = step(shared, 1)
alone = make()
part_of(alone).draw_number.fill_(1)
own, errors, spread = step(alone, 1), {}, {}
for name, grad in own.items():
    mean = grad / 2
    distributed.all_reduce(mean)
    errors[name] = float((found[name] - mean).norm() / mean.norm())
    spread[name] = float((grad - mean).norm() / mean.norm())
distributed.destroy_process_group()
if rank:
    os._exit(0)
assert os.wait()[1] == 0
print(json.dumps([errors, spread]))
"""


def test_distributed_processes_draw_different_noise_and_share_gradients(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = forks.run(WORKER, root, tmp_path / "meeting")
    assert done.returncode == 0, done.stderr
    errors, spread = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 3 and max(errors.values()) < 1e-5
    (by_noise,) = [difference for name, difference in spread.items() if name.endswith("log_std")]
    assert by_noise > 0.1


def test_a_frozen_part_of_the_model_does_not_stop_the_noise() -> None:
    """The first converted module holds the streams: putting it into evaluation mode must not reach them."""
    model: Any = variational_net()
    model.conv.eval()
    assert not torch.equal(model(IMAGES), model(IMAGES))
    assert part_of(model).training


@pytest.mark.parametrize("streams", STREAMS)
def test_means_are_worked_out_again_only_after_something_changed(
    streams: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = variational_net(streams=streams).eval()
    calls: list[int] = []
    moments = MeanKL.moments
    monkeypatch.setattr(MeanKL, "moments", lambda *a: calls.append(1) or moments(*a))
    with torch.inference_mode():
        first = model(IMAGES).clone()
    n_streams = len(streams_of(model))
    assert len(calls) == n_streams and torch.equal(model(IMAGES), first) and len(calls) == n_streams
    other = variational_net(weights_seed=1, streams=streams).eval()
    for change in (
        lambda: model.load_state_dict(other.state_dict()),
        lambda: torch.optim.SGD(model.parameters(), 0.1).step(lambda: fill_gradients(model)),
        lambda: [stream.begin_coding() for stream in streams_of(model)],
    ):
        before = model(IMAGES)
        change()
        after = model(IMAGES)
        assert not torch.equal(after, before)
        assert torch.equal(after, model.train().eval()(IMAGES))


def test_means_that_were_worked_out_under_inference_mode_serve_a_pass_with_gradients() -> None:
    model = variational_net(modules_to_save="conv").eval()
    with torch.inference_mode():
        model(IMAGES)
    loss_of(model)(0).backward()
    assert model.get_parameter("conv.weight").grad is not None


def fill_gradients(model: nn.Module) -> float:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return 0.0


@pytest.mark.parametrize("is_coded", [False, True])
def test_a_state_dict_holds_everything(is_coded: bool) -> None:
    model = variational_net(parametrization="mean-var", streams="network", dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(3):
        (loss_of(model)(step) + kl_penalty(model)).backward()
        optimizer.step()
        anneal(model)
    if is_coded:
        for stream in streams_of(model):
            message = stream.begin_coding()
            message.values[3:9], message.is_coded[3:9] = 1.5, True
    fresh: Any = variational_net(weights_seed=1, parametrization="mean-var", streams="network", dropout=0.0)
    fresh.eval()(IMAGES)
    state = copy.deepcopy(model.state_dict())
    assert not fresh.load_state_dict(state).missing_keys
    means: Any = model.eval().get_submodule("head")
    assert torch.equal(fresh.head.weight, means.weight)
    for each in (fresh, model):
        each.train()
    # The next draws, the penalty and the means are those of the model that was saved.
    assert torch.equal(fresh(IMAGES), model(IMAGES)) and torch.equal(kl_penalty(fresh), kl_penalty(model))
    assert torch.equal(fresh.eval()(IMAGES), model.eval()(IMAGES))
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]


def test_beta_moves_per_block_as_published() -> None:
    """Havasi et al. 2019, algorithm 2: above its budget a block's β is multiplied by 1 + ε, else divided."""
    model = variational_net(parametrization="mean-var", code="block", beta=3e-7, beta_rate=0.02)
    stream = streams_of(model)[4]
    posterior, budget = posterior_of(stream), blocks_of(stream).block_kl_nats
    assert blocks_of(stream).block_weights == code_of(stream).step_weights == 2
    assert budget == pytest.approx(6 * math.log(2))
    expected = [3e-7] * len(stream.kl_nats())
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        with torch.no_grad():  # block after block at random above or below
            posterior.log_std.copy_(posterior.value_log_scales() - 4 * torch.rand(360, generator=generator))
        kl = stream.kl_nats()
        expected = [b * 1.02 if k > budget else b / 1.02 for b, k in zip(expected, kl.tolist(), strict=True)]
        anneal(model)
    assert len(set(expected)) > 10
    torch.testing.assert_close(posterior.annealing.beta(), torch.tensor(expected), rtol=1e-5, atol=0)


def test_beta_of_the_smallest_published_rate_is_exact_after_many_moves() -> None:
    model = variational_net(parametrization="mean-var", beta=1e-8, beta_rate=5e-5)
    annealing = posterior_of(streams_of(model)[0]).annealing
    annealing.moves.add_(46_053)  # a decade, as the paper's rate has it
    torch.testing.assert_close(
        annealing.beta(), torch.full_like(annealing.beta(), 1e-8 * 1.00005**46_053), rtol=1e-5, atol=0
    )
    assert float(annealing.beta()[0]) == pytest.approx(1e-7, rel=1e-4)


def test_the_penalty_is_the_weighted_kl_of_blocks_that_are_not_coded_and_so_is_its_gradient() -> None:
    given = {"streams": "network", "code": "block", "rate": 2.006}  # 158 blocks of 6 bits
    model = variational_net(**given, parametrization="mean-var", beta=0.1)
    (stream,), part = streams_of(model), part_of(model)
    posterior, layout = posterior_of(stream), stream.layout
    assert isinstance(layout, Joint)
    posterior.annealing.moves.copy_(torch.arange(stream.kl_nats().numel()))
    message = stream.message = Message(stream.code, stream.n_values)
    message.is_coded[6:15] = True  # blocks 2, 3 and 4 of three values
    mean, log_std, log_scales = (
        x.detach().double().requires_grad_()
        for x in (posterior.mean_values, posterior.log_std, posterior.log_scales)
    )
    scale = (20.0 * log_scales).exp()[layout.owner]
    q, p = torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, scale)
    kl = nn.functional.pad(torch.distributions.kl_divergence(q, p), (0, 1)).view(-1, 3).sum(1)
    beta = 0.1 * (1 + 5e-5) ** torch.arange(len(kl)).double()
    left = torch.ones(len(kl))
    left[2:5] = 0
    expected = (beta * left * kl).sum()
    expected.backward()
    kl_penalty(model).backward()
    assert kl_penalty(model).item() == pytest.approx(expected.item(), rel=1e-5)
    assert part.kl_bits() == pytest.approx((left * kl).sum().item() / math.log(2), rel=1e-5)
    for found, wanted in (
        (posterior.mean_values, mean),
        (posterior.log_std, log_std),
        (posterior.log_scales, log_scales),
    ):
        assert found.grad is not None
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)
    assert not posterior.mean_values.grad[6:15].any() and posterior.mean_values.grad[15:].any()


def test_mean_kl_has_nothing_to_add_to_the_loss_and_nothing_to_anneal() -> None:
    model = variational_net(streams="network")
    before = copy.deepcopy(model.state_dict())
    assert float(kl_penalty(model)) == 0
    anneal(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (stream,) = streams_of(model)
    width = blocks_of(stream).block_weights
    n_blocks = -(-stream.n_values // width)
    assert part_of(model).kl_bits() == pytest.approx(width * n_blocks * code_of(stream).rate)
    assert conv_net().state_dict().keys() != model.state_dict().keys()
