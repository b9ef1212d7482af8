"""Networks that are fitted in a moment, and what their weights are, worked out apart from the package."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miracle_hub.code import Code
from miracle_hub.coding.cpu import decode_stream
from miracle_hub.training.blocks import Budget
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.convert import make_variational
from miracle_hub.training.layout import Joint
from miracle_hub.training.message import Message
from miracle_hub.training.model import Variational, variational_of
from miracle_hub.training.stream import Stream, message_of

IMAGES = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 5
# Every tensor of ConvNet has 4 values at least, whose message at 3 bits each has room for a window.
SMALL: dict[str, Any] = {
    "rate": 3.0,
    "window_bits": 6,
    "kl_block_weights": 32,
    "parametrization": "mean-kl",
}


class ConvNet(nn.Module):
    """473 weights, a batch norm, whose buffers are not coded, and dropout, which draws random numbers."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(36, 10), nn.Linear(10, 5)
        self.dropout = dropout

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.conv(images)), 2).flatten(1)
        return self.head(F.dropout(torch.tanh(self.hidden(x)), self.dropout, self.training))


def conv_net(seed: int = 0, dropout: float = 0.1) -> ConvNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConvNet(dropout)


def variational_net(weights_seed: int = 0, dropout: float = 0.1, **options: Any) -> nn.Module:
    """A converted ConvNet, Mean-KL at 3 bits per value, unless `options` say otherwise."""
    config = VariationalConfig(**{**SMALL, "target_modules": "all", **options})
    return make_variational(conv_net(weights_seed, dropout), config)


def loss_of(model: nn.Module) -> Callable[[int], Tensor]:
    """Cross entropy of the i-th batch."""

    def loss(number: int) -> Tensor:
        at = torch.arange(4 * number, 4 * number + 8) % len(IMAGES)
        return F.cross_entropy(model(IMAGES[at]), LABELS[at])

    return loss


def part_of(model: nn.Module) -> Variational:
    return variational_of(model)


def streams_of(model: nn.Module) -> list[Stream]:
    return list(variational_of(model).streams)


def posterior_of(stream: Stream) -> Any:
    """A stream's posterior, of whatever kind it is."""
    return stream.posterior


def code_of(stream: Stream) -> Code:
    """The code of a stream that has one."""
    assert isinstance(stream.code, Code)
    return stream.code


def blocks_of(stream: Stream) -> Budget:
    """The budget of a stream that has one code."""
    assert isinstance(stream.budget, Budget)
    return stream.budget


def message_in(stream: Stream) -> Message:
    """What is chosen of a stream whose coding has begun."""
    assert stream.message is not None
    return stream.message


def in_stream_order(model: nn.Module, stream: Stream) -> Tensor:
    """The weights of a dense model as values of a stream without sharing."""
    values = torch.cat([model.get_parameter(m.name).detach().flatten() for m in stream.members])
    return values[stream.layout.order] if isinstance(stream.layout, Joint) else values


def candidates_of(stream: Stream) -> Tensor:
    """What the message of every code of a coded stream stands for."""
    segments, message, parts = stream.code.segments(stream.n_values), message_of(stream), []
    for n_values, code in segments:
        own, message = message.tensor_split([code.message_bytes(n_values)])
        parts.append(torch.as_tensor(decode_stream(own, code, n_values)))
    assert not len(message)
    return torch.cat(parts)


def decoded(stream: Stream) -> list[Tensor]:
    """The float32 weights of every member of a coded stream, from its message and scales alone."""
    z = candidates_of(stream)
    scales = stream.scales()
    if not isinstance(stream.layout, Joint):
        rows = z.view(scales.numel(), -1)
        return [(rows * scales[:, None]).view(stream.members[0].shape)]
    values = torch.empty_like(z).index_copy_(0, stream.layout.order, z)
    sizes = [member.sharing.n_values for member in stream.members]
    found = []
    for i, (member, own) in enumerate(zip(stream.members, values.split(sizes), strict=True)):
        places, signs = member.sharing.places(stream.code.seed, i)
        found.append((own[places] * signs * scales[i]).view(member.shape))
    return found


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def snapshot(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every stream, what is coded, where, and the scales."""
    found = []
    for stream in streams_of(model):
        message = message_in(stream)
        found.append((message.values.clone(), message.is_coded.clone(), stream.scales().clone()))
    return found
