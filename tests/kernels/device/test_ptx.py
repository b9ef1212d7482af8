"""PTX is read as it is written: labels, guards, blocks with registers of their own, lines; else refused."""

import pytest

from tests.kernels.device.program import assemble
from tests.kernels.device.programs import program
from tests.kernels.device.ptx import UnknownPTX, parse

TEXT = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry two_words(
	.param .u64 .ptr .global .align 1 two_words_param_0, // the first
	.param .u32 two_words_param_1
)
.reqntid 128
{
	.reg .pred 	%p<3>;
	.loc	1 17 5                          // there.py:17:5
	ld.param.b64 	%rd1, [two_words_param_0];
$L__BB0_1:
	// begin inline asm
	{ .reg .pred p;  setp.ne.b32 p, %r1, 0;
	@!p bra $L__BB0_1; }
	{ .reg .pred p; @p ret; }
	// end inline asm
	.pragma "nounroll";
	@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + -4 ];
	ret;
}
	.file	1 "/somewhere/there.py"
"""


def test_a_kernel_has_its_name_parameters_threads_statements_and_labels() -> None:
    kernel = parse(TEXT)
    assert kernel.name == "two_words" and kernel.n_threads == 128
    assert kernel.parameters == [("u64", "two_words_param_0"), ("u32", "two_words_param_1")]
    assert kernel.labels == {"$L__BB0_1": 1}
    assert [str(statement) for statement in kernel.statements] == [
        "ld.param.b64 %rd1, [two_words_param_0]",
        "setp.ne.b32 p#1, %r1, 0",
        "@!p#1 bra $L__BB0_1",
        "@p#2 ret",
        "@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + -4 ]",
        "ret",
    ]


def test_statements_know_their_lines() -> None:
    statements, lines = parse(TEXT).statements, TEXT.splitlines()
    for statement, word in zip(
        statements, ("ld.param", "setp", "bra", "ret", "ld.global", "ret"), strict=True
    ):
        assert word in lines[statement.line - 1]
    assert {statement.source for statement in statements} == {"there.py:17"}


@pytest.mark.parametrize(
    "body",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.s32 %r1, %r2, %tid.y;",
        "setp.lt.s32 %p1|%p2, %r1, %r2;",
        "bar.sync 1;",
        "bar.sync 0, 64;",
        "atom.global.add.u32 %r1, [%rd0], 1;",
        "ld.local.b32 %r1, [%rd0];",
        "st.volatile.global.b32 [%rd0], %r1;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r1}, {%r1}, {%r1};",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1}, %rd1, %rd2, 1, -1, 1, 0, 0;",
        "cp.async.bulk.shared.global [%r1], [%rd0], 16;",
        "fence.proxy.tensormap.release.gpu;",
        ".local .b8 depot[8];",
    ],
)
def test_what_the_machine_does_not_know_is_refused_before_anything_runs(body: str) -> None:
    with pytest.raises(UnknownPTX, match="line|no kernel"):
        program(body)


def test_a_module_without_a_kernel_is_refused() -> None:
    with pytest.raises(UnknownPTX, match="without an entry"):
        parse(".version 8.0\n")


def test_numbers_are_registers_that_are_filled_beforehand() -> None:
    made = assemble(parse(TEXT.replace("setp.ne.b32 p, %r1, 0", "setp.ne.b32 p, 0xFFFFFFFF, -2")))
    assert {-2, 0xFFFFFFFF} <= set(made.presets[:, 2].tolist())
