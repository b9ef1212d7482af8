"""Networks here are small: a second thread would only wait."""

import pytest


@pytest.fixture(autouse=True)
def one_thread(one_torch_thread: None) -> None:
    """For all of them."""
