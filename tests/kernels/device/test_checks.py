"""What no kernel may do is found, and named with instruction, line, thread, address; the right way passes."""

import re

import numpy as np
import pytest

from tests.kernels.device.machine import BACKWARD, FORWARD, SHUFFLED, Order, merged
from tests.kernels.device.problems import DeviceFault
from tests.kernels.device.programs import run

ORDERS = [Order(FORWARD), Order(BACKWARD, True), Order(SHUFFLED), Order(SHUFFLED, True)]
# %r1: this thread's four bytes of shared memory, which starts at 1024; %r2: the next thread's.
SHARED = """
    mad.lo.s32 %r1, %r0, 4, 1024;
    add.s32 %r3, %r0, 1;
    and.b32 %r3, %r3, 63;
    mad.lo.s32 %r2, %r3, 4, 1024;
"""
# From one proxy to the other: %rd9 describes 8 rows of 16 columns of 16 bits, without a swizzle.
PRODUCT = """
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {%r21, %r22, %r23, %r24}, {%r10, %r10, %r10, %r10}, %rd9, 0, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
"""
DESCRIBED = """
    mov.b64 %rd9, 2251804108652608;
    mov.b32 %r10, 0;
"""
FILLED = SHARED + "st.shared.b32 [%r1], %r10;\n"
COPIED = SHARED + "cp.async.ca.shared.global [%r1], [%rd40], 4;\n"
DONE = "cp.async.wait_all;\n"
BARRIER = "bar.sync 0;\n"
FENCE = "fence.proxy.async.shared::cta;\n"
FINISHED = "wgmma.wait_group.sync.aligned 0;\n"


ARRAY = np.arange(64, dtype=np.uint32)


def fault(body: str, threads: int = 64, grid: int = 1, order: Order = ORDERS[0], seed: int = 0) -> str:
    """What the machine says of a kernel of one array of 64 words, and 256 bytes of shared memory."""
    ARRAY[:] = np.arange(64)
    with pytest.raises(DeviceFault) as found:
        run(body, ARRAY, threads=threads, grid=(grid,), shared_bytes=256, orders=[order], seed=seed)
    return str(found.value)


def passes(body: str, threads: int = 64, grid: int = 1) -> None:
    """In every order."""
    array = np.arange(64, dtype=np.uint32)
    run(body, array, threads=threads, grid=(grid,), shared_bytes=256, orders=ORDERS)


def test_a_fault_names_kernel_instruction_line_program_thread_and_address() -> None:
    array = np.zeros(63, np.uint32)
    with pytest.raises(DeviceFault) as found:
        run("st.global.b32 [%rd40+0], %r0;", array, threads=64, grid=(1,))
    address = array.ctypes.data + 4 * 63
    assert re.fullmatch(
        r"a_kernel, PTX line \d+: `st\.global\.b32 \[%rd40\+0\], %r0` writes 4 bytes outside the tensors of "
        rf"the launch \(program 0, thread 63, address {address:#x}\)",
        str(found.value),
    )


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("ld.global.b32 %r1, [%rd40+256];", "reads 4 bytes outside the tensors"),
        ("ld.global.b32 %r1, [%rd40+-4];", "reads 4 bytes outside the tensors .*thread 0"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd160];", "reads 16 bytes outside .*thread 16"),
        ("st.global.b64 [%rd80], %rd0;", "writes 8 bytes outside the tensors .*thread 32"),
        ("ld.global.b32 %r1, [%rd40+2];", "accesses 4 bytes at an address that is no multiple of it"),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd40];", "accesses 8 bytes at an address that is no .*thread 1,"),
        (SHARED + "st.shared.b32 [%r1+4], %r0;", "writes 4 bytes outside the program's shared .*thread 63"),
        (SHARED + "ld.shared.b32 %r9, [%r1+-4];", "reads 4 bytes outside the program's shared .*thread 0"),
        (SHARED + "st.shared.b32 [%r1+1], %r0;", "accesses 4 bytes at an address that is no multiple"),
        (SHARED + "ld.shared.b32 %r9, [%r1];", "reads shared memory that nobody has written"),
        ("cp.async.ca.shared.global [1024], [%rd40+256], 4;\n" + DONE, "reads 4 bytes outside the tensors"),
        ("cp.async.ca.shared.global [1024], [%rd40+2], 4;\n" + DONE, "accesses 4 bytes at an address"),
    ],
)  # fmt: skip
def test_addresses_are_checked(body: str, text: str) -> None:
    assert re.search(text, fault(body))


def test_copies_of_fewer_bytes_read_no_more_and_fill_with_zeros() -> None:
    body = SHARED + "cp.async.ca.shared.global [%r1], [%rd40+256], 4, %r10;\n" + DONE
    passes("mov.b32 %r10, 0;\n" + body + "ld.shared.b32 %r9, [%r1];\nst.global.b32 [%rd40], %r9;")
    assert "reads 1 bytes outside" in fault("mov.b32 %r10, 2;\n" + body)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ("st.shared.b32 [%r1], %r0;", "ld.shared.b32 %r9, [%r2];", "reads (what|shared)|what .* reads"),
        ("st.shared.b32 [%r1], %r0;", "st.shared.b32 [%r2], %r0;", "writes what thread \\d+ writes"),
        ("st.global.b32 [%rd40], %r10;", "ld.global.b32 %r9, [%rd11];", "reads what|what .* reads"),
        ("st.global.b32 [%rd40], %r10;", "st.global.b32 [%rd11], %r0;", "writes what thread \\d+ writes"),
    ],
)  # fmt: skip
def test_threads_need_a_barrier_between_them(first: str, second: str, text: str, order: Order) -> None:
    start = SHARED + "mov.b32 %r10, 77;\nmad.wide.u32 %rd11, %r3, 4, %rd0;\n"
    assert re.search(text, fault(start + first + second, order=order))
    passes(start + first + BARRIER + second)


def test_a_later_write_needs_a_barrier_after_the_reads() -> None:
    body = FILLED + BARRIER + "ld.shared.b32 %r9, [%r2];\n{}st.shared.b32 [%r1], %r0;"
    assert "writes what thread" in fault("mov.b32 %r10, 99;\n" + body.format(""))
    passes("mov.b32 %r10, 99;\n" + body.format(BARRIER))


def test_threads_of_a_warp_need_a_synchronization_of_it_or_a_barrier() -> None:
    next_lane = "xor.b32 %r3, %r0, 1;\nmad.lo.s32 %r2, %r3, 4, 1024;\n"
    body = SHARED + next_lane + "st.shared.b32 [%r1], %r0;\n{}ld.shared.b32 %r9, [%r2];"
    assert "with no barrier between them" in fault(body.format(""))
    passes(body.format("bar.warp.sync 0xffffffff;\n"))
    # Of other warps it says nothing.
    other = body.replace("xor.b32 %r3, %r0, 1", "xor.b32 %r3, %r0, 32")
    assert "with no barrier between them" in fault(
        other.format("bar.warp.sync 0xffffffff;\n"), order=ORDERS[1]
    )


def test_equal_values_may_be_stored_twice() -> None:
    passes("mov.b32 %r10, 5;\nst.global.b32 [%rd0], %r10;\nst.shared.b32 [1024], %r10;")
    assert "writes what thread 0 writes" in fault("st.global.b32 [%rd0], %r0;")


OTHERS = "mov.u32 %r5, %ctaid.x;\nmad.wide.u32 %rd11, %r5, 4, %rd0;\n"


@pytest.mark.parametrize("order", ORDERS)
def test_programs_of_a_launch_never_share_what_one_writes(order: Order) -> None:
    """A barrier is a program's own; who comes first is nobody's business."""
    written = OTHERS + "st.global.b32 [%rd0+128], %r5;\n"
    assert "writes what program" in fault(written, 1, grid=3, order=order)
    mixed = (
        OTHERS + "add.s32 %r6, %r5, 50;\nst.global.b32 [%rd11], %r6;\nbar.sync 0;\nld.global.b32 %r7, [%rd0];"
    )
    assert re.search("(reads what program .* writes|writes what program .* reads)", fault(mixed, 1, 3, order))
    passes(OTHERS + "ld.global.b32 %r7, [%rd0+128];\nst.global.b32 [%rd11], %r7;", 1, grid=3)


def test_a_read_of_several_programs_is_remembered_when_one_of_them_writes() -> None:
    body = OTHERS + "ld.global.b32 %r7, [%rd0];\nsetp.eq.s32 %p1, %r5, {};\n@%p1 st.global.b32 [%rd0], 9;"
    for program in (0, 1, 2):
        assert "program" in fault(body.format(program), 1, grid=3)


@pytest.mark.parametrize("order", ORDERS)
def test_asynchronous_copies_are_waited_for(order: Order) -> None:
    read = "ld.shared.b32 %r9, [%r1];\n"
    assert "reads what an asynchronous copy may not have written yet" in fault(
        COPIED + read + DONE, order=order
    )
    late = "cp.async.commit_group;\n" + COPIED + "cp.async.commit_group;\ncp.async.wait_group 1;\n"
    assert "may not have written yet" in fault(late + read, order=order)
    over = COPIED + "st.shared.b32 [%r1], %r0;\n" + DONE
    assert "writes what an asynchronous copy may still write" in fault(over, order=order)
    passes(COPIED + DONE + read)
    passes(COPIED + "cp.async.commit_group;\ncp.async.wait_group 0;\n" + read)


def test_copies_of_other_threads_need_a_barrier_too() -> None:
    assert "with no barrier between them" in fault(
        COPIED + DONE + "ld.shared.b32 %r9, [%r2];", order=ORDERS[3]
    )
    passes(COPIED + DONE + BARRIER + "ld.shared.b32 %r9, [%r2];")


@pytest.mark.parametrize("order", ORDERS)
def test_products_read_what_a_fence_and_a_barrier_show_them(order: Order) -> None:
    filled = DESCRIBED + FILLED
    finished = PRODUCT + FINISHED
    assert "with no proxy fence between" in fault(filled + BARRIER + finished, order=order)
    assert "with no barrier between" in fault(filled + FENCE + finished, order=order)
    assert "with no proxy fence between" in fault(FENCE + filled + BARRIER + finished, order=order)
    passes(filled + FENCE + BARRIER + finished)


@pytest.mark.parametrize("order", ORDERS)
def test_products_are_waited_for_before_their_memory_is_written(order: Order) -> None:
    ready = DESCRIBED + FILLED + FENCE + BARRIER + PRODUCT
    again = "st.shared.b32 [%r1], %r0;\n"
    found = fault(ready + BARRIER + again + FINISHED, order=order)
    assert "writes what an asynchronous product may still read" in found
    passes(ready + FINISHED + BARRIER + again)


def test_barriers_are_reached_by_whole_warps_and_by_all_of_them() -> None:
    odd = "and.b32 %r5, %r0, 1;\nsetp.eq.s32 %p1, %r5, 1;\n"
    text = "is reached by some threads of its warp only, those of mask 0xaaaaaaaa"
    assert text in fault(odd + "@%p1 bar.sync 0;")
    assert text in fault(odd + "@%p1 shfl.sync.bfly.b32 %r6, %r0, 2, 31, -1;")
    assert text in fault(odd + "@%p1 redux.sync.add.s32 %r6, %r0, -1;")
    assert text in fault(odd + "@%p1 bar.warp.sync 0xffffffff;")
    second = "setp.ge.s32 %p1, %r0, 32;\n"
    assert "waits for warp 1, which has ended" in fault(second + "@%p1 ret;\nbar.sync 0;")
    passes(second + "@%p1 bra $L__BB0_9;\nmov.b32 %r5, 1;\n$L__BB0_9:\nbar.sync 0;")


def test_a_shuffle_takes_nothing_from_threads_that_do_not_take_part() -> None:
    body = "setp.lt.s32 %p1, %r0, 16;\n@%p1 shfl.sync.idx.b32 %r6, %r0, {}, 31, 0xffff;"
    assert "takes a value from thread 20 of its warp" in fault(body.format(20), 32)
    passes(body.format(3), 32)


def test_bytes_that_depend_on_the_order_are_found() -> None:
    """Such as the sums of a product before and after it has happened, which is nobody's race."""
    ones = "mov.b32 %r10, 0x3C003C00;\nmov.b32 %r21, 0;\n"
    ready = DESCRIBED + ones + FILLED + FENCE + BARRIER + PRODUCT
    kept = "st.global.b32 [%rd40], %r21;\n"
    two = [Order(FORWARD), Order(FORWARD, True)]
    array = np.zeros(64, np.uint32)
    run(ready + FINISHED + kept, array, threads=64, shared_bytes=256, orders=two)
    assert (array.view(np.float32) == 16).all()
    array.fill(0)
    with pytest.raises(DeviceFault, match="leaves other bytes than in another order"):
        run(ready + kept + FINISHED, array, threads=64, shared_bytes=256, orders=two)


def test_an_order_by_seed_is_the_same_again_and_other_seeds_give_others() -> None:
    """Which two programs come first shows in what is found."""
    found = [fault(OTHERS + "st.global.b32 [%rd0], %r5;", 1, 9, ORDERS[2], seed) for seed in (0, 1, 2, 3, 0)]
    assert found[0] == found[4] and len(set(found)) > 1


def test_regions_that_overlap_are_one() -> None:
    assert merged([(8, 16), (0, 9), (20, 24), (24, 28), (4, 4)]) == [[0, 16], [20, 24], [24, 28]]
