"""Training beside layers that stay compressed: what is dense learns, adapters attach, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from miracle_hub.errors import OptionError
from miracle_hub.plugin.compressed_linear import compressed_layers
from tests.hub.kept import TOKENS, Repositories, assert_close, load, output

if TYPE_CHECKING:
    from tests.hub.conftest import Repository


@pytest.fixture
def model(llama: Repository) -> Any:
    return load(llama)


class Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[0], "labels": TOKENS[0]}


def trainer(model: Any, folder: Path) -> Any:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), max_steps=2, report_to=[], use_cpu=True, learning_rate=0.1, disable_tqdm=True
    )
    return Trainer(model, arguments, train_dataset=Examples())


def test_the_trainer_refuses_to_train_the_compressed_model_alone(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(model, tmp_path)


def test_what_is_not_compressed_gets_its_gradients(llama: Repository, model: Any) -> None:
    dense = llama.auto.from_pretrained(llama.compressed)
    for each in (model, dense):
        each(input_ids=TOKENS, labels=TOKENS).loss.backward()
    theirs = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft about gpt2's fan_in_fan_out
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_attaches_to_all_linear_layers_and_trains_as_on_the_dense_model(
    architecture: str, repositories: Repositories, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    repository = repositories(architecture)
    losses = []
    for base in (load(repository), repository.auto.from_pretrained(repository.compressed)):
        n_kept = len(compressed_layers(base))
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules="all-linear", r=2, lora_dropout=0, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        assert sum("lora_A" in name for name, _ in model.named_parameters()) >= n_kept
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        result = trainer(model, tmp_path).train()
        losses.append(result.training_loss)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed and all("lora_" in name for name in changed)
        model.save_pretrained(tmp_path / str(n_kept))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_merging_an_adapter_is_refused_and_works_after_dequantizing(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    expected = output(adapted)
    with pytest.raises(OptionError, match="compressed layer"):
        adapted.merge_and_unload()
    with pytest.raises(OptionError, match="compressed layer"):
        adapted.merge_and_unload(safe_merge=True)
    model.dequantize()
    frozen = [p for name, p in adapted.named_parameters() if "lora_" not in name and "base_layer" in name]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)
    assert_close(output(adapted.merge_and_unload()), expected)
