"""Lossless differences through plain from_pretrained, the command line and the card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import miracle_hub
from miracle_hub import MiracleConfig, cli
from miracle_hub.codec.dtypes import raw_bytes

from .test_deltas import moved
from .test_loading import assert_same

if TYPE_CHECKING:
    from .conftest import Repository


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_gives_the_fine_tune_bit_for_bit(
    repositories: Callable[..., Repository], dtype: torch.dtype, tmp_path: Path
) -> None:
    repository = repositories("bert-classifier", dtype)
    moved(repository.auto.from_pretrained(repository.source)).save_pretrained(tmp_path / "tuned")
    report = miracle_hub.compress(
        tmp_path / "tuned", tmp_path / "delta", base=repository.source, exact=True, progress=False
    )
    assert report.lossless and report.n_differing and report.compressed_bytes < report.dense_bytes
    config = MiracleConfig(base=repository.source)
    ours, info = repository.auto.from_pretrained(
        tmp_path / "delta", quantization_config=config, output_loading_info=True
    )
    twin = repository.auto.from_pretrained(tmp_path / "tuned")
    assert not any(info.values())
    assert_same(ours.state_dict(), twin.state_dict())
    state, dense = ours.state_dict(), load_file(tmp_path / "tuned" / "model.safetensors")
    assert all(raw_bytes(state[name]) == raw_bytes(tensor) for name, tensor in dense.items())


def test_the_command_line_and_the_card_say_that_it_is_lossless(
    repositories: Callable[..., Repository], tmp_path: Path
) -> None:
    repository = repositories("bert-classifier")
    moved(repository.auto.from_pretrained(repository.source)).save_pretrained(tmp_path / "tuned")

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    base = ("--base", repository.source)
    said = run("compress", tmp_path / "tuned", tmp_path / "delta", *base, "--exact", "--no-progress")
    assert "lossless: every bit of every tensor is kept" in said and "not worth its bytes" not in said
    assert "lossless: every bit of the source is kept" in run("inspect", tmp_path / "delta", *base)
    assert "every byte agrees" in run("verify", tmp_path / "delta", *base, "--dense", tmp_path / "tuned")
    card = (tmp_path / "delta" / "README.md").read_text()
    assert (
        "It is lossless: it decodes to the bits of the model that was compressed, on every machine." in card
    )
    assert "digest of the decoded tensors" in card
