"""A plug-in of pytest: kernels of the tests are compiled for MIRACLE_DEVICE, such as sm_90, and executed.

    MIRACLE_DEVICE=sm_90 python -m pytest -p tests.kernels.device.plugin tests/kernels/test_decode.py

MIRACLE_ORDERS says how every launch is run: one or more of forward, backward and shuffled, one after the
other. In the first, asynchronous work happens as late as possible, in all others at once.
"""

import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "0"  # before anything imports triton

from tests.kernels.device import machine  # noqa: E402
from tests.kernels.device.build import NoCompiler, library  # noqa: E402
from tests.kernels.device.launching import launches_on  # noqa: E402

_KINDS = {"forward": machine.FORWARD, "backward": machine.BACKWARD, "shuffled": machine.SHUFFLED}


@pytest.fixture(scope="session", autouse=True)
def machine_runs_kernels() -> Iterator[None]:
    """For the whole session, which is skipped where the machine cannot be built."""
    try:
        library()
    except NoCompiler as error:
        pytest.skip(str(error))
    names = os.environ.get("MIRACLE_ORDERS", "forward shuffled").split()
    orders = [machine.Order(_KINDS[name], place > 0) for place, name in enumerate(names)]
    with launches_on(os.environ["MIRACLE_DEVICE"], orders):
        yield
