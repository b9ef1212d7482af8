"""The JSON schema: what the project writes obeys it, and its limits are the readers'."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from torch import Tensor

from miracle_hub.code import (
    FORMAT_VERSION,
    MAX_DIMENSIONS,
    MAX_STEP_WEIGHTS,
    MAX_WIDTH_LOG2,
    MAX_WINDOW_BITS,
    QUANT_METHOD,
    Code,
    SplitCode,
)
from miracle_hub.codec.guard import GUARD, GUARD_ALONE
from miracle_hub.codec.network import read_network
from miracle_hub.codec.report import Report
from miracle_hub.codec.repository import open_repository
from miracle_hub.format import bits, exact, network, payload
from miracle_hub.plugin.config import MiracleConfig

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SCHEMA = json.loads((ROOT / "miracle_hub" / "format" / "schema.json").read_text(encoding="utf-8"))
RIGHT = {"quant_method": "miracle", "format_version": 1, "digest": "0" * 64, "modules_to_not_convert": ["a"]}


def validate(value: Any, kind: str) -> None:
    """As JSON has it: tuples are lists there."""
    schema = {**SCHEMA, "$ref": f"#/$defs/{kind}"}
    Draft202012Validator(schema).validate(json.loads(json.dumps(value)))


def is_valid(value: Any, kind: str) -> bool:
    return Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{kind}"}).is_valid(value)


def validate_repository(folder: Path) -> None:
    validate(json.loads((folder / "config.json").read_text())["quantization_config"], "quantization_config")
    for file in folder.glob("*.safetensors"):
        validate(file_header(file), "file_header")
    for header in payload_headers(folder):
        validate(asdict(header), "payload_header")
    for tensor in open_repository(folder).tensors:
        if tensor.is_exact:
            data = tensor.parts[0].load().numpy().tobytes()
            validate(asdict(exact.decode_exact(data, tensor.name)[0]), "exact_header")


def file_header(file: Path) -> Any:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def payload_headers(folder: Path) -> Iterator[payload.Header]:
    for tensor in open_repository(folder).tensors:
        if tensor.is_coded:
            for part in tensor.parts if not tensor.is_exact else ():
                yield payload.decode_header(part.load().numpy().tobytes(), part.name)[0]


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("repository_[0-9]*")), ids=lambda folder: folder.name)
def test_kept_repositories_obey_the_schema(folder: Path) -> None:
    validate_repository(folder)


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "4kB"}, {"modules_to_not_convert": ["norm"]}, {"seed": 2**64 - 1}]
)
def test_repositories_obey_the_schema(
    options: dict[str, Any],
    save_model: Callable[..., Path],
    tensors: dict[str, Tensor],
    compress: Callable[..., Report],
    tmp_path: Path,
) -> None:
    half = {"half": torch.randn(40, generator=torch.Generator().manual_seed(0)).half()}
    compress(save_model(tensors | half), tmp_path / "out", bits_per_weight=8.0, **options)
    validate_repository(tmp_path / "out")


def test_what_save_pretrained_writes_of_a_compressed_model_obeys_the_schema(compressed: Path) -> None:
    found = json.loads((compressed / "config.json").read_text())["quantization_config"]
    config = MiracleConfig(**found, keep_compressed=True)
    validate(config.to_dict(), "quantization_config")


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("network_*.safetensors")), ids=lambda path: path.stem)
def test_networks_files_obey_the_schema(path: Path) -> None:
    validate(file_header(path), "file_header")
    specs = (
        network.SharedSpec("0.weight", "F32", (20, 12), 0, 240),
        network.SharedSpec("0.bias", "F32", (20,), 0, 20),
        network.SharedSpec("1.weight", "F32", (20,), 0, 20),
        network.SharedSpec("2.weight", "F32", (5, 20), 0, 100),
    )
    stream = read_network(path)[0]
    assert stream is not None
    header, _, _ = network.decode_network(stream, specs, path.name)
    validate(asdict(header), "network_header")


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"format_version": 0},
        {"format_version": FORMAT_VERSION + 1},
        {"format_version": "1"},
        {"digest": "0" * 16},
        {"digest": 5},
        {"modules_to_not_convert": "a"},
        {"modules_to_not_convert": [5]},
        {"seed": -1},
        {"seed": 2**64},
        {"bits_per_weight": "2"},
        {"lossless": "yes"},
        {"guard": "0" * 64},
        {"guard": {}},
        {"guard": {"tensors": []}},
        {"guard": {"tensors": ["0" * 32]}},
        {"guard": {"tensors": ["0" * 64], "config": None}},
    ],
    ids=str,
)
def test_a_wrong_quantization_config_does_not_obey_it(change: dict[str, Any]) -> None:
    assert is_valid(RIGHT, "quantization_config")
    assert not is_valid(RIGHT | change, "quantization_config")


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("quantization_config", RIGHT | {"guard": {"tensors": ["0" * 64], "config": "f" * 64}}, 5),
        ("quantization_config", RIGHT | {"guard": {"tensors": ["0" * 64] * 9}}, RIGHT | {"guard": None}),
        ("file_header", {"__metadata__": {GUARD: "0" * 32}}, {"__metadata__": {GUARD: "0" * 64}}),
        ("file_header", {"__metadata__": {GUARD_ALONE: "0" * 32}}, {"__metadata__": {GUARD_ALONE: "A" * 32}}),
        ("index", {"metadata": {GUARD: "0" * 64}, "weight_map": {"a": "b"}}, {"weight_map": {"a": "../b"}}),
        ("index", {"weight_map": {}}, {"metadata": {GUARD: "0" * 32}, "weight_map": {}}),
        ("network_config", {"width": 5, GUARD: "0" * 64}, {GUARD: 5}),
    ],
)
def test_guards_obey_it(kind: str, right: object, wrong: object) -> None:
    assert is_valid(right, kind) and not is_valid(wrong, kind)


def test_its_limits_are_those_of_the_readers() -> None:
    kinds = SCHEMA["$defs"]
    code = kinds["code"]["properties"]
    assert kinds["quantization_config"]["properties"]["quant_method"]["const"] == QUANT_METHOD
    assert kinds["quantization_config"]["properties"]["format_version"]["maximum"] == FORMAT_VERSION
    assert code["window_bits"]["maximum"] == code["step_bits"]["maximum"] == MAX_WINDOW_BITS
    assert code["step_weights"]["maximum"] == MAX_STEP_WEIGHTS
    assert kinds["dtype"]["enum"] == list(payload.DTYPES)
    assert kinds["dimension"]["maximum"] == payload._MAX_WEIGHTS
    header = kinds["payload_header"]["properties"]
    assert header["rotation"]["enum"] == [1 << i for i in range(MAX_WIDTH_LOG2 + 1)]
    assert header["segments"]["maxItems"] == payload._MAX_SEGMENTS
    assert header["shape"]["maxItems"] == payload._MAX_DIMENSIONS
    own = kinds["exact_header"]["properties"]
    assert own["dtype"]["enum"] == list(exact.DTYPES) and own["n_words"]["maximum"] == exact.MOST_WORDS
    assert own["shape"]["maxItems"] == MAX_DIMENSIONS and own["form"]["maximum"] == exact.DEFLATED_DIFFERENCES
    own = kinds["bits_header"]["properties"]
    assert own["dtype"]["enum"] == list(bits.DTYPES) and own["shape"]["maxItems"] == MAX_DIMENSIONS
    assert kinds["network_header"]["properties"]["tensors"]["maxItems"] == network._MAX_TENSORS
    for kind, described in (
        ("code", Code),
        ("split_code", SplitCode),
        ("payload_header", payload.Header),
        ("network_header", network.NetworkHeader),
        ("exact_header", exact.ExactHeader),
        ("bits_header", bits.BitsHeader),
    ):
        assert set(kinds[kind]["properties"]) == {field.name for field in fields(described)}
