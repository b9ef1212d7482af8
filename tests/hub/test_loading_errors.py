"""A repository that is damaged, incomplete or too new is refused by `from_pretrained`, with its reason."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from miracle_hub.errors import (
    ChecksumError,
    FormatError,
    OptionError,
    TruncatedPayloadError,
    UnsupportedVersionError,
)
from miracle_hub.format.payload import decode_header, encode_payload
from miracle_hub.plugin.config import MiracleConfig
from miracle_hub.plugin.conversion import DecodePayloads, decode_leftovers
from miracle_hub.plugin.decoder import Decoder, Expected
from miracle_hub.plugin.quantizer import MiracleQuantizer, register

from .damaged import change_config

if TYPE_CHECKING:
    from tests.hub.conftest import Repository

_NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(llama: Repository, tmp_path: Path) -> Path:
    """A compressed folder to be damaged."""
    return Path(shutil.copytree(llama.compressed, tmp_path / "out"))


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What transformers logs; its loggers do not reach pytest's."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Keep(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def change(folder: Path, edit: Callable[[bytes], bytes | None], name: str = _NAME) -> None:
    """Rewrite one payload; None removes it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    payload = edit(tensors.pop(name).numpy().tobytes())
    if payload is not None:
        tensors[name] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt", "narrowed_from_F32": "*"})


def flip(payload: bytes, at: int, bit: int = 1) -> bytes:
    data = bytearray(payload)
    data[at] ^= bit
    return bytes(data)


@pytest.mark.parametrize("at", [20, 200, -1])
def test_a_flipped_bit_is_a_checksum_error_that_names_the_tensor(folder: Path, at: int) -> None:
    change(folder, lambda payload: flip(payload, at))
    with pytest.raises(ChecksumError, match=rf"^{_NAME}: .*expected CRC-32 .*download it again"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_short_payload_is_a_named_error(folder: Path) -> None:
    change(folder, lambda payload: payload[:10])
    with pytest.raises(TruncatedPayloadError, match=rf"^{_NAME}: .*found 10; the file is truncated"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_truncated_file_is_a_named_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors: .*truncated or damaged: download it again"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_damaged_magic_is_found_by_the_repositorys_digest(folder: Path) -> None:
    change(folder, lambda payload: flip(payload, 0))
    with pytest.raises(ChecksumError, match=r"config\.json promises compressed tensors of digest \w{64}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_lost_payload_is_an_error_not_random_weights(folder: Path) -> None:
    change(folder, lambda payload: None)
    with pytest.raises(ChecksumError, match="missing or from another version: download the folder again"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_damaged_magic_without_a_digest_is_a_size_mismatch(folder: Path) -> None:
    change(folder, lambda payload: flip(payload, 0))
    change_config(folder, digest=None)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_wrong_digest_behind_a_right_checksum_fails_and_the_log_says_why(
    folder: Path, log: list[str]
) -> None:
    def lie(payload: bytes) -> bytes:
        header, start = decode_header(payload, _NAME)
        return encode_payload(replace(header, digest=header.digest ^ 1), payload[start:])

    change(folder, lie)
    change_config(folder, digest=None)
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(folder)
    report = "\n".join(log)
    assert f"{_NAME}: the decoded weights have digest" in report
    assert "the payload is damaged: download the file again" in report


def test_a_payload_of_another_shape_is_a_size_mismatch(folder: Path) -> None:
    other = load_file(folder / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    change(folder, lambda payload: other.numpy().tobytes())
    change_config(folder, digest=None)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_newer_payload_asks_for_an_upgrade(folder: Path) -> None:
    change(folder, lambda payload: payload[:4] + b"\x03" + payload[5:])
    with pytest.raises(
        UnsupportedVersionError,
        match=rf"^{_NAME}: this miracle-hub reads payload version 1 or 2, found 3; upgrade: pip install -U",
    ):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("version", [5, 0, "1.5", None])
def test_a_newer_repository_asks_for_an_upgrade(folder: Path, version: object) -> None:
    change_config(folder, format_version=version)
    with pytest.raises(
        UnsupportedVersionError,
        match=rf"^config\.json: this miracle-hub reads format versions up to 4, found {version!r}; "
        "upgrade: pip install -U miracle-hub$",
    ):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("digests", [None, [], "abc"])
def test_stage_digests_that_are_no_list_are_refused(folder: Path, digests: object) -> None:
    change_config(folder, stage_digests=digests)
    with pytest.raises(FormatError, match=r"^config\.json: stage_digests: expected a list of 1 to 9 digests"):
        AutoModel.from_pretrained(folder)


def decoder(expected: dict[str, Expected]) -> Decoder:
    made = Decoder("auto")
    made.expected = expected
    return made


def test_a_left_over_payload_is_decoded_in_place_and_keeps_its_ties(llama: Repository) -> None:
    """transformers <= 5.20 leaves some names to nobody; here without finding a model of that kind."""
    payload = load_file(llama.compressed / "model.safetensors")[_NAME]
    built = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False), torch.nn.Linear(32, 32, bias=False))
    shape, float16, float32 = torch.Size([32, 32]), torch.float16, torch.float32
    built[0].weight = built[1].weight = torch.nn.Parameter(payload, requires_grad=False)
    decode_leftovers(built, decoder({"0.weight": Expected(shape, float16, float32)}))
    assert torch.equal(built[0].weight, load_file(llama.decompressed / "model.safetensors")[_NAME])
    assert built[0].weight is built[1].weight and built[0].weight.requires_grad
    built[0].weight = torch.nn.Parameter(payload, requires_grad=False)
    with pytest.raises(FormatError, match=r"^0\.weight: expected weights of shape \(3,\), found \(32, 32\)"):
        decode_leftovers(built, decoder({"0.weight": Expected(torch.Size([3]), float16, float32)}))


def test_slices_of_payloads_are_refused_by_name(llama: Repository) -> None:
    """As tensor parallelism hands them over; the stand-in has what a distributed parameter has."""
    payload = load_file(llama.compressed / "model.safetensors")[_NAME]
    model = SimpleNamespace(get_parameter_or_buffer=lambda name: SimpleNamespace(_local_tensor=payload))
    with pytest.raises(
        OptionError, match=rf"^{_NAME}: expected a compressed tensor to be loaded whole, found slices"
    ):
        operation = DecodePayloads(Decoder("auto"), None)
        operation.convert({"any": [payload[:100]]}, full_layer_name=_NAME, model=model)


def test_figures_of_later_releases_are_ignored(folder: Path) -> None:
    change_config(folder, dequantize=False, a_figure_of_tomorrow=[1, 2])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")


def test_nothing_is_compressed_on_the_fly(llama: Repository) -> None:
    with pytest.raises(FormatError, match="config.json without one of miracle: run miracle compress first"):
        AutoModelForCausalLM.from_pretrained(llama.source, quantization_config=MiracleConfig())


def test_registering_twice_is_harmless() -> None:
    register()
    register()
    assert AUTO_QUANTIZER_MAPPING["miracle"] is MiracleQuantizer
