"""The Mosaic backend without a GPU: edges, refusals, self-test, lowering for CUDA, and where the CUDA plugin is installed
its machine code. Its numbers: test_matmul.py."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from atd.kernels import packed, prefixes
from atd.kernels.matmul import matmul
from atd.kernels.mosaic import backend as mosaic
from atd.kernels.mosaic import gemv as mosaic_gemv
from atd.kernels.triton import backend as triton
from atd.weights import Packed
from tests.kernels import aot
from tests.kernels.matrices import activations, lowered, unoptimized
from tests.kernels.matrices import packed as weight
from tests.kernels.ptx_emulator import run_ptx

needs_compiler = pytest.mark.skipif(bool(aot.missing()), reason=str(aot.missing()))
HERE = jax.default_backend()


# Results ---------------------------------------------------------------------------------------------------------------


def run(multiply, x, w) -> np.ndarray:
    """In the interpreter."""
    return np.asarray(unoptimized(lambda x, w: multiply(x, w, interpret=True))(x, w))


@pytest.mark.parametrize(
    ("out", "inputs", "bases", "tied", "tokens", "dtype"),
    [
        (1, 1, 2, True, 1, jnp.float32),
        (70, 2700, 1, True, 1, jnp.bfloat16),
        (65, 600, 3, True, 3, jnp.float16),
        (64, 643, 3, False, 16, jnp.float32),  # four products
        (20, 300, 2, False, 17, jnp.float32),  # decoded once, in bfloat16
    ],
)
def test_edges(out, inputs, bases, tied, tokens, dtype):
    w, x = weight(out, inputs, bases, tied=tied), activations(tokens, inputs, dtype)
    wanted = np.asarray(x.astype(jnp.float32) @ w.dequantize().T)
    precision = {jnp.float32: 2e-5, jnp.float16: 2**-11, jnp.bfloat16: 2**-8}[
        dtype
    ]  # of the result
    precision = precision if tokens <= mosaic.MAX_TOKENS else 2**-8
    np.testing.assert_allclose(
        run(mosaic.multiply, x, w), wanted, atol=precision * np.abs(wanted).max()
    )


def test_sums_are_integers_so_no_order_matters(monkeypatch):
    """Fewer blocks add them up in another one; the Triton backend too, where only activations may be rounded another way."""
    w, x = weight(66, 1300), activations(2, 1300)  # 132 words: 3 steps, of as many blocks
    found = run(mosaic.multiply, x, w)
    other = run(lambda x, w, interpret: triton.multiply(x, w, None, interpret), x, w)
    np.testing.assert_allclose(found, other, atol=1e-5 * np.abs(found).max())
    monkeypatch.setattr(mosaic_gemv, "BLOCKS", 4)  # of two steps
    np.testing.assert_array_equal(found, run(mosaic.multiply, x, w))


@pytest.mark.parametrize("layout", ["tiles", "aligned", "interleaved"])
def test_stored_layouts_are_read(layout):
    found = mosaic.Mosaic(interpret=True).prepare(weight(20, 333, layout=layout))
    assert isinstance(found, Packed)
    assert found.type == weight(20, 333).type
    np.testing.assert_array_equal(found.codes, weight(20, 333).codes)


# Refusals and the self-test --------------------------------------------------------------------------------------------


def test_refusals_name_the_reason_and_the_backend_that_could():
    x, backend = activations(1, 64), "mosaic-interpret"
    with pytest.raises(
        ValueError,
        match=r"'mosaic-interpret' cannot .* one scale a row.* 'triton' multiplies groups",
    ):
        matmul(x, weight(4, 64, group=32), backend=backend)
    with pytest.raises(ValueError, match=r"packed in layout tiles, words, .* use backend 'xla'"):
        matmul(x, weight(4, 64, layout="bit-ttt"), backend=backend)
    with pytest.raises(ValueError, match="up to 4 bases, not 5; backend 'xla' multiplies any"):
        matmul(x, weight(4, 64, bases=5), backend=backend)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, not int32"):
        matmul(x.astype(jnp.int32), weight(4, 64), backend=backend)


@pytest.mark.skipif(HERE != "cpu", reason="of a machine without a GPU")
def test_a_cpu_is_refused():
    with pytest.raises(
        ValueError,
        match="needs an NVIDIA GPU and this process runs on cpu; backend 'xla' runs there",
    ):
        matmul(activations(1, 64), weight(4, 64), backend="mosaic")


@pytest.mark.parametrize(("capability", "runs"), [("8.9", False), ("9.0", True), ("10.0", False)])
def test_gpus_other_than_hopper_are_refused(monkeypatch, capability, runs):
    class Device:
        platform, device_kind, compute_capability = "gpu", "NVIDIA something", capability

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    reason = mosaic.device_refuses()
    assert (
        reason is None if runs else f"{capability} and Mosaic's kernels need 9.0" in (reason or "")
    )


def test_self_test_sees_a_wrong_kernel(monkeypatch):
    assert mosaic.largest_difference(2, True, interpret=True) < 1e-4
    right = mosaic_gemv._plane_twin
    monkeypatch.setattr(mosaic_gemv, "_plane_twin", lambda first, second: right(second, first))
    assert mosaic.largest_difference(2, True, interpret=True) > 0.1


def test_self_test_raises(monkeypatch):
    monkeypatch.setattr(
        mosaic, "largest_difference", lambda bases, tied: 0.5 if bases == 3 else 0.0
    )
    mosaic.self_test.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"'mosaic' computes wrong results .* N = 3, tied, off by 5\.0e-01"
    ):
        mosaic.self_test(3, True)
    mosaic.self_test(2, True)
    mosaic.self_test.cache_clear()


def test_neither_backend_needs_the_other():
    """Either can be deleted: what both need is in files that import neither."""
    folder = Path(packed.__file__).parent
    for name in ("prefixes", "packed", "mosaic", "mosaic_gemv"):
        assert not re.search(
            r"^\s*(from|import) .*triton", (folder / f"{name}.py").read_text(), re.MULTILINE
        ), name
    for path in folder.glob("triton*.py"):
        assert not re.search(r"^\s*(from|import) .*mosaic", path.read_text(), re.MULTILINE), path


# For CUDA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bases", "tied"), [(1, True), (2, True), (2, False), (3, True), (3, False), (4, True)]
)
def test_lowers_for_cuda(bases, tied):
    sums = 1 if tied else bases
    for tokens, columns in ((1, 8 if sums < 3 else 16), (16, 48)):
        text = lowered("NVIDIA H200", mosaic.multiply, weight(64, 640, bases, tied=tied), tokens)
        assert f"ternary_mosaic_n{bases}{'tied' if tied else 'free'}_c{columns}" in text
        assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("out", "inputs", "dtype"), [(1, 1, jnp.float32), (333, 5000, jnp.float16)]
)
def test_edges_and_other_activations_lower_for_cuda(out, inputs, dtype):
    lowered("NVIDIA H200", mosaic.multiply, weight(out, inputs), 3, dtype)


def test_wide_rows_are_handed_over_as_they_lie():
    text = lowered("NVIDIA H200", mosaic.multiply, weight(64, 4096), 1)
    assert "tensor<64x412xui32>" in text
    assert not re.search(r"(pad|concatenate|bitcast_convert).*ui32", text)


@needs_compiler
@pytest.mark.parametrize(
    ("bases", "tied", "most"), [(1, True, 1.3), (2, True, 1.75), (3, True, 3.8), (3, False, 3.9)]
)
def test_machine_code(bases, tied, most):
    """Instructions a weight; activations of one token. N = 3: see the module."""
    plan, words = prefixes.plan(bases, tied), 8 * mosaic_gemv.WORDS
    coefficients = (1, plan.sums, plan.steps(words), prefixes.THREADS_A_ROW, plan.words, 4)
    compiled = aot.compile_for(
        "H200",
        lambda coefficients, codes: mosaic_gemv.products(plan, coefficients, codes),
        jax.ShapeDtypeStruct(coefficients, jnp.int32),
        jax.ShapeDtypeStruct((64 * mosaic_gemv.BLOCKS, words), jnp.uint32),
        kernel=f"ternary_mosaic_n{bases}{'tied' if tied else 'free'}_c{8 if plan.sums < 3 else 16}_mosaic_gpu_kernel",
    )
    loop = aot.main_loop_instructions(compiled.sass)
    weights = mosaic_gemv.ROWS * mosaic_gemv.WORDS * 4 * 5 / bases / 128  # of a thread, in a step
    assert compiled.spill_bytes == 0
    assert loop.total() / weights < most
    assert loop["LDS.128"] == 8  # codes come as they lie, 16 bytes at a time
    assert (
        loop["PRMT"] == loop["IMAD"] / 2
    )  # two multiplications and a byte permutation make four prefixes


@needs_compiler
def test_compiled_registers_become_the_planes_of_the_twin():
    """The one step that the interpreter does not have, in the emulator."""

    def kernel(first_ref, second_ref, plane_ref):
        first, second = (
            plgpu.load(ref, layout=mosaic_gemv.LAYOUT, optimized=False)
            for ref in (first_ref, second_ref)
        )
        plane_ref[...] = mosaic_gemv._plane(first, second).astype(jnp.int32)

    words = jax.ShapeDtypeStruct((mosaic_gemv.ROWS, mosaic_gemv.WORDS), jnp.uint32)
    result = jax.ShapeDtypeStruct((mosaic_gemv.ROWS, 4 * mosaic_gemv.WORDS), jnp.int32)
    lanes = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    function = plgpu.kernel(kernel, out_type=result, compiler_params=lanes, kernel_name="plane")
    ptx = aot.compile_for("H200", function, words, words).ptx
    # what this kernel has no use for and the emulator does not know, and two words that are spelt differently
    ptx = re.sub(r"^\s*(elect\.sync|fence\.mbarrier_init)[^;]*;", "", ptx, flags=re.MULTILINE)
    ptx = ptx.replace(".maxntid", ".reqntid").replace("::entry", "")
    random, found = np.random.default_rng(0), np.zeros(result.shape, np.int32)
    first, second = (random.integers(0, 1 << 32, words.shape, dtype=np.uint32) for _ in range(2))
    run_ptx(ptx, (1, 1, 1), [first, second, found])
    np.testing.assert_array_equal(
        found, mosaic_gemv._plane_twin(jnp.asarray(first), jnp.asarray(second))
    )
