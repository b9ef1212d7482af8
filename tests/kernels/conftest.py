"""Where kernels run in the tests, and memory that is poisoned before they write it."""

from collections.abc import Iterator

import pytest
import torch
from bounds import check_addresses


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU with Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def checked_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: no kernel of these tests may read or write outside its tensors."""
    if not torch.cuda.is_available():
        check_addresses(monkeypatch)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN (or the largest integer), so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(False)
