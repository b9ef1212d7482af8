"""Which blocks and which streams are coded first: at random by the seed, or those of largest KL."""

import torch
from torch import Tensor

from miracle_hub.training.coder import CodingOptions, code_model

from .networks import blocks_of, message_in, posterior_of, snapshot, streams_of, variational_net


def blocks_taken(order: str, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Which blocks of three values are coded after each of four groups, and the KL of all of them."""
    given = {"streams": "network", "code": "block", "rate": 2.006}  # 158 blocks of 6 bits
    model = variational_net(**given, parametrization="mean-var", seed=seed)
    (stream,), taken = streams_of(model), []
    stream.begin_coding()
    posterior = posterior_of(stream)
    with torch.no_grad():
        noise = torch.randn(473, generator=torch.Generator().manual_seed(3))
        posterior.log_std.copy_(posterior.value_log_scales() - 1 + noise)
    kl = stream.kl_nats().detach()

    def validate() -> float:
        assert blocks_of(stream).block_weights == 3
        taken.append(message_in(stream).is_coded[::3].clone())
        return 0.0

    options = CodingOptions(groups=4, order=order)
    code_model(model, options=options, validate=validate, progress=False)
    return taken, kl


def test_blocks_are_taken_at_random_by_the_seed() -> None:
    first, same, other = (blocks_taken("random", seed)[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert int(first.sum()) == 69 and 20 < int(first[:79].sum()) < 50  # of 158, from both halves


def test_the_posteriors_of_largest_kl_are_taken_first() -> None:
    taken, kl = blocks_taken("largest-kl")
    for blocks in taken[:3]:
        assert kl[blocks].min() >= kl[~blocks].max()


def test_the_streams_of_largest_kl_are_taken_first() -> None:
    model, taken = variational_net(parametrization="mean-var"), []
    kl = [float(stream.kl_nats().detach().sum()) for stream in streams_of(model)]

    def validate() -> float:
        taken.append([bool(where.any()) for _, where, _ in snapshot(model)])
        return 0.0

    options = CodingOptions(groups=8, order="largest-kl")
    code_model(model, options=options, validate=validate, progress=False)
    begun = [sum(flags) for flags in taken]
    assert begun == sorted(begun) and begun[0] < 3 and begun[-1] == 8
    for flags in taken[:-1]:
        assert min(k for k, flag in zip(kl, flags, strict=True) if flag) >= max(
            (k for k, flag in zip(kl, flags, strict=True) if not flag), default=0
        )
