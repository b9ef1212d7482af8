"""PEFT over variational models, and variational models over PEFT: what should learn does, up to the file."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import miracle_hub
from miracle_hub import CodingOptions
from miracle_hub.errors import OptionError, WrittenWeightError
from miracle_hub.training.model import variational_of

# PEFT asks transformers for an attribute of an older name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TOKENS, LABELS = torch.arange(16).view(2, 8), torch.tensor([0, 1])


def bert() -> Any:
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 24}
    dropout: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(**sizes, **dropout, intermediate_size=32, max_position_embeddings=8)
        )


def variational(model: Any, parametrization: str = "test-channel", **options: Any) -> Any:
    kind: Any = {"parametrization": parametrization, "rate": 2.0, "window_bits": 8}
    return miracle_hub.make_variational(model, **{**kind, **options})


def with_adapters(model: Any, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"], **options))


def moved(model: Any, steps: int = 3) -> set[str]:
    """The parameters that some steps of an optimizer change, by names without those of wrappers."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=LABELS).loss.backward()
        optimizer.step()
    found = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert found == {name for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("base_model.model.") for name in found}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def code(model: Any) -> Any:
    miracle_hub.code_model(model, options=CodingOptions(groups=1), progress=False)
    return model


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["classifier"]}, {"task_type": "SEQ_CLS"}], ids=str
)
@pytest.mark.parametrize("below", ["variational", "adapters"])
@pytest.mark.parametrize("parametrization", ["test-channel", "mean-kl"])
def test_adapters_and_heads_learn_merge_and_are_what_the_file_has(
    parametrization: str, below: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if below == "variational":
        model = with_adapters(variational(bert(), parametrization), **options)
    else:
        model = variational(with_adapters(bert(), **options), parametrization)
    names = moved(model)
    attention = "bert.encoder.layer.0.attention.self"
    wanted = [f"{attention}.{layer}.lora_{part}." for layer in ("query", "value") for part in "AB"]
    wanted += [f"classifier.modules_to_save.default.{name}" for name in ("bias",) if options]
    wanted += ["classifier.modules_to_save.default."] if options else []
    assert all(any(name.startswith(start) for name in names) for start in wanted)
    assert all(any(name.startswith(start) for start in wanted) for name in names), names
    assert int(variational_of(model).draw_number) == 3  # one draw for every pass, whoever calls it
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-6)
    final = logits(code(merged))
    miracle_hub.save(merged, tmp_path / "file.safetensors")
    assert torch.equal(logits(miracle_hub.load(tmp_path / "file.safetensors", bert())), final)
    miracle_hub.compress_model(merged, tmp_path / "out", progress=False)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), final, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parametrization", ["test-channel", "mean-kl"])
def test_a_head_learns_over_a_frozen_body_and_a_body_under_a_frozen_head(parametrization: str) -> None:
    model = variational(bert(), parametrization)
    model.bert.requires_grad_(False)
    assert {name.partition(".")[0] for name in moved(model)} == {"classifier"}
    model.bert.requires_grad_(True)
    model.classifier.requires_grad_(False)
    assert {name.partition(".")[0] for name in moved(model)} == {"bert"}


def test_embeddings_among_modules_to_save_take_nothing_from_the_rest() -> None:
    """The first module that was converted is replaced: posteriors of others stay in the model."""
    model = with_adapters(variational(bert()), modules_to_save=["word_embeddings"])
    moved(model)
    merged = model.eval().merge_and_unload()
    assert isinstance(merged.bert.embeddings.word_embeddings.weight, torch.nn.Parameter)
    merged.requires_grad_(True)
    names = moved(merged)
    assert sum(name.endswith("own.posterior.weight") for name in names) == 10
    assert "bert.embeddings.word_embeddings.weight" in names


def test_what_is_coded_is_not_merged_into_and_adapters_are_merged_before(tmp_path: Path) -> None:
    model = with_adapters(code(variational(bert())))
    moved(model)
    model.eval()
    with pytest.raises(WrittenWeightError, match="query.*expected no writes once coding has begun"):
        logits(model.merge_and_unload())
    on_top = with_adapters(variational(bert()))
    with pytest.raises(
        OptionError, match=r"found adapters of PEFT on it \(PeftModel\); call model.eval\(\) and "
    ):
        miracle_hub.compress_model(on_top, tmp_path / "out")
    plugged = variational(bert())
    plugged._hf_peft_config_loaded = True  # as add_adapter says
    with pytest.raises(OptionError, match="found adapters of PEFT on it"):
        miracle_hub.compress_model(plugged, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["coded", "adapters"])
def test_a_model_with_adapters_is_saved_as_it_is_evaluated(below: str, tmp_path: Path) -> None:
    heads: Any = {"modules_to_save": ["classifier"]}
    if below == "coded":
        model = with_adapters(code(variational(bert())), **heads)
        moved(model)
    else:
        model = variational(with_adapters(bert(), **heads))
        moved(model)
        code(model)
    expected = logits(model)
    miracle_hub.save(model, tmp_path / "file.safetensors")
    loaded = miracle_hub.load(tmp_path / "file.safetensors", with_adapters(bert(), **heads))
    assert torch.equal(logits(loaded), expected)
