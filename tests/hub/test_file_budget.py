"""A budget of the whole file: what a fit becomes never exceeds it, and has at least 99 % of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import miracle_hub
from miracle_hub import CodingOptions, MiracleConfig, VariationalConfig
from miracle_hub.errors import BudgetError
from miracle_hub.finetune.budget import plan_file
from miracle_hub.training import convert
from miracle_hub.training.model import variational_of

from ..training.networks import conv_net

LAYERS: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(**LAYERS, intermediate_size=256, vocab_size=100, max_position_embeddings=32)
    )


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**LAYERS, intermediate_size=128, image_size=16, patch_size=4))


def half_bert() -> nn.Module:
    return bert().to(torch.bfloat16)


def with_tiny_biases() -> nn.Module:
    """float16 does not hold them: they keep their 32 bits, while the norms have 16."""
    model = bert()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(1e-8 * torch.randn_like(parameter))
    return model


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 24, 5), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 40, 3, bias=False), nn.Flatten(),
        nn.Linear(160, 30), nn.BatchNorm1d(30), nn.Linear(30, 5),
    )  # fmt: skip


REPOSITORIES: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "vit": vit,
    "bfloat16": half_bert,
    "tiny biases": with_tiny_biases,
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "tensors": (convolutions, {"streams": "tensor"}),
    "network": (convolutions, {"streams": "network"}),
    "sharing": (convolutions, {"streams": "network", "sharing": {"3.weight": 6.5, "5.weight": 12}}),
    "tiles": (convolutions, {"streams": "network", "sharing": {"weight": 5}, "sharing_kind": "tile"}),
    "matrices": (convolutions, {"streams": "network", "target_modules": "all-matrices"}),
    "blocks": (convolutions, {"streams": "network", "code": "block", "window_bits": 12}),
    "mixed dtypes": (conv_net, {"streams": "network", "window_bits": 8}),
}


def made(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return miracle_hub.make_variational(make(), **options)


def coded(model: nn.Module) -> nn.Module:
    miracle_hub.code_model(model, options=CodingOptions(groups=1), progress=False)
    return model


def repository(make: Callable[[], nn.Module], out: Path, **options: Any) -> tuple[int, float]:
    """Bytes of all files, and bits per weight as the report has them."""
    report = miracle_hub.compress_model(coded(made(make, **options)), out, progress=False)
    n_bytes = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert report.compressed_bytes == n_bytes
    return n_bytes, report.bits_per_weight


def rate_of(model: nn.Module) -> float:
    """Message bits per value, over all streams."""
    streams = variational_of(model).streams
    return sum(s.code.message_bits(s.n_values) for s in streams) / sum(s.n_values for s in streams)


@pytest.mark.parametrize("bits_per_weight", [1.7, 3.2, 6.0])
@pytest.mark.parametrize("kind", REPOSITORIES)
def test_a_repository_has_99_percent_of_its_bits_per_weight_and_never_more(
    kind: str, bits_per_weight: float, tmp_path: Path
) -> None:
    n_bytes, found = repository(
        REPOSITORIES[kind], tmp_path / "out", bits_per_weight=bits_per_weight, window_bits=6
    )
    n_weights = sum(p.numel() for p in REPOSITORIES[kind]().parameters())
    assert 0.99 * bits_per_weight <= 8 * n_bytes / n_weights <= bits_per_weight
    assert 0.99 * bits_per_weight <= found <= bits_per_weight


@pytest.mark.parametrize("steps", [0, 3])
def test_statistics_that_training_moves_have_the_bytes_that_they_were_planned_with(
    steps: int, tmp_path: Path
) -> None:
    """Zeros and ones, as they begin, would take fewer, and what they become more than the budget."""
    sizes: Any = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    model: Any = ResNetForImageClassification(ResNetConfig(**sizes))
    budget = 5.0 * sum(p.numel() for p in model.parameters()) / 8
    miracle_hub.make_variational(model, bits_per_weight=5.0)
    for _ in range(steps):
        model.train()(pixel_values=torch.randn(2, 3, 16, 16))
    report = miracle_hub.compress_model(coded(model), tmp_path / "out", progress=False)
    assert 0.99 * budget <= report.compressed_bytes <= budget


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_a_repository_has_the_highest_rate_that_its_size_allows(kind: str, tmp_path: Path) -> None:
    make, options = REPOSITORIES[kind], {"window_bits": 6, "code": "block" if kind == "vit" else "sliding"}
    wanted = 2.0 if kind == "vit" else 1.5
    n_bytes, _ = repository(make, tmp_path / "out", rate=wanted, **options)
    assert rate_of(made(make, size=n_bytes, **options)) >= 0.999 * wanted
    assert rate_of(made(make, size=n_bytes - n_bytes // 50, **options)) < wanted


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_file_of_a_network_has_99_percent_of_its_size_and_never_more(kind: str, tmp_path: Path) -> None:
    make, options = NETWORKS[kind]
    options = {"window_bits": 10, **options}
    first = made(make, rate=1.0, **options)
    n_bytes = miracle_hub.save(coded(first), tmp_path / "first.safetensors")
    again = made(make, size=n_bytes, **options)
    found = miracle_hub.save(coded(again), tmp_path / "again.safetensors")
    assert 0.99 * n_bytes <= found <= n_bytes and rate_of(again) >= 0.999 * rate_of(first)
    n_weights = sum(p.numel() for p in make().parameters())
    for bits_per_weight in (8 * n_bytes / n_weights + 0.1, 8 * n_bytes / n_weights + 0.77):
        by_rate = made(make, bits_per_weight=bits_per_weight, **options)
        in_all = miracle_hub.save(coded(by_rate), tmp_path / "by_rate.safetensors")
        assert in_all == (tmp_path / "by_rate.safetensors").stat().st_size
        assert 0.99 * bits_per_weight <= 8 * in_all / n_weights <= bits_per_weight


@pytest.mark.parametrize("kind", ["bert", "sharing", "blocks", "tensors"])
def test_a_size_that_no_rate_meets_is_refused_with_the_least_and_the_most(kind: str, tmp_path: Path) -> None:
    make, options = (bert, {}) if kind == "bert" else NETWORKS[kind]
    n_weights = sum(p.numel() for p in make().parameters())
    for size in (100, "1GB"):
        model = make()
        before = dict(model.named_parameters())
        with pytest.raises(BudgetError) as raised:
            miracle_hub.make_variational(model, size=size, **options)
        assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}
        found = re.fullmatch(
            r"size: [\d,]+ bytes were asked for, but the file of this model can have ([\d,]+) \(([\d.]+) "
            r"bits per weight: at the lowest rate, what is not coded plain\) to ([\d,]+) bytes \(([\d.]+) "
            r"bits per weight: at the highest rate\); ask for a size in between, or code other modules",
            str(raised.value),
        )
        assert found
        least, most = (int(found[i].replace(",", "")) for i in (1, 3))
        for given in (
            {"size": least},
            {"size": most},
            *({"bits_per_weight": float(found[i])} for i in (2, 4)),
        ):
            made(make, **given, **options)
        for size in (least - 1, most + 1):
            with pytest.raises(BudgetError):
                made(make, size=size, **options)
        assert least < float(found[2]) * n_weights / 8 < least + n_weights / 8


def test_a_config_for_transformers_has_the_same_budget() -> None:
    torch.manual_seed(0)
    model = miracle_hub.make_variational(bert(), MiracleConfig(bits_per_weight=3.0))
    assert variational_of(model).config == variational_of(made(bert, bits_per_weight=3.0)).config


def test_the_plan_of_a_file_is_known_before_it_is_trained() -> None:
    config = VariationalConfig(size="40kB")
    plan = plan_file(bert(), config)
    assert plan.budget_bytes == 40_000 and 39_600 <= plan.n_bytes <= 40_000
    assert plan.half and all(name.endswith((".weight", ".bias")) for name in plan.half)
    found = variational_of(made(bert, size="40kB"))
    assert found.config == config and found.plan is not None and found.plan.n_bytes == plan.n_bytes
    network = plan_file(convolutions(), VariationalConfig(size="4kB", streams="network"))
    assert network.half is None and 3_960 <= network.n_bytes <= 4_000


def test_a_module_alone_does_not_know_the_file_of_the_model() -> None:
    with pytest.raises(BudgetError) as raised:
        convert.make_variational(nn.Linear(8, 8), VariationalConfig(size=900))
    assert str(raised.value) == (
        "weight: expected rate or message_bits, found the budget of a whole file; call "
        "miracle_hub.make_variational, which measures the model by it"
    )


def test_tied_weights_are_counted_once_under_the_longer_of_their_names(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
        model[2].weight = model[0].weight
        model[3].bias = model[0].bias
        return model

    for streams in ("tensor", "network"):
        model = made(make, size=3000, streams=streams, target_modules="all-matrices")
        assert miracle_hub.save(coded(model), tmp_path / streams) <= 3000
