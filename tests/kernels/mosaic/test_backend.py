"""The Mosaic backend without a GPU: edges, lowering for CUDA, and where the CUDA plugin is
installed its machine code.

Its numbers beside those of other backends: test_matmul.py.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from atd.kernels import prefixes
from atd.kernels.mosaic import gemv
from atd.kernels.mosaic.backend import MAX_TOKENS, Mosaic
from atd.kernels.triton.backend import Triton
from atd.kernels.tuning import aot
from tests.kernels.matrices import activations, lowered, packed, unoptimized
from tests.kernels.ptx.emulator import run_ptx

needs_compiler = pytest.mark.skipif(bool(aot.missing()), reason=str(aot.missing()))
INTERPRETED = Mosaic(interpret=True)


def run(backend, x, w) -> np.ndarray:
    """In the interpreter."""
    return np.asarray(unoptimized(lambda x, w: backend.multiply(x, w))(x, w))


# --- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "inputs", "bases", "tied", "tokens", "dtype"),
    [
        (1, 1, 2, True, 1, jnp.float32),
        (70, 2700, 1, True, 1, jnp.bfloat16),
        pytest.param(65, 600, 3, True, 3, jnp.float16, marks=pytest.mark.slow),
        (64, 643, 3, False, 16, jnp.float32),  # four products
        (20, 300, 2, False, 17, jnp.float32),  # decoded once, in bfloat16
    ],
)
def test_edges(out, inputs, bases, tied, tokens, dtype):
    w, x = packed(out, inputs, bases, tied=tied), activations(tokens, inputs, dtype)
    wanted = np.asarray(x.astype(jnp.float32) @ w.dequantize().T)
    of_result = {jnp.float32: 2e-5, jnp.float16: 2**-11, jnp.bfloat16: 2**-8}[dtype]
    precision = of_result if tokens <= MAX_TOKENS else 2**-8
    np.testing.assert_allclose(
        run(INTERPRETED, x, w), wanted, atol=precision * np.abs(wanted).max()
    )


@pytest.mark.exact
def test_sums_are_integers_so_no_order_matters(monkeypatch):
    """Fewer blocks add them up in another one; the Triton backend too, where only activations may
    be rounded another way."""
    w, x = packed(66, 1300), activations(2, 1300)  # 132 words: 3 steps, of as many blocks
    found = run(INTERPRETED, x, w)
    other = run(Triton(interpret=True), x, w)
    np.testing.assert_allclose(found, other, atol=1e-5 * np.abs(found).max())
    monkeypatch.setattr(gemv, "BLOCKS", 4)  # of two steps
    np.testing.assert_array_equal(found, run(INTERPRETED, x, w))


def test_self_test_sees_a_wrong_kernel(monkeypatch):
    assert INTERPRETED.largest_difference(2, True) < 1e-4
    right = gemv.plane_twin
    monkeypatch.setattr(gemv, "plane_twin", lambda first, second: right(second, first))
    assert INTERPRETED.largest_difference(2, True) > 0.1


# --- for CUDA ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bases", "tied"), [(1, True), (2, True), (2, False), (3, True), (3, False), (4, True)]
)
def test_lowers_for_cuda(bases, tied):
    sums = 1 if tied else bases
    weight = packed(64, 640, bases, tied=tied)
    for tokens, columns in ((1, 8 if sums < 3 else 16), (16, 48)):
        text = lowered("NVIDIA H200", Mosaic().multiply, weight, tokens)
        assert f"ternary_mosaic_n{bases}{'tied' if tied else 'free'}_c{columns}" in text
        assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("out", "inputs", "dtype"), [(1, 1, jnp.float32), (333, 5000, jnp.float16)]
)
def test_edges_and_other_activations_lower_for_cuda(out, inputs, dtype):
    lowered("NVIDIA H200", Mosaic().multiply, packed(out, inputs), 3, dtype)


def test_wide_rows_are_handed_over_as_they_lie():
    text = lowered("NVIDIA H200", Mosaic().multiply, packed(64, 4096), 1)
    assert "tensor<64x412xui32>" in text
    assert not re.search(r"(pad|concatenate|bitcast_convert).*ui32", text)


@needs_compiler
@pytest.mark.parametrize(
    ("bases", "tied", "most"),
    [(1, True, 1.3), (2, True, 1.75), (3, True, 3.8), (3, False, 3.9), (5, False, 7.0)],
)
def test_machine_code(bases, tied, most):
    """Instructions per weight; activations of one token. N = 3: see the module."""
    plan, words = prefixes.plan(bases, tied), 8 * gemv.WORDS
    coefficients = (1, plan.sums, plan.steps(words), prefixes.THREADS_PER_ROW, plan.words, 4)
    name = gemv.Geometry(plan, 1, 64 * gemv.BLOCKS, words).name
    compiled = aot.compile_for(
        "H200",
        lambda coefficients, codes: gemv.products(plan, coefficients, codes),
        jax.ShapeDtypeStruct(coefficients, jnp.int32),
        jax.ShapeDtypeStruct((64 * gemv.BLOCKS, words), jnp.uint32),
        kernel=f"{name}_mosaic_gpu_kernel",
    )
    loop = aot.main_loop_instructions(compiled.sass)
    weights = gemv.ROWS * gemv.WORDS * 4 * 5 / bases / 128  # of a thread, in a step
    assert compiled.spill_bytes == 0
    assert loop.total() / weights < most
    assert loop["LDS.128"] == 8  # codes come as they lie, 16 bytes at a time
    # Two multiplications and a byte permutation make four prefixes.
    assert loop["PRMT"] == loop["IMAD"] / 2


@needs_compiler
def test_compiled_registers_become_the_planes_of_the_twin():
    """The one step that the interpreter does not have, in the emulator."""

    def kernel(first_ref, second_ref, plane_ref):
        first, second = (
            plgpu.load(ref, layout=gemv.LAYOUT, optimized=False) for ref in (first_ref, second_ref)
        )
        plane_ref[...] = gemv.plane(first, second).astype(jnp.int32)

    words = jax.ShapeDtypeStruct((gemv.ROWS, gemv.WORDS), jnp.uint32)
    result = jax.ShapeDtypeStruct((gemv.ROWS, 4 * gemv.WORDS), jnp.int32)
    lanes = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    function = plgpu.kernel(kernel, out_type=result, compiler_params=lanes, kernel_name="plane")
    ptx = aot.compile_for("H200", function, words, words).ptx
    # What this kernel has no use for and the emulator does not know, and two words that are spelt
    # differently.
    ptx = re.sub(r"^\s*(elect\.sync|fence\.mbarrier_init)[^;]*;", "", ptx, flags=re.MULTILINE)
    ptx = ptx.replace(".maxntid", ".reqntid").replace("::entry", "")
    random, found = np.random.default_rng(0), np.zeros(result.shape, np.int32)
    first, second = (random.integers(0, 1 << 32, words.shape, dtype=np.uint32) for _ in range(2))
    run_ptx(ptx, (1, 1, 1), [first, second, found])
    twin = gemv.plane_twin(jnp.asarray(first), jnp.asarray(second))
    np.testing.assert_array_equal(found, twin)
