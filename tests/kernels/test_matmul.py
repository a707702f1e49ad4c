"""One suite for every backend of `atd.kernels.matmul`, against float64 numpy; a new backend joins
by its name there.

What each backend multiplies is asserted. Of the cases of each test those are run, so a backend that
refuses what it should multiply fails (tests/kernels/backends.py).
"""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from atd.decomposition.least_squares import als
from atd.errors import BadInput
from atd.kernels import matmul as kernels
from atd.kernels import xla
from atd.kernels.settings import Settings, Shape
from atd.kernels.triton.backend import Triton
from atd.weights import DTYPES, Dense, Packed, PackedType, TernaryType
from atd.weights.layouts import LAYOUTS
from tests.kernels.backends import (
    ABSENT,
    EPSILON,
    INPUTS,
    OUT,
    TAKES,
    activations,
    bound_of,
    check,
    compiled,
    on_backends,
    packed_for,
    product,
    refusal,
)
from tests.kernels.matrices import ternary


@pytest.mark.parametrize("backend", [name for name, reason in ABSENT.items() if reason])
def test_a_backend_that_does_not_run_here(backend):
    pytest.skip(str(ABSENT[backend]))


@pytest.mark.parametrize("backend", ["xla", *kernels.PACKED])
def test_each_backend_takes_what_the_table_has_and_nothing_else(backend):
    chosen, nothing = kernels.BACKENDS[backend], np.zeros(0)
    for layout, bases, tied, group, dtype in itertools.product(
        LAYOUTS, range(1, 6), (True, False), ("tensor", "row", 32, 128), TAKES["xla"].dtypes
    ):
        if LAYOUTS[layout].refuses(64, 256, bases):
            continue
        type = PackedType(TernaryType((64, 256), bases, group, tied, "f16"), layout)
        if backend == "xla":
            found = chosen.supports(
                jax.ShapeDtypeStruct((1, 256), dtype), Packed(nothing, nothing, type)
            )
        else:
            found = chosen.refuses(jnp.dtype(dtype), type)
        wanted = refusal(backend, layout, bases, group, dtype)
        assert found is None if wanted is None else wanted in (found or ""), (type, dtype)


@pytest.mark.parametrize("backend", kernels.PACKED)
def test_kernels_for_packed_weights_refuse_others(backend):
    for weight in (Dense(jnp.ones((4, 64))), ternary(4, 64)):
        reason = kernels.PACKED[backend].refuses(jnp.dtype(jnp.float32), weight.type)
        assert "it multiplies weights packed in layout" in (reason or "")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 rows, so that small matrices take several."""
    monkeypatch.setitem(xla.CHUNK_BYTES, jax.default_backend(), 1)


# --- products ---------------------------------------------------------------------------------

KINDS = [(1, "tensor", False), (2, 128, False), (2, "row", True), (3, 32, True), (4, 128, True)]
OTHER_KINDS = [(1, 32, False), (3, "row", False)]
EVERY = [
    (layout, bases, group, tied)
    for layout in (None, *LAYOUTS)
    for bases, group, tied in KINDS + OTHER_KINDS
    if layout is None or LAYOUTS[layout].refuses(OUT, INPUTS, bases) is None
]
# Those of KINDS in the layout that a backend reads as it lies, the others in all other layouts.
SOME = [case for case in EVERY if (case[1:] in KINDS) == (case[0] is None)]


@on_backends("layout, bases, group, tied", SOME, slow=[case for case in EVERY if case not in SOME])
def test_every_layout_and_every_kind_of_scales(backend, layout, bases, group, tied):
    weight = ternary(OUT, INPUTS, bases, group, tied)
    check(backend, activations(2), packed_for(backend, weight, layout), weight.dequantize())


SIZES = [
    (1, 1),
    (1, 641),
    (7, 4),
    (7, 129),
    (8, 5),
    (8, 128),
    (9, 6),
    (9, 127),
    (17, 255),
    (17, 257),
    (17, 640),
]
CHOSEN_SIZES = [(1, 1, 128), (1, 641, "row"), (17, 257, "row")]
ALL_SIZES = [(*size, group) for size in SIZES for group in (128, "row")]


@on_backends(
    "out, inputs, group", CHOSEN_SIZES, slow=[c for c in ALL_SIZES if c not in CHOSEN_SIZES]
)
def test_sizes_one_off_a_cell_and_a_chunk(backend, out, inputs, group):
    weight = ternary(out, inputs, group=group)
    check(backend, activations(1, inputs), packed_for(backend, weight), weight.dequantize())


@on_backends(
    "tokens, group",
    [(4, "row"), (17, 128), (130, "row")],
    slow=[(1, 128), (1, "row"), (2, 128), (2, "row"), (4, 128), (17, "row"), (130, 128)],
)
def test_any_number_of_activations(backend, tokens, group):
    weight = ternary(OUT, INPUTS, group=group)
    check(backend, activations(tokens), packed_for(backend, weight), weight.dequantize())


@on_backends(
    "layout, group",
    [(None, 128), (None, "row")],
    slow=[(layout, group) for layout in LAYOUTS for group in (128, "row")],
)
def test_extreme_values(backend, layout, group):
    """Weights that are all the same or all zero, activations that are tiny, huge, and one huge
    among small ones."""
    x, bases = activations(2), 1 if layout == "hf-bitnet" else 2
    for trit in (-1, 0, 1):
        weight = ternary(OUT, INPUTS, bases, group, trits=trit)
        check(backend, x, packed_for(backend, weight, layout), weight.dequantize())
    nothing = packed_for(backend, ternary(OUT, INPUTS, bases, group, scales=0), layout)
    np.testing.assert_array_equal(product(backend, x, nothing), 0)
    weight = ternary(OUT, INPUTS, bases, group)
    one_is_huge = x * np.float32(1e-3)
    one_is_huge[:, 150] = 1e5
    for extreme in (x * np.float32(1e-30), x * np.float32(1e30), one_is_huge):
        check(backend, extreme, packed_for(backend, weight, layout), weight.dequantize())


@on_backends("", [()], bases=3, group=64, tokens=133)
def test_one_hot_activations_give_back_each_column(backend):
    """No sum, so no rounding but the weight's own."""
    weight = ternary(12, 133, 3, 64)
    y = product(backend, np.eye(133, dtype=np.float32), packed_for(backend, weight))
    precision = EPSILON if backend == "xla" else 2**-8  # to 16 bits, for this many tokens
    np.testing.assert_allclose(y.T, weight.dequantize(), rtol=precision)


@on_backends(
    "dtype, bases, group",
    [("bf16", 1, 128)],
    slow=[
        ("f32", 1, "row"),
        *((dtype, 2, group) for dtype in ("bf16", "f32") for group in (128, "row")),
    ],
)
def test_dtypes_of_scales(backend, dtype, bases, group):
    weight = ternary(OUT, INPUTS, bases, group, dtype=dtype)
    check(backend, activations(2), packed_for(backend, weight), weight.dequantize())


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_dense(dtype):
    array = np.random.default_rng(2).standard_normal((37, 129)).astype(DTYPES[dtype])
    check("xla", activations(3, 129), Dense(jnp.asarray(array)), array)


def test_unpacked_ternary():
    weight = ternary(37, 129)
    check("xla", activations(3, 129), weight, weight.dequantize())


@on_backends(
    "dtype, tokens, bases, group",
    [("bfloat16", 6, 1, "row")],
    slow=[
        ("float16", 2, 2, "row"),
        ("bfloat16", 6, 1, 128),
        ("bfloat16", 6, 2, 128),
        ("float16", 6, 2, 128),
        ("bfloat16", 6, 2, "row"),
        ("float16", 6, 2, "row"),
        ("bfloat16", 2, 2, "row"),
    ],
)
def test_leading_axes_and_dtype_of_x_are_kept(backend, bases, group, tokens, dtype):
    weight = packed_for(backend, ternary(24, 130, bases, group))
    x = jnp.asarray(activations(tokens, 130)).reshape(2, -1, 130).astype(dtype)
    y = product(backend, x, weight)
    assert (y.shape, y.dtype) == ((2, tokens // 2, 24), dtype)
    wide = np.asarray(x).astype(np.float64).reshape(tokens, 130)
    table = np.asarray(weight.dequantize(), np.float64)
    exact = wide @ table.T
    bound = 2**-8 * np.abs(exact) + bound_of(backend, wide, weight, table) + 1e-6
    assert (np.abs(np.asarray(y).astype(np.float64).reshape(tokens, 24) - exact) < bound).all()


@on_backends(
    "tokens, bases, tied",
    [(17, 2, False), (17, 3, True), (130, 2, True)],
    slow=[(17, 1, True), (17, 2, True)],
    group="row",
)
def test_many_tokens_in_sixteen_bits(backend, tokens, bases, tied):
    """As exact as a dense product of 16 bits: results rounded, weights too."""
    weight = ternary(48, 320, bases, "row", tied)
    x = jnp.asarray(activations(tokens, 320), jnp.bfloat16)
    y = product(backend, x, packed_for(backend, weight))
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(weight.dequantize(), np.float64).T
    off = np.sqrt(np.mean((y.astype(np.float64) - exact) ** 2) / np.mean(exact**2))
    assert 2**-12 < off < 2**-8


@on_backends(
    "tensor, tokens, bases, group, tied",
    [("self_attn.q_proj", 6, 2, "row", True), ("mlp.down_proj", 1, 2, 96, False)],
    slow=[("mlp.down_proj", 1, 1, 96, False), ("mlp.down_proj", 6, 3, "row", True)],
)
def test_matrices_of_a_model(backend, stories15m, tensor, tokens, bases, group, tied):
    """288 x 288 and 288 x 768 of stories15M, decomposed, against activations as wide as a residual
    stream's are."""
    tensors = safetensors.numpy.load_file(stories15m / "model.safetensors")
    real = tensors[f"model.layers.3.{tensor}.weight"].astype(np.float32)
    trits, scales = als(real, bases, group, tied)
    out, inputs = real.shape
    weight = ternary(out, inputs, bases, group, tied, trits=trits, scales=scales)
    error = np.linalg.norm(real - weight.dequantize()) / np.linalg.norm(real)
    assert error < 0.6, "not what the model had"
    x = activations(tokens, inputs) * 8
    check(backend, x, packed_for(backend, weight), weight.dequantize())


# --- what comes before and after --------------------------------------------------------------

FUSED = [
    (3, 2, "row", False),
    (2, 1, "tensor", True),
    (1, 2, 128, True),
    (1, 2, "row", True),
    (4, 3, "row", True),
]


@on_backends("tokens, bases, group, tied", [FUSED[1]], slow=[FUSED[0], *FUSED[2:]], fused=True)
def test_a_norm_before_and_a_residual_after_a_product(backend, tokens, bases, group, tied):
    """49 rows: the last of a block's groups of rows is not full."""
    weight, random = ternary(49, INPUTS, bases, group, tied), np.random.default_rng(5)
    x, residual = activations(tokens), activations(tokens, 49, seed=2)
    norm = kernels.Norm(jnp.asarray(random.uniform(0.5, 2, INPUTS), jnp.float32), 1e-5)
    held, wide = packed_for(backend, weight), x.astype(np.float64)
    fused = compiled(backend, lambda x, w, r: kernels.fused(x, w, norm, r, backend=backend))
    y = fused(x, held, residual)
    assert y is not None
    made = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * np.asarray(norm.gain)
    table = np.asarray(weight.dequantize()).astype(np.float64)
    bound = bound_of(backend, made, held, table, ulps=24) + 1e-6
    assert (np.abs(y - (made @ table.T + residual)) / bound).max() < 1


@on_backends(
    "tokens, bases, group, tied, row_blocks",
    [(*FUSED[0], 1)],
    slow=[*((*case, 1) for case in FUSED[1:]), *((*case, 4) for case in FUSED)],
    fused=True,
)
def test_swiglu_of_a_product(backend, monkeypatch, row_blocks, tokens, bases, group, tied):
    """80 gates and 80 up: the last of a block's groups of rows is not full."""
    chosen = kernels.BACKENDS[backend]
    if isinstance(chosen, Triton):
        cut = Settings(Shape(warps=2, row_blocks=row_blocks))
        monkeypatch.setitem(kernels.BACKENDS, backend, replace(chosen, settings=cut))
    weight, x = ternary(160, INPUTS, bases, group, tied), activations(tokens)
    held = packed_for(backend, weight)
    y = compiled(backend, lambda x, w: kernels.fused(x, w, gated=True, backend=backend))(x, held)
    assert y is not None
    table, wide = np.asarray(weight.dequantize()).astype(np.float64), x.astype(np.float64)
    gate, up = np.split(wide @ table.T, 2, axis=1)
    bound = bound_of(backend, wide, held, table, ulps=24) + 1e-6
    of_gate, of_up = np.split(bound, 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    of_silu = 1.1 * of_gate + 4 * EPSILON * np.abs(gate)  # its slope is at most 1.1
    most = of_silu * (np.abs(up) + of_up) + np.abs(gate * sigmoid) * of_up
    assert (np.abs(y - gate * sigmoid * up) / most).max() < 1


# --- the choice -------------------------------------------------------------------------------


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    class Picky:
        @staticmethod
        def supports(x, weight):
            return "it wants a GPU"

    monkeypatch.setitem(kernels.BACKENDS, "picky", Picky)
    monkeypatch.setattr(kernels, "PREFERENCE", ("picky", "xla"))
    weight, x = Dense(jnp.ones((3, 4))), jnp.ones((1, 4))
    reason = r"'picky' cannot multiply .*\[1, 4\] by dense f32\[3,4\]: it wants a GPU"
    with pytest.raises(BadInput, match=reason):
        kernels.matmul(x, weight, backend="picky")
    assert kernels.resolve(x, weight) is xla  # unnamed: the next one


def test_an_unknown_backend_and_a_wrong_width_are_refused():
    with pytest.raises(BadInput, match="unknown matmul backend 'cuda'; known: xla"):
        kernels.matmul(jnp.ones((1, 4)), Dense(jnp.ones((3, 4))), backend="cuda")
    with pytest.raises(ValueError, match="x has 5 features, the weight"):
        kernels.matmul(jnp.ones((1, 5)), Dense(jnp.ones((3, 4))))
