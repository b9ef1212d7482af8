"""Threads that hold copies of a sum hold the same number: what they store does not depend on who comes last.

A fused multiply-add takes in what came by a shuffle before it is rounded, so that a sum of products differs
in its last bit from thread to thread. Launches that forbid fusing are right; if they did not, it is found.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from streams import generator

from miracle_hub.coding.quantiles import quantiles
from miracle_kernels.reparameterize_mean_kl import reparameterize_mean_kl_backward_triton
from miracle_kernels.select import select_triton
from tests.kernels.device.problems import DeviceFault

ARCHITECTURE = os.environ.get("MIRACLE_DEVICE", "")
pytestmark = pytest.mark.skipif(not ARCHITECTURE, reason="compiled kernels only: make test-compiled")
# The package's attribute `select` is the op.
MODULE: Any = importlib.import_module("miracle_kernels.select")


def choose() -> Any:
    """Of 64 splits, whose sums of products come from several warps."""
    quadratic, linear = torch.randn(2, 7, 16, generator=generator(0))
    with mock.patch.object(MODULE, "resident_programs", lambda *_: 1000):
        return select_triton(quadratic, linear, quantiles(), 12, 1, 2, "best", 3)


def gradients_of_blocks() -> Any:
    mean, grad = torch.randn(2, 1311, generator=generator(0))
    return reparameterize_mean_kl_backward_triton(
        grad, mean, mean, quantiles(), torch.zeros(()), 11.0, 64, 1, 2
    )


@pytest.mark.parametrize("call", [choose, gradients_of_blocks])
def test_copies_of_a_sum_are_equal(call: Callable[[], Any]) -> None:
    from tests.kernels.device.launching import launches_on

    with launches_on(ARCHITECTURE):
        call()


def test_they_would_not_be_if_products_were_fused() -> None:
    """Of `choose` alone: the threads of a block's gradients keep their copies for themselves."""
    from triton.runtime.jit import JITFunction

    from tests.kernels.device.launching import launches_on

    with launches_on(ARCHITECTURE):
        launch: Any = JITFunction.run

        def fused(kernel: Any, *arguments: Any, **options: Any) -> Any:
            return launch(kernel, *arguments, **options | {"enable_fp_fusion": True})

        with (
            mock.patch.object(JITFunction, "run", fused),
            pytest.raises(DeviceFault, match="writes what thread .* writes, with no barrier between them"),
        ):
            choose()
