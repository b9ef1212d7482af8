"""Threads, warps and programs run in every order, and what they exchange is right."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.kernels.device.machine import BACKWARD, FORWARD, SHUFFLED, Order
from tests.kernels.device.programs import run

ORDERS = [Order(kind, at_once) for kind in (FORWARD, BACKWARD, SHUFFLED) for at_once in (False, True)]


def kept(body: str, threads: int = 32, grid: tuple[int, ...] = (1,), order: Order = ORDERS[0]) -> Any:
    """%r20 of every thread of every program."""
    n_programs = int(np.prod(grid))
    out = np.zeros((n_programs, threads), np.uint32)
    place = f"""
    mov.u32 %r31, %ctaid.x;
    mov.u32 %r32, %ctaid.y;
    mov.u32 %r33, %nctaid.x;
    mad.lo.s32 %r31, %r32, %r33, %r31;
    mad.wide.u32 %rd9, %r31, {4 * threads}, %rd40;
    st.global.b32 [%rd9], %r20;
    """
    run(body + place, out, threads=threads, grid=grid, shared_bytes=4096, orders=[order])
    return out


def test_threads_of_a_warp_take_their_own_ways_and_meet_again() -> None:
    body = """
    mov.b32 %r20, 0;
    mov.b32 %r5, 0;
    $L__BB0_1:
    setp.ge.u32 %p1, %r5, %r0;
    @%p1 bra $L__BB0_2;
    add.s32 %r20, %r20, %r5;
    add.s32 %r5, %r5, 1;
    bra $L__BB0_1;
    $L__BB0_2:
    shfl.sync.idx.b32 %r20, %r20, 31, 31, -1;
    add.s32 %r20, %r20, %r5;
    """
    assert kept(body).tolist() == [[sum(range(31)) + thread for thread in range(32)]]


def test_threads_that_have_ended_take_no_part() -> None:
    body = "mov.b32 %r20, 7;\nsetp.ge.u32 %p1, %r0, 20;\n@%p1 ret;\nredux.sync.add.s32 %r20, %r0, -1;"
    assert kept(body).tolist() == [[sum(range(20))] * 20 + [0] * 12]


@pytest.mark.parametrize("order", ORDERS)
def test_programs_know_their_place_in_the_grid(order: Order) -> None:
    body = "mov.u32 %r20, %ctaid.y;\nmov.u32 %r5, %nctaid.y;\nmad.lo.s32 %r20, %r20, 100, %r5;"
    assert kept(body, 2, (3, 4), order)[:, 1].tolist() == [100 * y + 4 for y in range(4) for _ in range(3)]


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_shows_what_all_warps_wrote(order: Order) -> None:
    """Every thread reads another's number, of a warp that may run later, four times over."""
    step = """
    mad.lo.s32 %r1, %r0, 4, 1024;
    st.shared.b32 [%r1], %r20;
    bar.sync 0;
    add.s32 %r2, %r0, 37;
    rem.u32 %r2, %r2, 96;
    mad.lo.s32 %r2, %r2, 4, 1024;
    ld.shared.b32 %r20, [%r2];
    bar.sync 0;
    """
    found = kept("mov.b32 %r20, %r0;" + 4 * step, 96, order=order)
    assert found.tolist() == [[(thread + 4 * 37) % 96 for thread in range(96)]]


@pytest.mark.parametrize(
    ("instruction", "source"),
    [
        ("shfl.sync.bfly.b32 %r20, %r0, 5, 31, -1", lambda lane: lane ^ 5),
        ("shfl.sync.up.b32 %r20, %r0, 3, 0, -1", lambda lane: lane - 3 if lane >= 3 else lane),
        ("shfl.sync.down.b32 %r20, %r0, 3, 31, -1", lambda lane: lane + 3 if lane < 29 else lane),
        ("shfl.sync.idx.b32 %r20, %r0, 9, 31, -1", lambda lane: 9),
        ("redux.sync.max.u32 %r20, %r0, -1", lambda lane: 31),
        ("redux.sync.xor.b32 %r20, %r0, -1", lambda lane: 0),
        ("setp.lt.u32 %p1, %r0, 3;\nvote.sync.ballot.b32 %r20, %p1, -1", lambda lane: 7),
    ],
)  # fmt: skip
def test_exchanges_inside_a_warp(instruction: str, source: Callable[[int], int]) -> None:
    assert kept(f"{instruction};").tolist() == [[source(lane) for lane in range(32)]]
