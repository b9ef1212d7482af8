"""Without a GPU, Triton's interpreter runs the kernels; it must be chosen before triton is imported.

Where tests run in several processes, each has one thread: threads of many would wait for one another.
"""

import importlib.util
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402 (reads OMP_NUM_THREADS)
from hypothesis import HealthCheck, settings  # noqa: E402

# No test measures the machine (limits.py), so no example has a deadline, and drawing one may take long.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        from tests.interpreter import make_faster

        make_faster()
