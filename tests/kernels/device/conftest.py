"""The machine's own tests need a C++ compiler to build it."""

import pytest

from tests.kernels.device.build import NoCompiler, library


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """Skips where the machine cannot be built."""
    try:
        library()
    except NoCompiler as error:
        pytest.skip(str(error))
