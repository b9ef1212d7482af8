"""kernels/counting.py: loops are found in a listing, and every instruction counts as often as it runs."""

from typing import Any

import pytest
from scripts import script

COUNTING: Any = script("counting")
Passes = COUNTING.Passes
# As cuobjdump prints a kernel: before its loop over tiles, in the loop two others, and what nothing leads to.
LISTING = """
        code for sm_90
                Function : _a_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;              /* 0x0000000402027981 */
        /*0020*/               @P0 EXIT ;                                        /* 0x000000000000094d */
        /*0030*/                   SHF.R.U32.HI R4, RZ, 0x1, R4 ;                /* the loop over tiles */
        /*0040*/                   LDGDEPBAR ;                                   /* the first inner loop */
        /*0050*/               @P1 FFMA R0, R1, R2, R3 ;                         /* 0x0 */
        /*0060*/               @P2 BRA 0x40 ;                                    /* 0x0 */
        /*0070*/                   BRA.U !UP0, 0x90 ;                            /* around one instruction */
        /*0080*/                   HMMA.16816.F32 R4, R4, R8, RZ ;               /* 0x0 */
        /*0090*/                   BRA.DIV UR4, 0x100 ;                          /* where warps diverged */
        /*00a0*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;             /* the second */
        /*00b0*/              @!P2 BRA 0xa0 ;                                    /* 0x0 */
        /*00c0*/                   STG.E.128 desc[UR4][R2.64], R4 ;              /* 0x0 */
        /*00d0*/                   ULDC.64 UR4, c[0x0][0x208] ;                  /* 0x0 */
        /*00e0*/               @P3 BRA 0x30 ;                                    /* 0x0 */
        /*00f0*/                   EXIT ;                                        /* 0x0 */
        /*0100*/                   WARPSYNC.COLLECTIVE R5, 0x110 ;               /* 0x0 */
        /*0110*/                   BRA 0xa0 ;                                    /* 0x0 */
        /*0120*/                   BRA 0x120;                                    /* 0x0 */
        /*0130*/                   NOP;                                          /* 0x0 */
"""


def straight(*lines: str) -> str:
    """A listing of these instructions."""
    return "".join(f"        /*{16 * i:04x}*/    {line} ;\n" for i, line in enumerate(lines))


def test_loops_are_found_and_nested() -> None:
    (tile,) = COUNTING.loops(COUNTING.listed(LISTING))
    assert tile.places == frozenset(range(3, 15))
    assert [inner.places for inner in tile.inner] == [frozenset((4, 5, 6)), frozenset((10, 11))]
    assert not any(inner.inner for inner in tile.inner)


def test_a_body_counts_as_often_as_it_runs() -> None:
    counts, once = COUNTING.executed(LISTING, (Passes(5), Passes(3)), True)
    assert once == 4  # before the loop, and the EXIT behind it
    assert counts["FFMA"] == counts["LDGDEPBAR"] == 5 and counts["SHFL.BFLY"] == 3
    assert counts["SHF.R.U32.HI"] == counts["HMMA.16816.F32"] == counts["STG.E.128"] == 1
    assert counts.total() == 3 * 5 + 2 * 3 + 7 and not counts["NOP"] and not counts["WARPSYNC.COLLECTIVE"]


def test_counts_per_unit_are_by_kind() -> None:
    found = COUNTING.per_unit(LISTING, (Passes(5), Passes(3)), True, 64 / 256)
    assert found["instructions"] == 28 / 4
    kinds = {"barrier": 5, "float": 5, "shuffle": 3, "integer": 1, "tensor": 1, "global": 1, "uniform": 1}
    kinds["control"] = 28 - sum(kinds.values())
    assert {name: count / 4 for name, count in kinds.items()} | {
        "instructions": 7.0,
        "once_per_program": 4,
    } == found


def test_loops_that_run_once_may_be_gone_and_all_where_they_were_unrolled() -> None:
    assert COUNTING.executed(LISTING, (Passes(5), Passes(1), Passes(3)), True)[0]["FFMA"] == 5
    body = straight("FADD R0, R0, R1", "FADD R0, R0, R2", "EXIT")
    assert COUNTING.executed(body, (Passes(2),), False) == ({"FADD": 2, "EXIT": 1}, 0)


@pytest.mark.parametrize("told", [(Passes(5),), (Passes(5), Passes(3), Passes(2))])
def test_other_loops_than_told_are_refused(told: tuple[Any, ...]) -> None:
    with pytest.raises(COUNTING.UnexpectedLoops, match=f"expected {len(told)} loops, found 2"):
        COUNTING.executed(LISTING, told, True)


def test_a_kernel_without_a_loop_over_tiles_is_refused() -> None:
    with pytest.raises(COUNTING.UnexpectedLoops, match="expected a loop over tiles, found none"):
        COUNTING.executed(straight("EXIT"), (), True)


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("SHFL.IDX", "shuffle"),
        ("SHF.L.W.U32.HI", "integer"),
        ("LDGDEPBAR", "barrier"),
        ("DEPBAR.LE", "barrier"),
        ("LDG.E.64.CONSTANT", "global"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("LDS.U16", "shared"),
        ("LDSM.16.M88.4", "shared"),
        ("LDC.64", "constant"),
        ("LDL.128", "local"),
        ("IMAD.WIDE.U32", "integer"),
        ("HADD2.F32", "half"),
        ("F2FP.BF16.F32.PACK_AB", "conversion"),
        ("HGMMA.64x16x16.F32", "tensor"),
        ("MUFU.EX2", "special"),
        ("UIADD3.X", "uniform"),
        ("R2UR", "uniform"),
        ("S2R", "move"),
        ("VOTE.ANY", "other"),
    ],
)
def test_opcodes_are_told_apart(opcode: str, kind: str) -> None:
    assert COUNTING.kind(opcode) == kind
