"""Kernels that lack a barrier, a wait, a fence or a mask are found out: the checks see what they are for."""

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from unittest import mock

import pytest
import torch
from slides import MODULE
from streams import generator, random_message, random_scales, table_of
from torch import Tensor

from miracle_hub.code import Code
from miracle_hub.coding.quantiles import quantiles
from miracle_kernels.codebook import codebook_triton
from miracle_kernels.decode import decode_triton
from miracle_kernels.decode_linear import decode_linear_triton
from miracle_kernels.reparameterize import reparameterize_backward_triton, reparameterize_triton
from miracle_kernels.reparameterize_mean_kl import (
    reparameterize_mean_kl_backward_triton,
    reparameterize_mean_kl_triton,
)
from miracle_kernels.select import select_triton
from miracle_kernels.slide import slide_triton
from tests.kernels.device.mutations import (
    Mutation,
    mutations,
    of_masked_threads,
    with_inverse_mask,
    with_other_values,
)
from tests.kernels.device.problems import DeviceFault

ARCHITECTURE = os.environ.get("MIRACLE_DEVICE", "")
pytestmark = pytest.mark.skipif(not ARCHITECTURE, reason="compiled kernels only: make test-compiled")
CODE = Code(12, 2, 1)
# Of masks a kernel has one for every register; of so many some are left out.
MASKS = 12
# How many barriers, waits and fences a kernel would not need in these calls. Triton has a barrier on both
# sides of every exchange through shared memory, whatever came before.
NOT_NEEDED: dict[str, dict[str, int]] = {
    # The first barrier: there was nothing in shared memory yet.
    "_rotate_kernel": {"barrier": 1},
    # Threads read what they have copied themselves. The copies that the last wait is for are of no bytes.
    "_matrix_kernel": {"barrier": 1, "wait": 1},
    # Threads choose between values that they wrote themselves. The second fence follows no new writes. Nobody
    # reads the first product's sums but the second product, which comes after it anyway.
    "_scan_kernel": {"barrier": 4, "fence": 1, "wait": 1},
    # The barrier inside the exchange before has already followed its reads.
    "_choose_kernel": {"barrier": 1},
    # The same for one of each exchange, of which a draw has four: largest, sum, least and its branch. And a
    # piece that joins two others never looks for its last node, which takes two.
    "slide_kernel": {"barrier": 6},
    # A thread writes the rows that it has read.
    "_reparameterize_mean_kl_backward_kernel": {"barrier": 1},
}
# Calls for one kernel alone.
ONLY = {"select of many blocks": "_scan_kernel"}
# No width of a tile has so few columns, so that masks of columns have something to exclude.
ROWS, COLUMNS, ROTATION = 45, 376, 8
# The same, and one row of x is read in two passes, between which its kernel's barriers stand.
WIDE_COLUMNS = 1304


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Memory of its own: what lies behind it belongs to nobody."""
    return torch.randn(*shape, generator=generator(seed))


def decode(columns: int = COLUMNS, rotation: int = ROTATION) -> list[Tensor]:
    out, message = torch.zeros(ROWS, columns), random_message(CODE, ROWS * columns)
    scales, mean = random_scales(ROWS), normal(ROWS, columns)
    code = (CODE.window_bits, CODE.step_bits, CODE.step_weights, 5, 9)
    digest = decode_triton(out, message, table_of(CODE), scales, mean, ROWS, 0, *code, rotation, 0, 0, True)
    return [out, digest]


def decode_linear(batch: int, columns: int = COLUMNS) -> list[Tensor]:
    code = (CODE.window_bits, CODE.step_bits, CODE.step_weights, 5, 9)
    given = (random_message(CODE, ROWS * columns), table_of(CODE), random_scales(ROWS))
    return [decode_linear_triton(normal(batch, columns), *given, ROWS, *code, ROTATION, 0)]


def select(selection: str, n_blocks: int = 21) -> list[Tensor]:
    given = (2 * normal(n_blocks, 12), 3 * normal(n_blocks, 12, seed=1), quantiles())
    return list(select_triton(*given, 9, 5, 9, selection, 3))


def slide(selection: str) -> list[Tensor]:
    """Of three pieces, one of which joins the others."""
    given = (normal(59), 3 * normal(59, seed=1), table_of(Code(8, 2, 1)))
    with mock.patch.object(MODULE, "_MERGE_WINDOWS", 2):
        return list(slide_triton(*given, 8, 2, 1, selection, 3))


def reparameterize() -> list[Tensor]:
    mean, log_std, grad, prior = (normal(1311, seed=seed) for seed in range(4))
    given = (mean, log_std, quantiles(), torch.tensor(0.5), prior, 5, 9)
    return [*reparameterize_triton(*given), *reparameterize_backward_triton(grad, torch.tensor(0.7), *given)]


def reparameterize_mean_kl(block_weights: int) -> list[Tensor]:
    tau, alpha, grad, prior = (normal(1311, seed=seed) for seed in range(4))
    tensors, code = (tau, alpha, quantiles(), torch.tensor(0.5)), (11.0, block_weights, 5, 9)
    w = reparameterize_mean_kl_triton(*tensors, prior, *code)
    return [w, *reparameterize_mean_kl_backward_triton(grad, *tensors, *code)]


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "codebook": lambda: [codebook_triton(torch.arange(63), quantiles(), 9, 5, 9)],
    "decode": decode,
    "decode of a wide rotation": lambda: decode(384, 128),
    "decode_linear of one row": lambda: decode_linear(1, WIDE_COLUMNS),
    "decode_linear of four rows": lambda: decode_linear(4),
    "select best": lambda: select("best"),
    # As many as products of four warps take.
    "select of many blocks": lambda: select("best", 65),
    "select sample": lambda: select("sample"),
    "slide best": lambda: slide("best"),
    "slide sample": lambda: slide("sample"),
    "reparameterize": reparameterize,
    "reparameterize_mean_kl of 20": lambda: reparameterize_mean_kl(20),
    "reparameterize_mean_kl of 1000": lambda: reparameterize_mean_kl(1000),
}


@cache
def whole(name: str) -> tuple[list[Tensor], dict[str, str]]:
    """What a call gives, and the PTX of every kernel that it launches, by the kernel's name."""
    from tests.kernels.device.launching import launches_on
    from tests.kernels.device.ptx import parse

    texts: dict[str, str] = {}

    def keep(text: str) -> str:
        name = parse(text).name
        texts.setdefault(f"{name}#{len(texts)}" if name in texts else name, text)
        return text

    with launches_on(ARCHITECTURE, change=keep):
        return CALLS[name](), texts


def is_found(name: str, original: str, text: str) -> bool:
    """Whether a call raises, or gives something else, where a kernel's text is another."""
    from tests.kernels.device.launching import launches_on

    try:
        with launches_on(ARCHITECTURE, change=lambda given: text if given == original else given):
            found = CALLS[name]()
    except DeviceFault:
        return True
    return not all(map(torch.equal, found, whole(name)[0]))


def holds_anyway(name: str, text: str, mutation: Mutation) -> bool:
    """Why a mask that is missing is not found: it holds for every thread that comes to it; or the threads
    that it excludes read inside a tensor what nobody uses, or would store what the others do."""
    others = [of_masked_threads(text, mutation, "st.global.b8 [0], 0"), with_inverse_mask(text, mutation)]
    if " ld." in f" {mutation.line}":
        others.append(with_other_values(text, mutation))
    return not all(is_found(name, text, other) for other in others)


def thinned(text: str) -> list[Mutation]:
    """All barriers, waits and fences; of many masks some."""
    found = list(mutations(text))
    masks = [mutation for mutation in found if mutation.kind == "mask"]
    step = max(1, len(masks) // MASKS)
    return [mutation for mutation in found if mutation.kind != "mask" or mutation.place % step == 0]


@pytest.mark.parametrize("name", CALLS)
def test_what_is_left_out_is_found_or_was_not_needed(name: str) -> None:
    for kernel, text in whole(name)[1].items():
        if kernel not in ONLY.get(name, kernel):
            continue
        found, missed = Counter[str](), Counter[str]()
        for mutation in thinned(text):
            if is_found(name, text, mutation.text):
                found[mutation.kind] += 1
            elif mutation.kind != "mask" or not holds_anyway(name, text, mutation):
                missed[mutation.kind] += 1
        allowed = NOT_NEEDED.get(kernel.partition("#")[0], {})
        assert all(count <= allowed.get(kind, 0) for kind, count in missed.items()), (kernel, missed)
        assert all(found[kind] for kind in missed), (kernel, found)
