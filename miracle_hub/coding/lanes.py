"""Sixteen pieces of a stream side by side: the vector instructions of the trellis recursion.

LLVM does not vectorize the recursion by itself (numba's scalar loop runs 10 times slower per thread, see
benchmarks/throughput.py), so the inner step is written in LLVM vectors of 16 lanes, which it
lowers to whatever the processor has. Every lane works on its own piece.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)
_INDEX = ir.IntType(64)
_FAST = ("fast",)
# Larger than any cost; not infinity, which fast-math may not see.
_UNREACHED = 3e38


def _splat(builder, scalar, vector_type):
    """A vector whose lanes all hold `scalar`."""
    undefined = ir.Constant(vector_type, ir.Undefined)
    single = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(single, undefined, ir.Constant(_INTS, [0] * LANES))


def _load(builder, pointer, row):
    """Lanes `pointer[row * LANES : (row + 1) * LANES]`."""
    start = builder.gep(pointer, [builder.mul(row, ir.Constant(_INDEX, LANES))])
    loaded = builder.load(builder.bitcast(start, _FLOATS.as_pointer()))
    loaded.align = 4
    return loaded


def _branch_cost(builder, pointers, state, node, step_weights):
    """Cost so far at `node` plus the cost of the candidates of `state`, per lane."""
    reached, codebook, quadratic, linear = pointers
    total = cgutils.alloca_once_value(builder, _load(builder, reached, node))
    with cgutils.for_range(builder, step_weights) as loop:
        at = builder.add(builder.mul(state, step_weights), loop.index)
        z = _splat(builder, builder.load(builder.gep(codebook, [at])), _FLOATS)
        slope = builder.fmul(_load(builder, quadratic, loop.index), z, flags=_FAST)
        slope = builder.fsub(slope, _load(builder, linear, loop.index), flags=_FAST)
        term = builder.fmul(slope, z, flags=_FAST)
        builder.store(builder.fadd(builder.load(total), term, flags=_FAST), total)
    return builder.load(total)


def _store_bit_planes(builder, choice, pointer, first_plane, planes):
    """Bit b of every lane's choice as one 16-bit word: 2·k bytes per node instead of 16·k bits padded."""
    with cgutils.for_range(builder, planes) as loop:
        shift = _splat(builder, builder.trunc(loop.index, ir.IntType(32)), _INTS)
        mask = builder.trunc(builder.lshr(choice, shift), _MASK)
        word = builder.bitcast(mask, ir.IntType(LANES))
        stored = builder.store(word, builder.gep(pointer, [builder.add(first_plane, loop.index)]))
        stored.align = 2


@intrinsic
def relax_node(typing, reached, codebook, quadratic, linear, offset, out, planes, step, node, shape):  # pyright: ignore[reportUnusedParameter]
    """Best way into one node of the trellis, for 16 pieces at once.

    Args:
        reached: float32 `[nodes, 16]`, cost so far.
        codebook: float32 `[states, step_weights]`.
        quadratic, linear: float32 `[step_weights, 16]`, this step's cost per lane.
        offset: float32 `[16]`, added to the result (keeps the sums near zero).
        out: float32 `[nodes, 16]`; row `node` is written.
        planes: uint16 `[steps, nodes, step_bits]`; row `step, node` is written: the bits of the
            predecessor's index, one word per bit, one bit per lane.
        step, node: which row.
        shape: (nodes, step_bits, step_weights) as an int64 tuple.
    """
    signature = types.void(reached, codebook, quadratic, linear, offset, out, planes, step, node, shape)

    def generate(context, builder, signature, args):
        arrays = zip(signature.args[:7], args[:7], strict=True)
        data = [context.make_array(kind)(context, builder, value).data for kind, value in arrays]
        nodes, step_bits, step_weights = cgutils.unpack_tuple(builder, args[9])
        step, node = args[7], args[8]
        best = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [_UNREACHED] * LANES))
        choice = cgutils.alloca_once_value(builder, ir.Constant(_INTS, [0] * LANES))
        branches = builder.shl(ir.Constant(_INDEX, 1), step_bits)
        with cgutils.for_range(builder, branches) as loop:
            state = builder.add(builder.mul(loop.index, nodes), node)
            source = builder.lshr(state, step_bits)
            cost = _branch_cost(builder, data[:4], state, source, step_weights)
            better = builder.fcmp_ordered("<", cost, builder.load(best))
            builder.store(builder.select(better, cost, builder.load(best)), best)
            index = _splat(builder, builder.trunc(loop.index, ir.IntType(32)), _INTS)
            builder.store(builder.select(better, index, builder.load(choice)), choice)
        shifted = builder.fadd(
            builder.load(best), _load(builder, data[4], ir.Constant(_INDEX, 0)), flags=_FAST
        )
        row = builder.gep(data[5], [builder.mul(node, ir.Constant(_INDEX, LANES))])
        builder.store(shifted, builder.bitcast(row, _FLOATS.as_pointer())).align = 4
        first = builder.mul(builder.add(builder.mul(step, nodes), node), step_bits)
        _store_bit_planes(builder, builder.load(choice), data[6], first, step_bits)
        return context.get_dummy_value()

    return signature, generate
