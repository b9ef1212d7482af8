"""Where kernels run in the tests, and memory that is poisoned before they write it."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bounds import check_addresses
from slides import MODULE, set_tiles

# Without a GPU: Triton's interpreter, or compiled kernels on the machine of device/.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU with Triton's interpreter or the machine of device/."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def checked_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: no kernel of these tests may read or write outside its tensors."""
    if INTERPRETED:
        check_addresses(monkeypatch)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN (or the largest integer), so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cut_into(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`cut_into(n)`: streams are cut into n pieces, or into as many as are two margins long."""

    def cut(n_pieces: int) -> None:
        def count(n_steps: int, margin: int, wanted: int) -> int:
            return max(1, min(n_pieces, n_steps // (2 * margin)))

        monkeypatch.setattr(MODULE, "count_pieces", count)

    return cut


@pytest.fixture
def run_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`run_alone(k, n)`: launches have n programs, of which program k runs alone. On no GPU."""

    def direct(program: int, n_programs: int) -> None:
        if not INTERPRETED:
            monkeypatch.setattr("tests.kernels.device.launching.directed", (program, n_programs))
            return
        from triton.runtime.interpreter import GridExecutor
        from triton.runtime.interpreter import interpreter_builder as interpreter

        place, size, launch = interpreter.set_grid_idx, interpreter.set_grid_dim, GridExecutor.__call__

        def once(executor: GridExecutor, *arguments: Any, **options: Any) -> None:
            executor.grid = (1,)
            launch(executor, *arguments, **options)

        monkeypatch.setattr(GridExecutor, "__call__", once)
        monkeypatch.setattr(interpreter, "set_grid_dim", lambda *_: size(n_programs, 1, 1))
        monkeypatch.setattr(interpreter, "set_grid_idx", lambda *_: place(program, 0, 0))

    return direct


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter only, which takes longer for many tiles than for one of 2^16 states."""
    if INTERPRETED:
        set_tiles(monkeypatch, TILE_NODES=1 << 16, TILE_STATES=1 << 16, TILE_STATES_DRAWN=1 << 16)
