"""What several tests of the coding layer share: all messages of a tiny stream, and the golden decoder."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miracle_hub.coding import cpu

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden_decoder() -> dict[str, Any]:
    """The names of tests/golden/decoder.py, which imports nothing of the package."""
    return runpy.run_path(str(GOLDEN / "decoder.py"))


@pytest.fixture(scope="session")
def every_message(golden_decoder: dict[str, Any]) -> Callable[..., np.ndarray]:
    """`every_message(code, n)`: what each message decodes to, float64 [2^message_bits, n].

    Written with integers and the golden decoder, so that an error of the package cannot hide in it.
    """

    def enumerate_messages(code: Any, n: int) -> np.ndarray:
        bits, steps = code.message_bits(n), code.steps(n)
        assert bits <= 16, "too many messages to enumerate"
        alphabet = np.arange(2**code.window_bits)
        groups = np.arange(-(-code.step_weights // 8))
        key = (code.seed % 2**32, code.seed >> 32)
        words = golden_decoder["philox4x32"]((alphabet[:, None], groups, code.stream_id, 0), key)
        halves = np.stack((words & 0xFFFF, words >> 16), axis=-1).reshape(alphabet.size, -1)
        table = np.frombuffer(golden_decoder["TABLE"], "<f2")[halves[:, : code.step_weights]]
        shifts = bits - code.window_bits - code.step_bits * np.arange(steps)
        states = (np.arange(2**bits)[:, None] >> shifts) & (2**code.window_bits - 1)
        return table[states].reshape(2**bits, -1)[:, :n].astype(np.float64)

    return enumerate_messages


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of threads that the package uses in this test."""
    monkeypatch.setattr(cpu, "n_threads", lambda: request.param)
    return request.param
