"""What is evaluated is what is written: the bits of a model in memory are those that its file loads to."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import prune

import miracle_hub
from miracle_hub import CodingOptions, MiracleTrainer, code_model, compress_model, make_variational
from miracle_hub.errors import BudgetError, OptionError
from tests.hub.conftest import ARCHITECTURES
from tests.hub.test_trainer import ROWS, arguments, classifier
from tests.training.networks import IMAGES, conv_net, loss_of, variational_net

TOKENS = torch.arange(24).view(3, 8) % 50 + 3
IMAGE = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
_SEQUENCES = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {
    **{
        name: (kind, config, sizes, {"input_ids": TOKENS})
        for name in ("llama", "bert-masked-lm", "bert-classifier")
        for kind, _, config, sizes in [ARCHITECTURES[name]]
    },
    "bart": (
        "BartForConditionalGeneration", "BartConfig",
        dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, vocab_size=64)
        | dict(decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0)
        | dict(decoder_start_token_id=1, bos_token_id=1, eos_token_id=2),
        _SEQUENCES,
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        dict(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64)
        | dict(decoder_start_token_id=0),
        _SEQUENCES,
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig",
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        | dict(image_size=32, patch_size=16),
        {"pixel_values": IMAGE},
    ),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", _RESNET, {"pixel_values": IMAGE}),
}  # fmt: skip
AT_ONCE = CodingOptions(groups=1, refit_steps=0)


def of_transformers(name: str) -> Any:
    """A model whose vectors and statistics are such as training leaves them: no float16 numbers."""
    kind, config, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    model: Any = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)]:
            tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    with torch.no_grad():
        return model.eval()(**given).logits


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    own = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == own[name].dtype and torch.equal(tensor, own[name]), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MODELS), ("bart", torch.bfloat16), ("vit", torch.float16)],
    ids=str,
)
def test_a_coded_model_answers_as_what_is_loaded(
    name: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before it is written already: what a repository holds in 16 bits is rounded with the coding."""
    inputs = MODELS[name][3]
    model = make_variational(of_transformers(name).to(dtype), rate=2.0)
    code_model(model, options=AT_ONCE, progress=False)
    evaluated = logits(model, inputs)
    compress_model(model, tmp_path / "out", progress=False)
    loaded: Any = getattr(transformers, MODELS[name][0]).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), evaluated)
    assert torch.equal(logits(model, inputs), evaluated)
    assert_same_state(loaded, miracle_hub.posterior_mean(model))
    assert not caplog.messages


def test_what_is_changed_after_coding_is_rounded_when_it_is_written_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_variational(of_transformers("bert-classifier"), rate=2.0)
    code_model(model, options=AT_ONCE, progress=False)
    with torch.no_grad():
        model.get_parameter("classifier.bias").add_(1e-5)
    compress_model(model, tmp_path / "out", progress=False)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    inputs = {"input_ids": TOKENS}
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    (said,) = caplog.messages
    assert "1 tensors of the model in memory changed to what the file holds, such as classifier.bias" in said


def test_buffers_that_no_file_holds_are_those_that_a_loaded_model_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cast rounds the frequencies of rotary embeddings, which a loaded model works out in float32."""
    model = make_variational(of_transformers("llama").to(torch.bfloat16), rate=2.0)
    code_model(model, options=AT_ONCE, progress=False)
    compress_model(model, tmp_path / "out", progress=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = {"input_ids": TOKENS}
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert "such as model.rotary_emb.inv_freq" in caplog.text


@pytest.mark.parametrize("change", ["head dropped", "head replaced", "layer dropped", "head added", "pruned"])
def test_a_model_whose_config_says_otherwise_is_refused_before_it_is_written(
    change: str, tmp_path: Path
) -> None:
    """`from_pretrained` would draw what is missing at random."""
    bert = of_transformers("bert-classifier")
    match change:
        case "head dropped":
            bert.classifier = nn.Identity()
        case "head replaced":
            bert.classifier = nn.Linear(bert.config.hidden_size, 7)
        case "layer dropped":
            bert.bert.encoder.layer = bert.bert.encoder.layer[:-1]
        case "head added":
            bert.value = nn.Linear(bert.config.hidden_size, 1)
        case _:
            prune.l1_unstructured(bert.bert.embeddings.LayerNorm, "weight", 0.5)
    code_model(make_variational(bert, rate=2.0), options=AT_ONCE, progress=False)
    with pytest.raises(OptionError, match="expected the tensors that BertForSequenceClassification makes"):
        compress_model(bert, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", ["embed_tokens", "norm"])
def test_weights_that_are_tied_by_hand_are_refused_before_they_are_written(
    first: str, tmp_path: Path
) -> None:
    llama = of_transformers("llama")
    other = llama.lm_head if first == "embed_tokens" else llama.model.layers[0].input_layernorm
    other.weight = getattr(llama.model, first).weight
    code_model(make_variational(llama, rate=2.0), options=AT_ONCE, progress=False)
    with pytest.raises(OptionError, match="expected weights that LlamaForCausalLM ties by its config"):
        compress_model(llama, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_another_dtype_than_that_of_the_file_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bert = of_transformers("bert-classifier").to(torch.bfloat16)
    bert.bert.embeddings.LayerNorm.float()
    model = make_variational(bert, rate=2.0)
    code_model(model, options=AT_ONCE, progress=False)
    compress_model(model, tmp_path / "out", progress=False)
    assert "2 tensors are loaded in another dtype than the model in memory has, such as" in caplog.text
    assert "LayerNorm.weight: torch.float32 in memory, torch.bfloat16 from the file" in caplog.text


def test_a_trainer_that_evaluates_in_bfloat16_writes_what_it_evaluated(tmp_path: Path) -> None:
    given = arguments(tmp_path / "t", bf16_full_eval=True, use_cpu=True)
    model = classifier()
    trainer = MiracleTrainer(model=model, args=given, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    trainer.evaluate()  # from here on the model is in bfloat16
    trainer.compress(tmp_path / "out", options=CodingOptions(groups=2, refit_steps=1))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    found, expected = loaded(TOKENS).logits, model.eval()(TOKENS).logits
    assert found.dtype == expected.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize(("size", "bound"), [("1MB", None), ("1kB", "everything is coded already, in ")])
def test_a_size_for_what_is_coded_whole_is_met_or_refused(
    size: str, bound: str | None, tmp_path: Path
) -> None:
    model = classifier(target_modules="all")
    code_model(model, options=CodingOptions(groups=1), progress=False)
    if bound is None:
        report = compress_model(model, tmp_path / "out", size=size, progress=False)
        assert report.compressed_bytes <= 1_000_000 == report.budget_bytes
    else:
        with pytest.raises(BudgetError, match=bound):
            compress_model(model, tmp_path / "out", size=size, progress=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [None, "6kB"])
def test_the_last_validation_is_that_of_what_is_written(
    size: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a size, matrices that were not fitted are coded after the rest."""
    model = classifier(**{} if size is None else {"target_modules": "all-linear"})
    given = arguments(tmp_path / "t", learning_rate=1e-2)
    trainer = MiracleTrainer(model=model, args=given, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    trainer.compress(
        tmp_path / "out", options=CodingOptions(groups=2, refit_steps=2), validate=True, size=size,
        log_folder=tmp_path,
    )  # fmt: skip
    rows = json.loads((tmp_path / "coding.json").read_text())
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    reader = transformers.Trainer(model=loaded, args=given, eval_dataset=ROWS)  # pyright: ignore
    assert rows[-1]["validation"] == reader.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert_same_state(loaded, miracle_hub.posterior_mean(model))
    assert [record.levelno for record in caplog.records if record.name == "miracle_hub"] == (
        [logging.WARNING] if size else []
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.lstm(images[:, 0])[0][:, -1])


@pytest.mark.parametrize(("streams", "dtype"), [("tensor", torch.bfloat16), ("network", torch.float32)])
@pytest.mark.parametrize("kind", [Recurrent, conv_net], ids=["lstm", "batch-norm"])
def test_a_network_answers_as_what_is_loaded(
    streams: str, kind: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Its vectors keep their bits."""
    torch.manual_seed(0)
    model = make_variational(kind().to(dtype), rate=3.0, window_bits=6, streams=streams)
    images = IMAGES.to(dtype)

    def loss(number: int) -> Tensor:
        return model(images).float().square().mean()

    code_model(model, loss, options=CodingOptions(groups=2, refit_steps=2), progress=False)
    evaluated = model.eval()(images)
    miracle_hub.save(model, tmp_path / "network.safetensors")
    loaded = miracle_hub.load(tmp_path / "network.safetensors", kind().to(dtype)).eval()
    assert torch.equal(loaded(images), evaluated) and torch.equal(model(images), evaluated)
    assert_same_state(loaded, miracle_hub.posterior_mean(model))


def test_a_wrapped_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model = variational_net()
    code_model(model, loss_of(model), options=CodingOptions(groups=2, refit_steps=1), progress=False)
    miracle_hub.save(nn.DataParallel(model), tmp_path / "network.safetensors")
    loaded = miracle_hub.load(tmp_path / "network.safetensors", conv_net(1)).eval()
    assert torch.equal(loaded(IMAGES), model.eval()(IMAGES))
