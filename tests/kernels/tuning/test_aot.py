"""Ahead-of-time compilation, on a small kernel: its machine code, its spills, the one of several
that is asked for."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from atd.errors import RunFailed
from atd.kernels.tuning import aot
from tests.kernels.ptx.small_kernel import DIGITS, WEIGHTS, multiply, shapes

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas import triton as plt

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
needs_compiler = pytest.mark.skipif(bool(aot.missing()), reason=str(aot.missing()))


@needs_compiler
@pytest.mark.parametrize("device", ["H100", "A10", "L4"])
def test_machine_code_of_a_device(device):
    compiled = aot.compile_for(device, multiply, *shapes(3, 18))
    loop = aot.main_loop_instructions(compiled.sass)
    assert compiled.name == "ternary"
    assert compiled.grid == (3, 1, 1)
    assert f".target sm_{''.join(map(str, aot.DEVICES[device].capability))}" in compiled.ptx
    assert "EXIT" in compiled.sass
    assert compiled.spill_bytes == 0
    assert 20 < compiled.registers < 64
    assert loop["IMMA.16832.S8.S8"] == DIGITS
    assert sum(count for opcode, count in loop.items() if opcode.startswith("LDG.E.128")) >= 3
    assert loop.total() < 1.4 * WEIGHTS


@needs_compiler
def test_one_kernel_of_two_and_its_spills():
    def small(x_ref, y_ref):
        y_ref[...] = x_ref[...] + 1

    def large(x_ref, y_ref):
        parts = [x_ref[pl.ds(i * 4096, 4096)] for i in range(4)]
        y_ref[...] = lax.fori_loop(
            0, 9, lambda i, sum: sum * parts[0] + parts[1] * parts[2], parts[3]
        )

    def function(x):
        shape = jax.ShapeDtypeStruct((4096,), jnp.float32)
        for kernel, warps in ((large, 1), (small, 8)):
            params = plt.CompilerParams(num_warps=warps, num_stages=1)
            x = pl.pallas_call(
                kernel, out_shape=shape, compiler_params=params, name=kernel.__name__
            )(x)
        return x

    shape = jax.ShapeDtypeStruct((16384,), jnp.float32)
    assert aot.compile_for("A10", function, shape, kernel="large").spill_bytes > 0
    assert aot.compile_for("A10", function, shape, kernel="small").spill_bytes == 0
    with pytest.raises(RunFailed, match=r"which kernel is None\? .*large"):
        aot.compile_for("A10", function, shape)


def test_longest_loop_of_machine_code():
    sass = """
        /*0000*/                   S2R R9, SR_TID.X ;
.L_x_1:
        /*0010*/                   IMAD R1, R2, R3, R4 ;
.L_x_2:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R4.64] ;
        /*0030*/              @P0  BRA `(.L_x_2) ;
        /*0040*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0050*/              @!P0 BRA `(.L_x_3) ;
        /*0060*/                   NOP ;
        /*0070*/              @P1  BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   EXIT ;
.L_x_0:
        /*0090*/                   BRA `(.L_x_0);"""
    assert aot.main_loop_instructions(sass) == {"IMAD": 1, "LDG.E.128": 1, "UIADD3": 1, "BRA": 3}
    assert aot.main_loop_instructions(sass.replace("BRA", "FOO")).total() == 10 - 1
