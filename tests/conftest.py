"""Without a GPU, Triton's interpreter runs the kernels; it must be chosen before triton is imported.

Where calibration is not what a test is about, "self" means none: it takes seconds, and changes the file.

Where tests run in several processes, each has one thread: threads of many would wait for one another.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402 (reads OMP_NUM_THREADS)
from hypothesis import HealthCheck, settings  # noqa: E402

# No test measures the machine (limits.py), so no example has a deadline, and drawing one may take long.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
        from tests.interpreter import make_faster

        make_faster()


@pytest.fixture(scope="session", autouse=True)
def data_free() -> Iterator[None]:
    """Models of tests do not calibrate themselves, in this process, but in tests marked `calibrated`."""
    from miracle_hub import api  # not before the hook that checks types is there
    from miracle_hub.calibrate.asked import is_asked, is_self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "is_asked", lambda calibrate: is_asked(calibrate) and not is_self(calibrate))
        yield


@pytest.fixture(autouse=True)
def as_users_have_it(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo it for tests marked `calibrated`."""
    if request.node.get_closest_marker("calibrated") is not None:
        from miracle_hub import api
        from miracle_hub.calibrate.asked import is_asked

        monkeypatch.setattr(api, "is_asked", is_asked)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`miracle ARGUMENTS…` in this process: its status, standard output and standard error."""
    from miracle_hub import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["miracle", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Of tiny tensors' threads most wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
