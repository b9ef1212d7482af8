"""Every family of instructions gives what the PTX ISA says, by definitions of plain Python numbers."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.device.programs import WARP, results, run

KINDS: dict[str, type[Any]] = {
    "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64,
    "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.float32, "f16": np.float16,
    "u8": np.uint8, "s8": np.int8,
}  # fmt: skip
SPECIAL_FLOATS = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 1e-40, 65519.0, 65520.0, 6e-8, 3e38]


def values(kind: str, seed: int) -> NDArray[Any]:
    """32 numbers of a type: its extremes, and any."""
    dtype, generator = KINDS[kind], np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        found = generator.normal(size=WARP) * 10.0 ** generator.integers(-4, 5, WARP)
        found[: len(SPECIAL_FLOATS)] = generator.permutation(SPECIAL_FLOATS)
        with np.errstate(over="ignore"):
            return found.astype(dtype)
    info = np.iinfo(dtype)
    found = generator.integers(info.min, info.max, WARP, dtype, endpoint=True)
    edges = [0, 1, 2, info.min, info.max, info.max // 2, info.min // 2, 7]
    found[: len(edges)] = generator.permutation(np.array(edges, dtype))
    return found


def wrapped(value: int, kind: str) -> Any:
    """A Python number as one of a type, modulo 2^bits."""
    dtype = KINDS[kind]
    return np.array(value % 2 ** (8 * dtype().itemsize), f"u{dtype().itemsize}").view(dtype)[()]


def toward_zero(x: int, y: int) -> int:
    return abs(x) // abs(y) * (-1 if (x < 0) != (y < 0) else 1)


def ratio(x: int, y: int) -> int:
    return toward_zero(x, y) if y else -1


def rest(x: int, y: int) -> int:
    return x - toward_zero(x, y) * y if y else x


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul.lo": lambda x, y: x * y,
    "min": min, "max": max, "div": ratio, "rem": rest,
}  # fmt: skip
LOGIC: dict[str, Callable[[int, int], int]] = {
    "and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y
}  # fmt: skip
COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
}  # fmt: skip
SIZES = ("16", "32", "64")


def check(instruction: str, to: str, sources: list[str], define: Callable[..., int]) -> None:
    """Of every thread's sources, whose types are given; `define` is of Python numbers."""
    given = [values(kind, seed) for seed, kind in enumerate(sources)]
    names = ", ".join(f"%r{10 + k}" for k in range(len(sources)))
    found = results(f"{instruction} %r20, {names}", KINDS[to], *given)
    expected = [wrapped(define(*map(int, row)), to) for row in zip(*given, strict=True)]
    assert found.tolist() == [int(value) for value in expected], instruction


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_arithmetic_of_integers(name: str, kind: str) -> None:
    check(f"{name}.{kind}", kind, [kind, kind], BINARY[name])


@pytest.mark.parametrize("name", LOGIC)
@pytest.mark.parametrize("size", SIZES)
def test_logic(name: str, size: str) -> None:
    check(f"{name}.b{size}", f"b{size}", [f"b{size}"] * 2, LOGIC[name])


@pytest.mark.parametrize("size", SIZES)
def test_shifts_by_more_than_all_bits_too(size: str) -> None:
    bits, generator = int(size), np.random.default_rng(5)
    by = generator.integers(0, 2 * bits, WARP, np.uint32)
    for name, kind, define in (
        (f"shl.b{size}", f"b{size}", lambda x, n: x << n),
        (f"shr.u{size}", f"u{size}", lambda x, n: x >> n),
        (f"shr.s{size}", f"s{size}", lambda x, n: x >> min(n, bits)),
    ):
        x = values(kind, 3)
        found = results(f"{name} %r20, %r10, %r11", KINDS[kind], x, by)
        pairs = zip(x.tolist(), by.tolist(), strict=True)
        assert found.tolist() == [int(wrapped(define(*pair), kind)) for pair in pairs], name


@pytest.mark.parametrize("size", ["16", "32"])
@pytest.mark.parametrize("sign", "us")
def test_wide_products_and_high_halves(size: str, sign: str) -> None:
    kind, wide = sign + size, f"{sign}{2 * int(size)}"
    check(f"mul.wide.{kind}", wide, [kind, kind], lambda x, y: x * y)
    if size == "32":
        check(f"mul.hi.{kind}", kind, [kind, kind], lambda x, y: x * y >> 32)
        check(f"mad.wide.{kind}", wide, [kind, kind, wide], lambda x, y, z: x * y + z)
        check(f"mul.hi.{sign}64", f"{sign}64", [f"{sign}64"] * 2, lambda x, y: x * y >> 64)
    check(f"mad.lo.{kind}", kind, [kind] * 3, lambda x, y, z: x * y + z)


@pytest.mark.parametrize("kind", ["s16", "u32", "s32", "u64", "s64", "f32"])
@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_and_choices(kind: str, name: str) -> None:
    x, y = values(kind, 1), values(kind, 2)
    y[::3] = x[::3]
    selected = f"selp.{kind if kind == 'f32' else f'b{kind[1:]}'} %r20, %r10, %r11, %p1"
    found = results(f"setp.{name}.{kind} %p1, %r10, %r11;\n{selected}", KINDS[kind], x, y)
    with np.errstate(invalid="ignore"):
        # A number that is none is neither equal nor unequal to any.
        holds = COMPARED[name](x, y) & ~(np.isnan(x) | np.isnan(y)) if kind == "f32" else COMPARED[name](x, y)
    assert found.tobytes() == np.where(holds, x, y).tobytes()


def test_comparisons_with_u_hold_for_what_is_no_number() -> None:
    x, y = values("f32", 1), values("f32", 2)
    for name in COMPARED:
        selected = "selp.b32 %r20, 1, 0, %p1"
        found = results(f"setp.{name}u.f32 %p1, %r10, %r11;\n{selected}", np.uint32, x, y)
        with np.errstate(invalid="ignore"):
            holds = COMPARED[name](x, y) | np.isnan(x) | np.isnan(y)
        assert found.tolist() == holds.tolist(), name


def field(x: int, first: int, n: int, bits: int, signed: bool) -> int:
    """The definition of bfe, bit by bit."""
    first, n = first & 255, n & 255
    sign = x >> min(first + n - 1, bits - 1) & 1 if signed and n else 0
    return sum((x >> (k + first) & 1 if k < n and k + first < bits else sign) << k for k in range(bits))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_fields(kind: str) -> None:
    bits, generator = int(kind[1:]), np.random.default_rng(6)
    word = np.uint32 if bits == 32 else np.uint64
    x = values("u32" if bits == 32 else "u64", 0)
    first, n = (generator.integers(0, bits + 9, WARP).astype(word) for _ in range(2))
    n[:3] = 0, bits, 255
    found = results(f"bfe.{kind} %r20, %r10, %r11, %r12", word, x, first, n)
    rows = zip(x.tolist(), first.tolist(), n.tolist(), strict=True)
    assert found.tolist() == [field(*row, bits, kind[0] == "s") for row in rows]


def test_fields_are_put_into_words() -> None:
    x, y = values("u32", 0), values("u32", 1)
    first, n = (np.random.default_rng(k).integers(0, 40, WARP, np.uint32) for k in range(2))
    found = results("bfi.b32 %r20, %r10, %r11, %r12, %r13", np.uint32, x, y, first, n)
    for row in zip(found.tolist(), x.tolist(), y.tolist(), first.tolist(), n.tolist(), strict=True):
        one, inserted, into, start, count = row
        for bit in range(32):
            inside = start <= bit < start + count
            assert one >> bit & 1 == (inserted >> (bit - start) if inside else into >> bit) & 1


def test_bytes_are_permuted_and_their_signs_copied() -> None:
    x, y, selector = values("u32", 0), values("u32", 1), values("u32", 2)
    found = results("prmt.b32 %r20, %r10, %r11, %r12", np.uint32, x, y, selector)
    for one, a, b, s in zip(*(v.tolist() for v in (found, x, y, selector)), strict=True):
        source = (b << 32 | a).to_bytes(8, "little")
        for k in range(4):
            byte = source[s >> 4 * k & 7]
            assert one >> 8 * k & 255 == ((255 if byte & 128 else 0) if s >> 4 * k & 8 else byte)


def test_funnel_shifts_counts_and_any_logic() -> None:
    check("shf.l.wrap.b32", "b32", ["b32"] * 3, lambda x, y, n: (y << 32 | x) << n % 32 >> 32)
    check("shf.r.wrap.b32", "b32", ["b32"] * 3, lambda x, y, n: (y << 32 | x) >> n % 32)
    check("popc.b32", "b32", ["b32"], lambda x: x.bit_count())
    check("clz.b32", "b32", ["b32"], lambda x: 32 - x.bit_length())
    check("not.b64", "b64", ["b64"], lambda x: ~x)
    check("neg.s32", "s32", ["s32"], lambda x: -x)
    check("abs.s64", "s64", ["s64"], lambda x: abs(x))
    x, y, z = (values("u32", seed) for seed in range(3))
    found = results("lop3.b32 %r20, %r10, %r11, %r12, 0x96", np.uint32, x, y, z)
    assert np.array_equal(found, x ^ y ^ z)
    found = results("lop3.b32 %r20, %r10, %r11, %r12, 0xca", np.uint32, x, y, z)
    assert np.array_equal(found, (x & y) | (~x & z))


@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_conversions_of_integers(to: str, kind: str) -> None:
    check(f"cvt.{to}.{kind}", to, [kind], lambda x: x)


@pytest.mark.parametrize("kind", ["s16", "u32", "s32", "u64", "s64"])
def test_conversions_between_integers_and_floats(kind: str) -> None:
    x = values(kind, 4)
    assert np.array_equal(results(f"cvt.rn.f32.{kind} %r20, %r10", np.float32, x), x.astype(np.float32))
    if kind == "s16":
        return
    given, info = values("f32", 5), np.iinfo(KINDS[kind])
    found = results(f"cvt.rzi.{kind}.f32 %r20, %r10", KINDS[kind], given)
    for one, y in zip(found.tolist(), given.tolist(), strict=True):
        expected = 0 if y != y else info.min if y < info.min else info.max if y > info.max else math.trunc(y)
        assert one == expected


def same(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Bit for bit, but for which of the words is written that are no numbers."""
    is_number = ~np.isnan(expected.astype(np.float64))
    return bool(np.array_equal(is_number, ~np.isnan(found.astype(np.float64)))) and (
        found[is_number].tobytes() == expected[is_number].tobytes()
    )


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.filterwarnings("ignore:invalid")
def test_conversions_to_sixteen_bits_round_to_nearest_even() -> None:
    x = values("f32", 7)
    x[16:24] = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 1.5 * 2.0**-24, 2.0**-14, -(2.0**-15), 65504, -1e5]
    half = x.astype(np.float16)
    assert same(results("cvt.rn.f16.f32 %r20, %r10", np.float16, x), half)
    assert same(results("cvt.f32.f16 %r20, %r10", np.float32, half), half.astype(np.float32))
    words = x.view(np.uint32).astype(np.uint64)
    rounded = ((words + 0x7FFF + (words >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    found = results("cvt.rn.bf16.f32 %r20, %r10", np.uint16, x).astype(np.uint32) << 16
    assert same(found.view(np.float32), np.where(np.isnan(x), x, rounded))
    y = values("f32", 8)
    both = results("cvt.rn.f16x2.f32 %r20, %r10, %r11", np.uint32, x, y)
    assert same((both >> 16).astype(np.uint16).view(np.float16), half)
    assert same((both & 0xFFFF).astype(np.uint16).view(np.float16), y.astype(np.float16))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.filterwarnings("ignore:invalid")
@pytest.mark.filterwarnings("ignore:divide")
def test_arithmetic_of_floats_is_rounded_once() -> None:
    x, y, z = (values("f32", seed) for seed in range(3))
    assert same(results("add.f32 %r20, %r10, %r11", np.float32, x, y), x + y)
    assert same(results("sub.rn.f32 %r20, %r10, %r11", np.float32, x, y), x - y)
    assert same(results("mul.f32 %r20, %r10, %r11", np.float32, x, y), x * y)
    assert same(results("div.full.f32 %r20, %r10, %r11", np.float32, x, y), x / y)
    assert same(results("sqrt.rn.f32 %r20, %r10", np.float32, x), np.sqrt(x))
    exact = (x.astype(np.float64) * y + z).astype(np.float32)
    assert same(results("fma.rn.f32 %r20, %r10, %r11, %r12", np.float32, x, y, z), exact)
    assert same(results("ex2.approx.f32 %r20, %r10", np.float32, x), np.exp2(x.astype(float)).astype("f4"))
    assert same(results("lg2.approx.f32 %r20, %r10", np.float32, x), np.log2(x.astype(float)).astype("f4"))
    half = values("f16", 3), values("f16", 4)
    assert same(results("mul.f16 %r20, %r10, %r11", np.float16, *half), half[0] * half[1])
    assert same(results("add.f16 %r20, %r10, %r11", np.float16, *half), half[0] + half[1])


def test_the_least_and_the_largest_of_floats_are_numbers_where_one_is() -> None:
    x, y = values("f32", 0), values("f32", 9)
    x[30:], y[30:] = [0.0, -0.0], [-0.0, 0.0]
    least = results("min.f32 %r20, %r10, %r11", np.float32, x, y)
    most = results("max.f32 %r20, %r10, %r11", np.float32, x, y)
    assert np.array_equal(least, np.fmin(x, y), equal_nan=True)
    assert np.array_equal(most, np.fmax(x, y), equal_nan=True)
    assert np.signbit(least[30:]).all() and not np.signbit(most[30:]).any()


def test_subnormal_numbers_are_flushed_where_that_is_said() -> None:
    x = np.full(WARP, 1e-40, np.float32)
    assert (results("fma.rn.ftz.f32 %r20, %r10, 0f3F800000, %r10", np.float32, x) == 0).all()
    assert (results("fma.rn.f32 %r20, %r10, 0f3F800000, %r10", np.float32, x) == 2 * x).all()


def test_words_are_packed_and_unpacked() -> None:
    x, y = values("u32", 0), values("u32", 1)
    both = x.astype(np.uint64) | y.astype(np.uint64) << 32
    assert np.array_equal(results("mov.b64 %r20, {%r10, %r11}", np.uint64, x, y), both)
    unpacked = "mov.b64 {%r21, %r20}, %r10"
    assert np.array_equal(results(unpacked, np.uint32, both), y)
    assert np.array_equal(results("mov.b32 {%r20, _}, %r10", np.uint16, x), x.astype(np.uint16))


def test_vectors_are_loaded_and_stored_in_order() -> None:
    given, out = np.arange(4 * WARP, dtype=np.uint32), np.zeros(4 * WARP, np.uint32)
    run(
        "ld.global.L1::evict_last.v4.b32 {%r1, %r2, %r3, %r4}, [%rd160 + 0];\n"
        "st.global.v4.b32 [%rd161 + 0], {%r4, %r3, %r2, %r1};",
        given,
        out,
    )
    assert np.array_equal(out, given.reshape(-1, 4)[:, ::-1].ravel())
