"""One suite for every backend of `atd.kernels.matmul`, against float64 numpy; a new backend joins by its name there."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.experimental import pallas as pl

from atd.decomposition.least_squares import als
from atd.kernels import matmul as kernels
from atd.kernels import packed, prefixes, xla
from atd.kernels import settings as tuning
from atd.kernels.mosaic import backend as mosaic
from atd.kernels.triton import backend as triton
from atd.kernels.triton.gemv import Shape
from atd.weights import DTYPES, Dense, Packed, PackedType, Ternary, TernaryType
from atd.weights.layouts import LAYOUTS
from tests.kernels import aot
from tests.kernels.matrices import unoptimized

BACKENDS = tuple(kernels.BACKENDS)
EPSILON = float(np.finfo(np.float32).eps)


def ternary(
    out,
    inputs,
    bases=2,
    group: int | str = 128,
    tied=False,
    dtype="f16",
    seed=0,
    trits=None,
    scales=None,
) -> Ternary:
    """Random where nothing is given; a random part of the scales is zero."""
    random = np.random.default_rng(seed)
    type = TernaryType((out, inputs), bases, group, tied, dtype)
    if trits is None:
        trits = random.integers(-1, 2, (out, inputs, bases))
    if scales is None:
        scales = random.uniform(0.01, 1, type.scales_shape) * (
            random.random(type.scales_shape) > 0.05
        )
    trits = np.broadcast_to(trits, (out, inputs, bases)).astype(np.int8)
    return Ternary(trits, np.broadcast_to(scales, type.scales_shape).astype(DTYPES[dtype]), type)


def pack(weight: Ternary, layout: str) -> Packed:
    return Packed(
        jnp.asarray(LAYOUTS[layout].pack(weight.trits)),
        jnp.asarray(weight.scales),
        PackedType(weight.type, layout),
    )


def activations(rows: int, inputs: int, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32)


def rounding_of_x(backend: str, x: np.ndarray, weight) -> np.ndarray:
    """How far a backend's activations may lie from x, which is float32, rounded weights counted in: fixed point for few tokens
    on kernels, 16 bits for many."""
    if backend not in kernels.PACKED and backend != "triton-ptx":
        return np.zeros_like(x)
    type = weight.type.ternary
    settings = tuning.settings(packed.device_kind(), type, x.shape[0])
    few = (
        x.shape[0] <= mosaic.MAX_TOKENS
        if "mosaic" in backend
        else triton.path(settings, type, x.shape[0]) == "gemv"
    )
    if few:
        limit = prefixes.plan(type.bases, type.tied).limit
        return np.maximum(2**-16 * np.abs(x), np.abs(x).max(axis=1, keepdims=True) / limit)
    return 2.1 * 2**-9 * np.abs(x)


def skip_what_is_refused(backend: str, x, weight):
    if reason := kernels.BACKENDS[backend].supports(jnp.asarray(x), weight):
        pytest.skip(reason)


def is_prepared(backend: str, layout: str) -> bool:
    """Whether the kernels of a backend see this layout as another."""
    chosen = kernels.BACKENDS[backend]
    return (
        isinstance(chosen, packed.Backend) and layout in packed.READABLE and layout != chosen.layout
    )


def compiled(backend: str, function):
    """As a whole, and in the interpreters without optimisation."""
    return (unoptimized if "interpret" in backend else jax.jit)(function)


def product(backend: str, x, weight) -> np.ndarray:
    return np.asarray(
        compiled(backend, lambda x, w: kernels.matmul(x, w, backend=backend))(x, weight)
    )


def check(backend: str, x: np.ndarray, weight, dense):
    """Each result within the rounding of x and of a float32 sum: a few ulps of sum |x w|, which is what is summed."""
    skip_what_is_refused(backend, x, weight)
    y = product(backend, x, weight)
    wide, table = x.astype(np.float64), np.asarray(dense).astype(np.float64)
    bound = (16 * EPSILON * np.abs(wide) + rounding_of_x(backend, wide, weight)) @ np.abs(
        table
    ).T + 1e-37
    worst = (np.abs(y - wide @ table.T) / bound).max()
    assert y.shape == (*x.shape[:-1], table.shape[0])
    assert worst < 1, f"error is {worst:.2g} times the bound"


class Emulated(triton.Triton):
    """The Triton kernels compiled to PTX for an A10 and run by an emulator: needs the CUDA plugin, and no GPU."""

    def supports(self, x, weight):
        if x.shape[0] > 17:
            return "so many tokens take the emulator minutes"
        return self.refuses(x.dtype, weight.type)


@pytest.fixture(params=[*BACKENDS, "triton-ptx"])
def backend(request, monkeypatch) -> str:
    if request.param in kernels.PACKED and (
        reason := kernels.PACKED[request.param].device_refuses()
    ):
        pytest.skip(reason)
    if request.param == "triton-ptx":
        if reason := aot.missing():
            pytest.skip(reason)
        monkeypatch.setattr(pl, "pallas_call", aot.emulated_pallas_call("A10"))
        monkeypatch.setitem(kernels.BACKENDS, "triton-ptx", Emulated())
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 rows, so that small matrices take several."""
    monkeypatch.setitem(xla.CHUNK_BYTES, jax.default_backend(), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("bases", "group", "tied"),
    [
        (1, 32, False),
        (1, "tensor", False),
        (2, 128, False),
        (2, "row", True),
        (3, 32, True),
        (3, "row", False),
        (4, 128, True),
    ],
)
def test_every_layout_and_every_kind_of_scales(backend, layout, bases, group, tied, small_chunks):
    if reason := LAYOUTS[layout].refuses(44, 323, bases):
        pytest.skip(reason)
    if is_prepared(backend, layout):
        pytest.skip("becomes another layout before the kernel: test_triton.py, test_mosaic.py")
    weight = ternary(
        44, 323, bases, group, tied
    )  # 323 is no multiple of a cell of any layout, nor of a group
    check(backend, activations(2, 323), pack(weight, layout), weight.dequantize())


@pytest.mark.parametrize(
    ("out", "inputs"),
    [
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
    ],
)
@pytest.mark.parametrize("group", [128, "row"])
def test_sizes_one_off_a_cell_and_a_chunk(backend, out, inputs, group, small_chunks):
    weight = ternary(out, inputs, group=group)
    check(backend, activations(1, inputs), pack(weight, "interleaved"), weight.dequantize())


@pytest.mark.parametrize("group", [128, "row"])
@pytest.mark.parametrize("rows", [1, 2, 4, 17, 130])
def test_any_number_of_activations(backend, rows, group):
    weight = ternary(96, 320, group=group)
    check(backend, activations(rows, 320), pack(weight, "interleaved"), weight.dequantize())


OF_PRODUCTS = pytest.mark.parametrize(
    ("rows", "bases", "group", "tied"),
    [
        (1, 2, "row", True),
        (3, 2, "row", False),
        (1, 2, 128, True),
        (4, 3, "row", True),
        (2, 1, "tensor", True),
    ],
)


@OF_PRODUCTS
def test_a_norm_before_and_a_residual_after_a_product(backend, rows, bases, group, tied):
    """49 rows: the last of a block's groups of rows is not full."""
    if not isinstance(kernels.BACKENDS[backend], triton.Triton):
        pytest.skip("computes products alone")
    weight, random = ternary(49, 323, bases, group, tied), np.random.default_rng(5)
    x, residual = activations(rows, 323), activations(rows, 49, seed=2)
    norm = triton.Norm(jnp.asarray(random.uniform(0.5, 2, 323), jnp.float32), 1e-5)
    held, wide = pack(weight, "words"), x.astype(np.float64)
    y = compiled(backend, lambda x, w, r: kernels.fused(x, w, norm, r, backend=backend))(
        x, held, residual
    )
    assert y is not None
    made = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * np.asarray(norm.gain)
    table = np.asarray(weight.dequantize()).astype(np.float64)
    bound = (24 * EPSILON * np.abs(made) + rounding_of_x(backend, made, held)) @ np.abs(
        table
    ).T + 1e-6
    assert (np.abs(y - (made @ table.T + residual)) / bound).max() < 1


@OF_PRODUCTS
@pytest.mark.parametrize("row_blocks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_swiglu_of_a_product(backend, monkeypatch, row_blocks, rows, bases, group, tied):
    """80 gates and 80 up: the last of a block's groups of rows is not full."""
    chosen = kernels.BACKENDS[backend]
    if not isinstance(chosen, triton.Triton):
        pytest.skip("computes products alone")
    settings = tuning.Settings(Shape(warps=2, row_blocks=row_blocks))
    monkeypatch.setitem(kernels.BACKENDS, backend, replace(chosen, settings=settings))
    weight, x = ternary(160, 323, bases, group, tied), activations(rows, 323)
    held = pack(weight, "words")
    y = compiled(backend, lambda x, w: kernels.fused(x, w, gated=True, backend=backend))(x, held)
    assert y is not None
    table = np.asarray(weight.dequantize()).astype(np.float64)
    wide = x.astype(np.float64)
    gate, up = np.split(wide @ table.T, 2, axis=1)
    bound = (24 * EPSILON * np.abs(wide) + rounding_of_x(backend, wide, held)) @ np.abs(
        table
    ).T + 1e-6
    of_gate, of_up = np.split(bound, 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    of_silu = 1.1 * of_gate + 4 * EPSILON * np.abs(gate)  # its slope is at most 1.1
    most = of_silu * (np.abs(up) + of_up) + np.abs(gate * sigmoid) * of_up
    assert (np.abs(y - gate * sigmoid * up) / most).max() < 1


def test_gates_that_end_within_a_group_of_rows_are_left_to_others():
    backend, weight, x = (
        triton.Triton(interpret=True),
        pack(ternary(48, 64), "words"),
        jnp.zeros((1, 64)),
    )
    assert backend.fuses(x, weight)
    assert not backend.fuses(x, weight, gated=True)


@pytest.mark.parametrize(
    ("tensor", "bases", "group", "tied", "tokens"),
    [
        ("self_attn.q_proj", 2, "row", True, 6),
        ("mlp.down_proj", 1, 96, False, 1),
        ("mlp.down_proj", 2, 96, False, 1),
        ("mlp.down_proj", 3, "row", True, 6),
    ],
)
def test_matrices_of_a_model(backend, stories15m, tensor, tokens, bases, group, tied):
    """288 x 288 and 288 x 768 of stories15M, decomposed, against activations as wide as a residual stream's are."""
    real = safetensors.numpy.load_file(stories15m / "model.safetensors")[
        f"model.layers.3.{tensor}.weight"
    ]
    trits, scales = als(real.astype(np.float32), bases, group, tied)
    out, inputs = real.shape
    weight = ternary(out, inputs, bases, group, tied, trits=trits, scales=scales)
    error = np.linalg.norm(real - weight.dequantize()) / np.linalg.norm(real)
    assert error < 0.6, "not what the model had"
    check(backend, activations(tokens, inputs) * 8, pack(weight, "aligned"), weight.dequantize())


@pytest.mark.parametrize("trit", [-1, 0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [128, "row"])
def test_all_trits_equal(backend, layout, trit, group):
    bases = 1 if layout == "hf-bitnet" else 2
    if is_prepared(backend, layout):
        pytest.skip("becomes another layout before the kernel")
    weight = ternary(16, 261, bases, group, trits=trit)
    check(backend, activations(3, 261), pack(weight, layout), weight.dequantize())


@pytest.mark.parametrize("group", [128, "row"])
def test_a_weight_of_zero_scales_is_zero(backend, group):
    weight, x = (
        pack(ternary(16, 261, group=group, scales=0), "interleaved"),
        jnp.asarray(activations(3, 261)),
    )
    skip_what_is_refused(backend, x, weight)
    np.testing.assert_array_equal(product(backend, x, weight), 0)


@pytest.mark.parametrize("group", [128, "row"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_tiny_and_huge_activations(backend, magnitude, group):
    weight = ternary(16, 300, group=group)
    check(
        backend,
        activations(2, 300) * np.float32(magnitude),
        pack(weight, "interleaved"),
        weight.dequantize(),
    )


@pytest.mark.parametrize("group", [128, "row"])
def test_one_huge_activation_among_small_ones(backend, group):
    weight = ternary(16, 300, group=group)
    x = activations(2, 300) * np.float32(1e-3)
    x[:, 150] = 1e5
    check(backend, x, pack(weight, "interleaved"), weight.dequantize())


def test_one_hot_activations_give_back_each_column(backend):
    """No sum, so no rounding but the weight's own."""
    weight = ternary(12, 133, 3, 64)
    skip_what_is_refused(backend, jnp.eye(133), pack(weight, "interleaved"))
    y = product(backend, jnp.eye(133), pack(weight, "interleaved"))
    rounded = backend in kernels.PACKED or backend == "triton-ptx"  # to 16 bits, for so many tokens
    np.testing.assert_allclose(y.T, weight.dequantize(), rtol=2**-8 if rounded else EPSILON)


@pytest.mark.parametrize("group", [128, "row"])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_dtypes_of_scales(backend, dtype, group):
    weight = ternary(24, 300, group=group, dtype=dtype)
    check(backend, activations(2, 300), pack(weight, "interleaved"), weight.dequantize())


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_dense(backend, dtype, small_chunks):
    array = np.random.default_rng(2).standard_normal((37, 129)).astype(DTYPES[dtype])
    check(backend, activations(3, 129), Dense(jnp.asarray(array)), array)


def test_unpacked_ternary(backend, small_chunks):
    weight = ternary(37, 129)
    check(backend, activations(3, 129), jax.tree.map(jnp.asarray, weight), weight.dequantize())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("group", "tokens"), [(128, 6), ("row", 6), ("row", 2)])
def test_leading_axes_and_dtype_of_x_are_kept(backend, group, tokens, dtype):
    weight = pack(ternary(24, 130, group=group), "interleaved")
    x = jnp.asarray(activations(tokens, 130)).reshape(2, -1, 130).astype(dtype)
    skip_what_is_refused(backend, x, weight)
    y = product(backend, x, weight)
    assert (y.shape, y.dtype) == ((2, tokens // 2, 24), dtype)
    exact = np.asarray(x).astype(np.float64) @ np.asarray(weight.dequantize(), np.float64).T
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "bases", "tied"),
    [(17, 1, True), (17, 2, True), (17, 2, False), (17, 3, True), (130, 2, True)],
)
def test_many_tokens_in_sixteen_bits(backend, tokens, bases, tied):
    """As exact as a dense product of 16 bits: results rounded, weights too."""
    weight = ternary(48, 320, bases, "row", tied)
    x, held = jnp.asarray(activations(tokens, 320), jnp.bfloat16), pack(weight, "words")
    skip_what_is_refused(backend, x, held)
    y = product(backend, x, held)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(weight.dequantize(), np.float64).T
    off = np.sqrt(np.mean((y.astype(np.float64) - exact) ** 2) / np.mean(exact**2))
    assert 2**-12 < off < 2**-8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [32, "row", "tensor"])
def test_rows_of_packed_tables(layout, group):
    weight = ternary(20, 131, 1 if layout == "hf-bitnet" else 2, group)
    rows = jnp.array([[3, 0, 19], [7, 7, 1]])
    taken = jax.jit(kernels.take_rows)(pack(weight, layout), rows)
    np.testing.assert_array_equal(taken, weight.dequantize()[rows])


def test_rows_of_dense_and_ternary_tables():
    weight = ternary(20, 131)
    rows = jnp.array([5, 2])
    np.testing.assert_array_equal(kernels.take_rows(weight, rows), weight.dequantize()[rows])
    np.testing.assert_array_equal(
        kernels.take_rows(Dense(weight.dequantize()), rows), weight.dequantize()[rows]
    )


def test_packed_weights_are_not_unpacked_whole():
    """No buffer of the compiled multiplication is as large as the dequantized matrix."""
    weight = pack(ternary(4096, 1024), "interleaved")
    compiled = jax.jit(kernels.matmul).lower(jnp.zeros((1, 1024)), weight).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4096 * 1024 * 4 * 0.8


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    class Picky:
        @staticmethod
        def supports(x, weight):
            return "it wants a GPU"

    monkeypatch.setitem(kernels.BACKENDS, "picky", Picky)
    monkeypatch.setattr(kernels, "PREFERENCE", ("picky", "xla"))
    weight = Dense(jnp.ones((3, 4)))
    x = jnp.ones((1, 4))
    with pytest.raises(
        ValueError, match=r"'picky' cannot multiply .*\[1, 4\] by dense f32\[3,4\]: it wants a GPU"
    ):
        kernels.matmul(x, weight, backend="picky")
    assert kernels.resolve(x, weight) is xla  # unnamed: the next one


def test_an_unknown_backend_and_a_wrong_width_are_refused():
    with pytest.raises(ValueError, match="unknown matmul backend 'cuda'; known: xla"):
        kernels.matmul(jnp.ones((1, 4)), Dense(jnp.ones((3, 4))), backend="cuda")
    with pytest.raises(ValueError, match="x has 5 features, the weight"):
        kernels.matmul(jnp.ones((1, 5)), Dense(jnp.ones((3, 4))))
