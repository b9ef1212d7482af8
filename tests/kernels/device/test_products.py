"""Matrices of 16 bits: how a warp loads, stores and multiplies them, by the layouts of the PTX ISA."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.device.machine import FORWARD, Order
from tests.kernels.device.programs import run

LANES = np.arange(32)
# Row and first column of what a thread holds of an 8 × 8 matrix.
ROW, COLUMN = LANES // 4, 2 * (LANES % 4)
BOTH = [Order(FORWARD), Order(FORWARD, at_once=True)]


def whole(seed: int, *shape: int) -> NDArray[np.float16]:
    """Whole numbers, of which no sum here is rounded."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float16)


def pairs(matrix: NDArray[np.float16], row: Any, column: Any) -> NDArray[np.uint32]:
    """Two neighbors of a row in a word."""
    words = np.stack((matrix[row, column], matrix[row, column + 1]), axis=-1)
    return np.ascontiguousarray(words).view(np.uint32)[..., 0]


def of_shared(image: NDArray[Any], threads: int) -> str:
    """PTX that copies an array's bytes to shared memory, 16 per thread and step."""
    steps = image.nbytes // (16 * threads)
    copies = "".join(
        f"ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd160+{16 * threads * step}];\n"
        f"st.shared.v4.b32 [%r5+{16 * threads * step}], {{%r1, %r2, %r3, %r4}};\n"
        for step in range(steps)
    )
    return f"mad.lo.s32 %r5, %r0, 16, 1024;\n{copies}fence.proxy.async.shared::cta;\nbar.sync 0;\n"


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_matrices_are_loaded_and_stored_as_the_threads_hold_them(n: int, is_transposed: bool) -> None:
    image, out = whole(0, 4, 8, 8), np.zeros((4, 32), np.uint32)
    names = [f"%r{20 + k}" for k in range(n)]
    of, suffix = ", ".join(names), ".trans" * is_transposed
    kept = "".join(f"st.global.b32 [%rd41+{128 * k}], {name};\n" for k, name in enumerate(names))
    load = f"ldmatrix.sync.aligned.m8n8.x{n}{suffix}.shared.b16 {{{of}}}, [%r5+0];\n"
    run(of_shared(image, 32) + load + kept, image, out, shared_bytes=512)
    for matrix, found in zip(image[:n], out[:n], strict=True):
        expected = pairs(matrix.T.copy() if is_transposed else matrix, ROW, COLUMN)
        assert np.array_equal(found, expected)
    again = f"bar.sync 0;\nstmatrix.sync.aligned.m8n8.x{n}{suffix}.shared.b16 [%r5], {{{of}}};\nbar.sync 0;\n"
    back = "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];\nst.global.v4.b32 [%rd161], {%r1, %r2, %r3, %r4};\n"
    run(of_shared(image, 32) + load + again + back, image, out, shared_bytes=512)
    assert out.tobytes() == image.tobytes()


def test_a_warp_multiplies_matrices() -> None:
    a, b, c = whole(0, 16, 16), whole(1, 16, 8), whole(2, 16, 8).astype(np.float32)
    columns = [pairs(a, ROW + 8 * (k & 1), COLUMN + 8 * (k >> 1)) for k in range(4)]
    columns += [pairs(b.T, ROW, COLUMN + 8 * k) for k in range(2)]
    columns += [c[ROW + 8 * (k >> 1), COLUMN + (k & 1)].view(np.uint32) for k in range(4)]
    given, out = np.ascontiguousarray(columns), np.zeros((4, 32), np.float32)
    loads = "".join(f"ld.global.b32 %r{10 + k}, [%rd40+{128 * k}];\n" for k in range(10))
    kept = "".join(f"st.global.b32 [%rd41+{128 * k}], %r{20 + k};\n" for k in range(4))
    product = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20, %r21, %r22, %r23}, "
        "{%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r17, %r18, %r19};\n"
    )
    run(loads + product + kept, given, out)
    expected = a.astype(np.float32) @ b.astype(np.float32) + c
    for k in range(4):
        assert np.array_equal(out[k], expected[ROW + 8 * (k >> 1), COLUMN + (k & 1)])


def swizzled(width: int) -> Callable[[int, int], int]:
    """Where (row, byte) lies if rows of `width` bytes follow each other and 16-byte parts change places."""
    rows_per_line = 128 // width

    def place(row: int, byte: int) -> int:
        part = byte // 16 ^ row // rows_per_line % (width // 16)
        return row * width + part * 16 + byte % 16

    return place


def plain(row: int, byte: int) -> int:
    """Where (row, byte) lies if every 8 rows of 16 bytes follow each other."""
    return row // 8 * 256 + byte // 16 * 128 + row % 8 * 16 + byte % 16


# Mode of a descriptor, leading and stride bytes, and what they mean.
LAYOUTS = {
    "none": (0, 128, 256, plain),
    "128": (1, 16, 1024, swizzled(128)),
    "64": (2, 16, 512, swizzled(64)),
    "32": (3, 16, 256, swizzled(32)),
}


def laid_out(matrix: NDArray[np.float16], place: Callable[[int, int], int]) -> NDArray[np.float16]:
    image = np.zeros(8192 // 2, np.float16)
    for row in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            image[place(row, 2 * k) // 2] = matrix[row, k]
    return image


def descriptor(start: int, layout: str) -> int:
    mode, leading, stride, _ = LAYOUTS[layout]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def product(a: str, b: int, transposed: str) -> str:
    targets = ", ".join(f"%r{20 + k}" for k in range(8))
    starts = "".join(f"mov.b32 %r{20 + k}, 0f40A00000;\n" for k in range(8))
    kept = "".join(f"st.global.b32 [%rd41+{512 * k}], %r{20 + k};\n" for k in range(8))
    return (
        f"{starts}mov.b64 %rd9, {b};\n"
        f"wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {{{targets}}}, {a}, %rd9, 1, 1, 1, "
        f"{transposed};\n"
        "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n" + kept
    )


def check(out: NDArray[np.float32], a: NDArray[np.float16], b: NDArray[np.float16]) -> None:
    expected = a.astype(np.float32) @ b.astype(np.float32).T + 5
    thread = np.arange(128)
    for k in range(8):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (k >> 1 & 1)
        assert np.array_equal(out[k], expected[row, 8 * (k // 4) + 2 * (thread % 4) + (k & 1)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_warps_multiply_what_lies_in_shared_memory(layout: str) -> None:
    a, b = whole(0, 64, 16), whole(1, 16, 16)
    place = LAYOUTS[layout][3]
    image = np.concatenate((laid_out(a, place), laid_out(b, place)))
    out = np.zeros((8, 128), np.float32)
    body = f"mov.b64 %rd8, {descriptor(1024, layout)};\n"
    body += product("%rd8", descriptor(1024 + 8192, layout), "0, 0")
    run(of_shared(image, 128) + body, image, out, threads=128, shared_bytes=16384, orders=BOTH)
    check(out, a, b)


def test_four_warps_multiply_what_lies_the_other_way_round() -> None:
    """Rows of 16 neighbors of one k, as many bytes as a swizzle of 32 spans."""
    a, b = whole(0, 64, 16), whole(1, 16, 16)
    place = swizzled(32)
    tiles = [laid_out(a[16 * k : 16 * k + 16].T, place)[:256] for k in range(4)]
    image = np.concatenate((*tiles, np.zeros(4096 - 1024, np.float16), laid_out(b.T, place)))
    out = np.zeros((8, 128), np.float32)
    one = 1024 >> 4 | 512 >> 4 << 16 | 256 >> 4 << 32 | 3 << 62
    body = f"mov.b64 %rd8, {one};\n" + product("%rd8", one + (8192 >> 4), "1, 1")
    run(of_shared(image, 128) + body, image, out, threads=128, shared_bytes=16384, orders=BOTH)
    check(out, a, b)


def test_a_product_may_have_its_first_matrix_in_registers() -> None:
    a, b = whole(0, 64, 16), whole(1, 16, 16)
    image = laid_out(b, swizzled(32))
    thread = np.arange(128)
    rows, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
    given = np.ascontiguousarray([pairs(a, rows + 8 * (k & 1), column + 8 * (k >> 1)) for k in range(4)])
    out = np.zeros((8, 128), np.float32)
    loads = "".join(f"ld.global.b32 %r{10 + k}, [%rd42+{512 * k}];\n" for k in range(4))
    body = loads + product("{%r10, %r11, %r12, %r13}", descriptor(1024, "32"), "0")
    run(of_shared(image, 128) + body, image, out, given, threads=128, shared_bytes=8192, orders=BOTH)
    check(out, a, b)
