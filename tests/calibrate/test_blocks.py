"""Blocks of models are found where states go from one to the next, and refitted one at a time."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)  # fmt: skip

from miracle_hub.calibrate.block_refits import BlockInMaking, BlockOptions
from miracle_hub.calibrate.blocks import chains_of
from miracle_hub.calibrate.by_blocks import ByBlocks
from miracle_hub.calibrate.journal import Journal
from miracle_hub.calibrate.outputs import answers
from miracle_hub.calibrate.sensitivity import measure
from miracle_hub.calibrate.teacher import Teacher
from miracle_hub.code import Code
from miracle_hub.codec.jobs import Job
from miracle_hub.codec.kept import Kept
from miracle_hub.codec.rates import Choice, Option
from miracle_hub.codec.source import list_tensors
from miracle_hub.codec.trellis import Recipe, decode_payload
from miracle_hub.coding.backend import choose

BACKEND = choose("cpu")
_SHARED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
_DECODER: dict[str, Any] = {**_SHARED, "vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
_TEXT = {"input_ids": torch.arange(1, 21).view(2, 10)}
_TWO_TEXTS = {**_TEXT, "decoder_input_ids": _TEXT["input_ids"]}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_WHISPER = {
    **{"d_model": 32, "max_source_positions": 16, "vocab_size": 64, **_SPECIAL},
    **{"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
    **{"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 64}
_SOUND = {"input_features": torch.randn(2, 80, 32), "decoder_input_ids": _TEXT["input_ids"]}
_IMAGE = {"pixel_values": torch.randn(2, 3, 32, 32)}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {**_DECODER, "head_dim": 16, "layer_types": _TYPES}

MODELS: dict[str, tuple[type, type, dict[str, Any], dict[str, Tensor], list[str]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _DECODER, _TEXT, ["model.layers"]),
    "masks that differ": (Gemma3ForCausalLM, Gemma3TextConfig, _GEMMA, _TEXT, ["model.layers"]),
    "experts": (
        *(MixtralForCausalLM, MixtralConfig, {**_DECODER, "num_local_experts": 4}),
        *(_TEXT, ["model.layers"]),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2, _TEXT, ["transformer.h"]),
    "bert": (BertModel, BertConfig, {**_SHARED, "vocab_size": 64}, _TEXT, ["encoder.layer"]),
    "vit": (ViTModel, ViTConfig, {**_SHARED, "image_size": 32}, _IMAGE, ["layers"]),
    "whisper": (
        *(WhisperForConditionalGeneration, WhisperConfig, _WHISPER, _SOUND),
        ["model.encoder.layers", "model.decoder.layers"],
    ),
    "t5": (
        *(T5ForConditionalGeneration, T5Config, {**_T5, "decoder_start_token_id": 0}),
        *(_TWO_TEXTS, ["encoder.block", "decoder.block"]),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_blocks_are_found_and_run_as_the_model_runs_them(name: str) -> None:
    torch.manual_seed(0)
    cls, config, options, batch, paths = MODELS[name]
    model = cls(config(**options)).eval()
    chains = chains_of(model, batch)
    assert [chain.path for chain in chains] == paths
    for chain in chains:
        ends = list[Any]()
        handle = chain.blocks[-1].register_forward_hook(lambda *seen, ends=ends: ends.append(seen[-1]))
        answers(model, batch)
        handle.remove()
        (states,), calls = chain.record(model, [batch])
        for block, (call,) in zip(chain.blocks, calls, strict=True):
            states = call(block, states)
        assert torch.equal(states, ends[0][0] if isinstance(ends[0], tuple) else ends[0])


class _Skipping(nn.Module):
    """A list whose modules do not take just what the one before made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_what_others_change_in_between_is_no_chain() -> None:
    assert chains_of(_Skipping(), {"x": torch.randn(4, 8)}) == []


Given = tuple[nn.Module, list[Job], list[dict[str, Tensor]]]


@pytest.fixture
def llama(tmp_path: Path) -> Given:
    return llama_of(tmp_path, 0)


def llama_of(tmp_path: Path, seed: int) -> Given:
    """A model, two bits for every matrix with feedback, and eight batches."""
    torch.manual_seed(seed)
    model, batches = LlamaForCausalLM(LlamaConfig(**_DECODER)).eval(), [
        {"input_ids": torch.randint(1, 64, (4, 16))} for _ in range(8)
    ]  # fmt: skip
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    save_file({name: p.detach() for name, p in matrices.items()}, tmp_path / "model.safetensors")
    found, jobs = measure(model, batches, set(matrices), 0), []
    for source in list_tensors([tmp_path / "model.safetensors"]):
        rows, columns = source.shape
        choice = Choice(rows, Option(Recipe(Code(8, 2, 1), True, columns, 32), 0, 0.0))
        jobs.append(Job(source, "", choice, curvature=found.curvature(source.name, source.shape)))
    return model, jobs, batches


def making(model: nn.Module, batches: Any, options: BlockOptions, kept: Kept) -> ByBlocks:
    """By blocks, with norms that may be tuned."""
    model.requires_grad_(False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    vectors = {name: p for name, p in parameters.items() if p.dim() == 1}
    journal, chains = Journal(model, Teacher(model, batches[6:])), chains_of(model, batches[0])
    return ByBlocks(journal, chains, batches[:6], parameters, vectors, options, BACKEND, kept=kept)


def test_blocks_that_are_refitted_bring_answers_nearer(tmp_path: Path) -> None:
    """In the mean of eight models: of one it is a matter of chance whether it is by a tenth."""
    shares = []
    for seed in range(8):
        model, jobs, batches = llama_of(tmp_path, seed)
        dense, losses = copy.deepcopy(model.state_dict()), []
        for options in (BlockOptions(groups=1, steps=0), BlockOptions(groups=4, steps=30)):
            model.load_state_dict(dense)
            refits = making(model, batches, options, Kept())
            made = refits.run(jobs)
            losses.append(refits.journal.losses[-1][1])
            assert sorted(matrix.job.source.name for matrix in made) == sorted(
                job.source.name for job in jobs
            )
            for matrix in made:
                payload = torch.frombuffer(bytearray(matrix.payload()), dtype=torch.uint8)
                found, _ = decode_payload(payload, "a payload", backend=BACKEND)
                assert torch.allclose(found, matrix.parameter, rtol=2**-7, atol=1e-6)
        shares.append(losses[1] / losses[0])
    assert sum(shares) / len(shares) < 0.9


def test_a_refit_of_a_block_that_does_not_help_is_undone(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, jobs, batches = llama
    rising = iter(range(1000))
    monkeypatch.setattr(BlockInMaking, "error", lambda making: float(next(rising)))
    norms = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 1}
    making(model, batches, BlockOptions(groups=2, steps=2), Kept()).run(jobs)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], values) for name, values in norms.items())


def test_what_is_killed_among_blocks_goes_on_to_the_same_payloads(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, jobs, batches = llama
    dense, options = copy.deepcopy(model.state_dict()), BlockOptions(groups=2, steps=2)
    whole = [matrix.payload() for matrix in making(model, batches, options, Kept()).run(jobs)]
    make, begun = BlockInMaking.make, list[int]()

    def killed(self: BlockInMaking, *arguments: Any) -> list[float]:
        begun.append(self.number)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        return make(self, *arguments)

    monkeypatch.setattr(BlockInMaking, "make", killed)
    (tmp_path / "work").mkdir()
    kept = Kept(tmp_path / "work", "x")
    for goes_on in (False, True):
        model.load_state_dict(dense)
        with nullcontext() if goes_on else pytest.raises(KeyboardInterrupt):
            found = [matrix.payload() for matrix in making(model, batches, options, kept).run(jobs)]
            assert found == whole
    assert begun == [0, 1, 1, 2]
