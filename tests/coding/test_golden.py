"""Committed messages and the bits they decode to: three decoders must agree with every one of them."""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miracle_hub.code import Code
from miracle_hub.coding import cpu, reference

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "coding.json").read_text())
PARAMETERS = ("L", "k", "V", "seed", "stream_id", "n")


def name_of(case: dict[str, Any]) -> str:
    return "-".join(f"{name}{case[name]}" for name in PARAMETERS)


def assert_golden(case: dict[str, Any], values: np.ndarray) -> None:
    """`values` (float16 or float32) are bit for bit the ones of the case."""
    assert values.shape == (case["n"],)
    first = np.array([int(word, 16) for word in case["first_float16"].split()], np.uint16)
    assert first.size == min(16, case["n"])
    assert np.array_equal(values[: first.size].astype(np.float16).view(np.uint16), first)
    found = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
    assert found == case["float32_sha256"]


def message_and_code(case: dict[str, Any]) -> tuple[torch.Tensor, Code]:
    code = Code(*(case[name] for name in PARAMETERS[:5]))
    message = bytes.fromhex(case["message"])
    assert len(message) == code.message_bytes(case["n"])
    return torch.frombuffer(bytearray(message), dtype=torch.uint8), code


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference_decodes_the_golden_bits(case: dict[str, Any]) -> None:
    message, code = message_and_code(case)
    assert_golden(case, reference.decode_stream(message, code, case["n"]).numpy())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_numba_decodes_the_golden_bits(case: dict[str, Any]) -> None:
    message, code = message_and_code(case)
    assert_golden(case, cpu.decode_stream(message, code, case["n"]).numpy())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_independent_decoder_decodes_the_golden_bits(
    case: dict[str, Any], golden_decoder: dict[str, Any]
) -> None:
    parameters = {name: case[name] for name in PARAMETERS}
    values = golden_decoder["decode"](bytes.fromhex(case["message"]), **parameters)
    assert values.dtype == np.float16
    assert_golden(case, values)


def test_independent_decoder_imports_nothing_of_the_package_and_stays_short() -> None:
    source = (GOLDEN / "decoder.py").read_text()
    assert len(source.splitlines()) < 60
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"hashlib", "numpy", "pathlib"}


@pytest.mark.parametrize(
    "corner",
    [
        lambda case: case["V"] == 9,
        lambda case: case["n"] % case["V"],
        lambda case: case["k"] == case["L"] > 1,
        lambda case: case["L"] == 24 and case["k"] == 24,
        lambda case: case["L"] == 24 and case["k"] % 8 in (3, 5, 7),
        lambda case: case["L"] == 1,
        lambda case: case["seed"] >= 2**63,
        lambda case: case["stream_id"] >= 2**31,
        lambda case: case["V"] == 256 and case["V"] << case["L"] <= 2**21,
        lambda case: case["V"] == 256 and case["V"] << case["L"] > 2**21,
        lambda case: case["n"] == 1,
    ],
)
def test_golden_cases_reach_every_corner(corner: Any) -> None:
    assert len(CASES) >= 12
    assert any(corner(case) for case in CASES)
