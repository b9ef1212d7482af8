"""Four kinds of networks, and what evaluation has of them, for claims about whatever is done to modules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import miracle_hub
from miracle_hub import CodingOptions

from .networks import IMAGES, conv_net

X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3))
TOKENS = torch.arange(12).view(2, 6)


class Recurrent(nn.Module):
    """An LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def _bert() -> nn.Module:
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 24}
    dropout: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(
        BertConfig(
            **sizes, **dropout, intermediate_size=32, max_position_embeddings=8, tie_word_embeddings=True
        )
    )


# Name → network, its input, a module whose weight is coded, and another.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, str, str]] = {
    "mlp": (_mlp, X[:, 0], "0", "2"),
    "convolutions": (lambda: conv_net(dropout=0.0), IMAGES, "hidden", "conv"),
    "lstm": (Recurrent, X, "head", "lstm"),
    "bert": (_bert, TOKENS, "bert.embeddings.word_embeddings", "bert.encoder.layer.0.output.dense"),
}


def dense(network: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[network][0]()


def variational(network: str, **options: Any) -> nn.Module:
    """A fresh one, by default a test channel at 3 bits, in evaluation mode."""
    given: Any = {"rate": 3.0, "window_bits": 6, "kl_block_weights": 32, "target_modules": r".*\.weight.*"}
    if network == "bert":
        given["exclude_modules"] = ["LayerNorm"]
    return miracle_hub.make_variational(dense(network), **{**given, **options}).eval()


def module_of(model: nn.Module, network: str, other: bool = False) -> Any:
    _, _, own, others = NETWORKS[network]
    return model.get_submodule(others if other else own)


def output(model: Any, network: str) -> Tensor:
    return logits(model(NETWORKS[network][1]))


def logits(found: Any) -> Tensor:
    return found.logits if hasattr(found, "logits") else found


@torch.no_grad()
def evaluated(model: nn.Module, network: str) -> Tensor:
    return output(model.eval(), network)


def train(model: nn.Module, network: str, steps: int = 1) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        output(model, network).float().square().mean().backward()
        optimizer.step()
    model.eval()


def code(model: nn.Module) -> nn.Module:
    miracle_hub.code_model(model, options=CodingOptions(groups=1), progress=False)
    return model.eval()


def assert_the_file_is_what_is_evaluated(model: nn.Module, fresh: nn.Module, network: str, to: Path) -> None:
    """`fresh`: of the structure and dtype that the model would have without posteriors."""
    expected = evaluated(model, network)
    miracle_hub.save(model, to / "file.safetensors")
    loaded = miracle_hub.load(to / "file.safetensors", fresh)
    assert torch.equal(evaluated(loaded, network), expected)
