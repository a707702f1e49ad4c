"""The emulator, instruction by instruction, and on compiled kernels."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels.tuning import aot
from tests.kernels.ptx.emulator import EmulationError, run_ptx
from tests.kernels.ptx.pallas import emulated_pallas_call
from tests.kernels.ptx.small_kernel import (
    COLUMNS,
    INPUTS,
    LANES,
    ROWS,
    WORDS,
    fragments,
    multiply,
    pack,
    shapes,
    unpack,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas import triton as plt

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
needs_compiler = pytest.mark.skipif(bool(aot.missing()), reason=str(aot.missing()))


def numbers(blocks: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(steps)
    trits = random.integers(-1, 2, (blocks * ROWS, steps * INPUTS)).astype(np.int8)
    trits[0], trits[1] = -1, 1
    return trits, random.integers(-31, 32, (COLUMNS, steps * INPUTS))


@needs_compiler
@pytest.mark.parametrize(("device", "steps"), [("H100", 5), ("A10", 8)])
def test_emulated_kernel_multiplies_exactly(device, steps):
    trits, x = numbers(3, steps)
    compiled = aot.compile_for(device, multiply, *shapes(3, steps))
    sums = np.zeros((3, LANES, WORDS), np.int32)
    run_ptx(
        compiled.ptx,
        compiled.grid,
        [pack(trits), fragments(x), sums],
        shared_bytes=compiled.shared_bytes,
    )
    np.testing.assert_array_equal(unpack(sums), trits.astype(np.int64) @ x.T)


@needs_compiler
def test_pallas_call_emulated_under_jit(monkeypatch):
    trits, x = numbers(2, 6)
    monkeypatch.setattr(pl, "pallas_call", emulated_pallas_call("L4"))
    sums = jax.jit(lambda codes, x: multiply(codes, x) + 1)(pack(trits), fragments(x))
    np.testing.assert_array_equal(unpack(np.asarray(sums) - 1), trits.astype(np.int64) @ x.T)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_emulated_matrix_product_of_triton(dtype):
    """What Triton itself makes of a product: copies ahead into shared memory, ldmatrix, 16-bit
    matrix instructions."""
    random = np.random.default_rng(0)
    size = 30 if dtype == "int8" else 1
    a, b = (
        np.asarray(jnp.asarray(size * random.standard_normal(shape)).astype(dtype))
        for shape in ((64, 128), (128, 64))
    )
    sums = jnp.int32 if dtype == "int8" else jnp.float32

    def kernel(a_ref, b_ref, c_ref):
        def turn(i, sum):
            part = pl.ds(i * 32, 32)
            return sum + lax.dot(a_ref[:, part], b_ref[part, :], preferred_element_type=sums)

        c_ref[...] = lax.fori_loop(0, 4, turn, jnp.zeros((64, 32), sums))

    def function(a, b):
        return pl.pallas_call(
            kernel,
            grid=(1, 2),
            in_specs=[
                pl.BlockSpec((64, 128), lambda i, j: (i, 0)),
                pl.BlockSpec((128, 32), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((64, 32), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((64, 64), sums),
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        )(a, b)

    compiled = aot.compile_for(
        "A10", function, *(jax.ShapeDtypeStruct(x.shape, dtype) for x in (a, b))
    )
    assert all(name in compiled.ptx for name in ("cp.async", "ldmatrix", "mma.sync"))
    c = np.zeros((64, 64), sums)
    run_ptx(compiled.ptx, compiled.grid, [a, b, c], shared_bytes=compiled.shared_bytes)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c, exact, rtol=0, atol=0 if dtype == "int8" else 1e-4)


# --- emulated, of PTX written by hand ---------------------------------------------------------


def launch(body: str, *arrays: np.ndarray, threads=32, grid=(1,)):
    """%rd0, %rd1, ... are the arrays, %r0 is the thread and %r1 the block."""
    parameters = ", ".join(f".param .u64 .ptr .align 16 test_param_{i}" for i in range(len(arrays)))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [test_param_{i}];" for i in range(len(arrays)))
    ptx = f"""
        .version 9.0
        .target sm_90
        .extern .shared .align 16 .b8 dynamic[];
        .visible .entry test({parameters})
        .reqntid {threads}, 1, 1
        {{
            .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<20>; .reg .b64 %rd<20>;
            {loads}
            mov.u32 %r0, %tid.x;
            mov.u32 %r1, %ctaid.x;
            {body}
            ret;
        }}"""
    run_ptx(ptx, grid, arrays)


A, B = 0x89ABCDEF, 0x12345678
LARGE = 16785408  # 4097 * 4097 - 1


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("prmt.b32 %r9, %r2, %r3, 0x7351", 0x1289_56CD),
        ("prmt.b32 %r9, %r2, 0, 0x4341", 0x0089_00CD),
        (
            "prmt.b32 %r9, %r2, %r3, 0xC8FB",
            0x00FF_00FF,
        ),  # bit 3 of a nibble: the sign of its byte, all over
        ("mad.lo.s32 %r9, %r2, 243, -2030074112", A * 243 - 2030074112),
        ("mul.hi.u32 %r9, %r2, %r3", A * B >> 32),
        ("mul.hi.s32 %r9, %r2, %r3", (A - 2**32) * B >> 32),
        ("add.s32 %r9, %r2, %r2", 2 * A),
        ("lop3.b32 %r9, %r2, %r3, 0xff00ff00, 0xEA", A & B | 0xFF00FF00),
        ("shl.b32 %r9, %r2, 32", 0),
        ("shr.u32 %r9, %r2, 28", 8),
        ("shr.s32 %r9, %r2, 99", -1),
        ("shf.l.wrap.b32 %r9, %r2, %r3, 8", B << 8 | A >> 24),
        ("shf.r.wrap.b32 %r9, %r2, %r3, 8", A >> 8 | B << 24),
        ("bfe.s32 %r9, %r2, 28, 4", -8),
        ("bfe.u32 %r9, %r2, 4, 8", 0xDE),
        ("bfi.b32 %r9, %r3, %r2, 8, 8", 0x89AB78EF),
        ("dp4a.s32.u32 %r9, %r2, %r3, 100", 100 - 119 * 0x12 - 85 * 0x34 - 51 * 0x56 - 17 * 0x78),
        ("dp2a.hi.s32.s32 %r9, %r2, %r3, 0", (0xCDEF - 65536) * 0x34 + (0x89AB - 65536) * 0x12),
        ("min.s32 %r9, %r2, %r3", A),
        ("max.u32 %r9, %r2, %r3", A),
        ("div.s32 %r9, -7, 2", -3),
        ("rem.s32 %r9, -7, 2", -1),
        ("popc.b32 %r9, %r2", A.bit_count()),
        ("neg.s32 %r9, 5", -5),
        ("cvt.rn.f32.s32 %r9, -2", 0xC0000000),
        ("cvt.rni.s32.f32 %r9, 0f40200000", 2),
        ("cvt.rzi.s32.f32 %r9, 0fCF800000", -(2**31)),
        ("cvt.rzi.s32.f32 %r9, 0f7FC00000", 0),
        ("cvt.rn.bf16x2.f32 %r9, 0f3F800000, 0fC0000000", 0x3F80C000),
        ("cvt.rn.f16x2.f32 %r9, 0f3F800000, 0fC0000000", 0x3C00C000),
        ("add.rn.f32 %r9, 0f3F800000, 0f3F800000", 0x40000000),
        # 4097^2 lies halfway between two float32; a little more than that rounds up
        ("fma.rn.f32 %r9, 0f45800800, 0f45800800, 0f00000000", np.float32(LARGE).view(np.uint32)),
        (
            "fma.rn.f32 %r9, 0f45800800, 0f45800800, 0f2B800000",
            np.float32(LARGE + 2).view(np.uint32),
        ),
        ("fma.rz.f32 %r9, 0f45800800, 0f45800800, 0f2B800000", np.float32(LARGE).view(np.uint32)),
        ("fma.rn.f16x2 %r9, 0x3C004000, 0x40004000, 0x3C003C00", 0x42004500),
        (
            "fma.rn.bf16x2 %r9, 0x43084302, 0x3F803F80, 0xC304C304",
            0x4080C000,
        ),  # 136 - 132, 130 - 132
        (
            "fma.rn.bf16x2 %r9, 0x3F813F81, 0x3FC03FC0, 0xB0800000",
            0x3FC13FC2,
        ),  # a little below a tie, and a tie
        ("min.NaN.f32 %r9, 0f3F800000, 0f7FC00000", 0x7FC00000),
        ("min.f32 %r9, 0f3F800000, 0f7FC00000", 0x3F800000),
        ("selp.b32 %r9, %r2, %r3, !%p1; setp.eq.s32 %p2, 1, 1", B),
        ("setp.lt.and.s32 %p2, %r2, 0, !%p1; selp.b32 %r9, 1, 0, %p2", 0),
        ("setp.ltu.f32 %p2, 0f7FC00000, 0f00000000; selp.b32 %r9, 1, 0, %p2", 1),
        (
            "mov.b64 %rd5, {%r2, %r3}; shr.u64 %rd5, %rd5, 16; mov.b64 {%r9, _}, %rd5",
            B << 16 | A >> 16,
        ),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r9, {%rs2, %rs1}", 0xCDEF89AB),
        ("@!%p1 mov.b32 %r9, 7", 5),
        ("@%p1 mov.b32 %r9, 7", 7),
        ("{ .reg .b32 %r9; mov.b32 %r9, 7; }", 5),  # another register, in a scope of its own
    ],
)
def test_instruction(instruction, expected):
    result = np.zeros(1, np.uint32)
    launch(
        f"""mov.u32 %r2, {A:#x}; mov.u32 %r3, {B:#x}; mov.u32 %r9, 5; setp.eq.u32 %p1, 1, 1;
            {instruction};
            setp.eq.u32 %p3, %r0, 0; @%p3 st.global.b32 [%rd0], %r9;""",
        result,
    )
    assert result[0] == int(expected) & 0xFFFFFFFF


def test_memory_of_all_widths_and_a_masked_tail():
    words, halves = np.arange(99, dtype=np.uint32), np.arange(32, dtype=np.int16) - 16
    out, bytes = np.zeros(128, np.uint32), np.zeros(64, np.uint8)
    launch(
        """shl.b32 %r2, %r0, 2;
        setp.lt.u32 %p1, %r2, 96;
        mul.wide.u32 %rd4, %r0, 16; add.s64 %rd5, %rd0, %rd4; add.s64 %rd6, %rd2, %rd4;
        mov.u32 %r4, 0x7; mov.u32 %r5, 0x7; mov.u32 %r6, 0x7; mov.u32 %r7, 0x7;
        @%p1 ld.global.v4.b32 { %r4, %r5, %r6, %r7 }, [ %rd5 + 0 ];
        st.global.L1::evict_first.v4.b32 [ %rd6 + 0 ], { %r4, %r5, %r6, %r7 };
        mul.wide.u32 %rd4, %r0, 2; add.s64 %rd5, %rd1, %rd4; add.s64 %rd6, %rd3, %rd4;
        ld.global.s16 %r8, [%rd5];
        add.s32 %r8, %r8, 16;
        ld.global.nc.u8 %rs1, [%rd5+1]; cvt.u32.u16 %r9, %rs1;
        st.global.v2.b8 [%rd6], {%r8, %r9};
        """,
        words, halves, out, bytes,
    )  # fmt: skip
    np.testing.assert_array_equal(out, np.where(np.arange(128) < 96, np.arange(128), 7))
    np.testing.assert_array_equal(bytes[::2], np.arange(32))
    np.testing.assert_array_equal(bytes[1::2], halves.view(np.uint8)[1::2])


def test_sum_over_warps_and_blocks_of_different_length():
    """Block b goes through its loop b times; 4 warps add up through shared memory."""
    out = np.zeros(5, np.int32)
    launch(
        """mov.b32 %r2, 0; mov.b32 %r3, 0;
        bra.uni $L_check;
        $L_turn:
            add.s32 %r2, %r2, %r0; add.s32 %r3, %r3, 1;
        $L_check:
            setp.lt.u32 %p1, %r3, %r1;
            @%p1 bra $L_turn;
        shfl.sync.bfly.b32 %r4, %r2, 16, 31, -1; add.s32 %r2, %r2, %r4;
        shfl.sync.down.b32 %r4|%p2, %r2, 8, 31, -1; add.s32 %r2, %r2, %r4;
        shfl.sync.bfly.b32 %r4, %r2, 4, 31, -1; add.s32 %r2, %r2, %r4;
        shfl.sync.bfly.b32 %r4, %r2, 2, 31, -1; add.s32 %r2, %r2, %r4;
        shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; add.s32 %r2, %r2, %r4;
        and.b32 %r5, %r0, 31; setp.eq.s32 %p1, %r5, 0;
        shr.u32 %r6, %r0, 3; mov.b32 %r7, dynamic; add.s32 %r6, %r6, %r7;
        @%p1 st.shared.b32 [%r6], %r2;
        bar.sync 0;
        ld.shared.v4.b32 {%r8, %r9, %r10, %r11}, [dynamic];
        add.s32 %r8, %r8, %r9; add.s32 %r10, %r10, %r11; add.s32 %r8, %r8, %r10;
        mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd0, %rd4;
        setp.eq.s32 %p1, %r0, 0;
        @%p1 st.global.b32 [%rd4], %r8;""",
        out, threads=128, grid=(5,),
    )  # fmt: skip
    np.testing.assert_array_equal(out, np.arange(5) * (127 * 128 // 2))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "mul.wide.u32 %rd4, %r0, 4; add.s64 %rd4, %rd0, %rd4; ld.global.b32 %r2, [%rd4+8];",
            "at 128 of parameter 0",
        ),
        ("st.global.b32 [%rd0+-4], %r0;", "no array|parameter"),
        ("ld.global.b32 %r2, [%rd0+2];", "not aligned"),
        ("ld.shared.b32 %r2, [dynamic+49152];", "of shared memory"),
        (
            "add.s32 %r2, %r0,\n 1;\n frobnicate.b32 %r2, %r2;",
            "line 14: frobnicate.b32 %r2, %r2\nnot known",
        ),
        ("add.s32 %r2, %r3, 1;", "%r3 was never written"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra $L_end; $L_end:", "threads of a block part"),
        (
            "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd4}, {%rd4}, {%rd4}, {%rd4};",
            "only m16n8",
        ),
    ],
)
def test_emulator_refuses(body, message):
    with pytest.raises(EmulationError, match=message):
        launch(body, np.zeros(32, np.uint32))


def test_emulator_wants_the_parameters_of_the_kernel():
    with pytest.raises(EmulationError, match="1 parameters, not 2"):
        run_ptx(
            ".entry f(.param .u64 f_param_0) .reqntid 32 { ret; }", (1,), [np.zeros(1), np.zeros(1)]
        )
