"""Products with weights that have a trellis code, against float64 numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.decomposition.trellis_codes import BASES, TABLE, known_code
from atd.errors import BadInput
from atd.kernels import matmul as kernels
from atd.kernels import packed, xla
from atd.kernels.settings import Settings
from atd.kernels.triton.backend import Triton
from atd.weights import Packed, PackedType, Trellis, TrellisType
from atd.weights.codes import Code
from atd.weights.layouts import LAYOUTS
from tests.kernels import backends
from tests.kernels.backends import INPUTS, activations, bound_of, compiled, on_backends, packed_for
from tests.kernels.matrices import unoptimized

LAYOUT_NAMES = [name for name in LAYOUTS if name != "hf-bitnet"]  # which holds one base


def weight(code, out: int = 60, segment: int = 24, layout: str | None = None) -> Trellis | Packed:
    random = np.random.default_rng(out)
    type = TrellisType((out, INPUTS), code, segment, "f16")
    trits = random.integers(-1, 2, type.trits_shape).astype(np.int8)
    made = Trellis(trits, random.uniform(0.5, 2, type.scales_shape).astype(np.float16), type)
    if layout is None:
        return jax.tree.map(jnp.asarray, made)
    codes = LAYOUTS[layout].pack(trits)
    return jax.tree.map(jnp.asarray, Packed(codes, made.scales, PackedType(type, layout)))


def check(w, tokens: int, dtype=jnp.float32):
    x = np.random.default_rng(tokens).standard_normal((tokens, INPUTS))
    x = jnp.asarray(x, dtype)
    found = np.asarray(xla.matmul(x, w), np.float64)
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64).T
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w.dequantize(), np.float64)).T
    ulp = float(jnp.finfo(dtype).eps)
    assert found.shape == exact.shape
    # A weight can be a small difference of large taps, which the planes' products round one by one.
    assert np.all(np.abs(found - exact) <= ulp * np.abs(exact) + 32 * 1.2e-7 * (size + size.mean()))


@pytest.mark.parametrize("known", TABLE, ids=lambda known: f"{known.bases:g}-{known.kind}")
def test_every_code(known):
    check(weight(known.code), 3)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("bases", [2, 2.5])
def test_every_layout(layout, bases):
    check(weight(known_code(bases), layout=layout), 3)


def test_one_trit_in_the_layout_for_one_base():
    code = known_code(2, "fast").__class__((((0.5, 0.25),),))
    check(weight(code, layout="hf-bitnet"), 3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_of_activations(dtype):
    check(weight(known_code(2), layout="aligned"), 2, dtype)


@pytest.mark.parametrize(
    ("bases", "layout"),
    [
        (1.5, "aligned"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, None), (2, "aligned"))),
    ],
)
def test_rows_in_many_chunks(bases, layout, monkeypatch):
    monkeypatch.setattr(xla, "CHUNK_BYTES", {"cpu": 1 << 15})
    check(weight(known_code(bases), 600, 96, layout), 2)  # the last segment has 24 rows


@pytest.mark.parametrize(
    ("bases", "kind", "layout"),
    [
        *((known.bases, known.kind, None) for known in TABLE),
        *((bases, "default", layout) for bases in (2, 2.5) for layout in ("aligned", "tiles")),
    ],
)
def test_rows_are_those_of_the_matrix(bases, kind, layout):
    w = weight(known_code(bases, kind), layout=layout)
    rows = np.array([[59, 0, 23, 24], [47, 48, 30, 0]])
    whole = np.asarray(w.dequantize())
    np.testing.assert_allclose(xla.take_rows(w, jnp.asarray(rows)), whole[rows], rtol=0, atol=1e-6)


# --- on every backend -------------------------------------------------------------------------


def matrix(bases, out: int = 60, segment: int = 24, **values) -> Trellis:
    """Returns a matrix in numpy with the default code of N; trits and scales are random where
    `values` has none."""
    type = TrellisType((out, INPUTS), known_code(bases), segment, "f16")
    random = np.random.default_rng(0)
    trits = values.get("trits", random.integers(-1, 2, type.trits_shape))
    scales = values.get("scales", random.uniform(0.5, 2, type.scales_shape))
    trits = np.broadcast_to(trits, type.trits_shape).astype(np.int8)
    return Trellis(trits, np.broadcast_to(scales, type.scales_shape).astype(np.float16), type)


def terms(w: Trellis) -> np.ndarray:
    """Returns sum |a t| of each weight, which the planes' products round one by one."""
    taps = tuple(tuple(tuple(map(abs, t)) for t in phase) for phase in w.type.code.taps)
    type = replace(w.type, code=Code(taps))
    return np.asarray(Trellis(np.abs(w.trits), np.abs(w.scales), type).dequantize())


def check_on(backend: str, w: Trellis, x: np.ndarray):
    backends.check(backend, x, packed_for(backend, w), w.dequantize(), terms(w))


@on_backends(
    "bases, tokens",
    [(2, 1), (1.5, 17), (2, 130)],
    slow=[
        *((2, tokens) for tokens in (3, 9, 16, 17)),
        *((bases, tokens) for bases in BASES if bases != 2 for tokens in (1, 5, 17, 130)),
    ],
    group="row",
)
def test_few_tokens_and_many_and_a_short_last_segment(backend, bases, tokens):
    check_on(backend, matrix(bases), activations(tokens))


@on_backends(
    "out, segment, tokens",
    [(5, 5, 2)],
    slow=[(out, segment, m) for out, segment in ((16, 8), (77, 36)) for m in (1, 20, 130)],
    group="row",
)
def test_segments_one_off_a_tile_of_rows(backend, out, segment, tokens):
    """In segments of five rows, the trits of each row count in all of them."""
    check_on(backend, matrix(2, out, segment), activations(tokens))


@on_backends("tokens", [(2,)], slow=[(20,), (130,)], group="row")
def test_extreme_values(backend, tokens):
    """Trits that are all the same, scales that are nothing, tiny and huge, activations likewise."""
    x = activations(tokens)
    for trit in (-1, 0, 1):
        check_on(backend, matrix(2, trits=trit), x)
    nothing = packed_for(backend, matrix(2, scales=0))
    np.testing.assert_array_equal(backends.product(backend, x, nothing), 0)
    w, one_is_huge = matrix(2), x * np.float32(1e-3)
    one_is_huge[:, 150] = 1e5
    for extreme in (x * np.float32(1e-30), x * np.float32(1e30), one_is_huge):
        check_on(backend, w, extreme)
    scales = np.where(np.arange(60) % 2, 6e-5, 6e4)[:, None, None]
    check_on(backend, matrix(2, scales=scales), x)


@on_backends("tokens", [(2,)], slow=[(20,), (130,)], group="row")
def test_a_token_that_is_not_finite_spoils_no_other(backend, tokens):
    w, x = matrix(2), activations(tokens).copy()
    held = packed_for(backend, w)
    right, others = backends.product(backend, x, held), np.arange(tokens) != 1
    for bad in (np.inf, np.nan):
        x[1, 7] = bad
        y = backends.product(backend, x, held)
        np.testing.assert_array_equal(y[others], right[others])
        assert not np.isfinite(y[1][np.asarray(w.dequantize())[:, 7] != 0]).any()


@on_backends(
    "dtype, tokens", [], slow=[("bfloat16", 2), ("float16", 20), ("bfloat16", 130)], group="row"
)
def test_results_have_the_dtype_of_x(backend, dtype, tokens):
    w, x = matrix(2), jnp.asarray(activations(tokens)).astype(dtype)
    y = backends.product(backend, x, packed_for(backend, w))
    assert (y.shape, y.dtype) == ((tokens, 60), dtype)
    exact = np.asarray(x).astype(np.float64) @ np.asarray(w.dequantize(), np.float64).T
    off = np.sqrt(np.mean((y.astype(np.float64) - exact) ** 2) / np.mean(exact**2))
    assert off < 2**-8


@on_backends("tokens", [(1,)], slow=[(3,)], group="row", fused=True)
def test_a_norm_before_and_a_residual_after_a_product(backend, tokens):
    w, x, residual = matrix(2), activations(tokens), activations(tokens, 60, seed=2)
    gain = np.random.default_rng(5).uniform(0.5, 2, INPUTS)
    norm = kernels.Norm(jnp.asarray(gain, jnp.float32), 1e-5)
    fused = compiled(backend, lambda x, w, r: kernels.fused(x, w, norm, r, backend=backend))
    y = fused(x, packed_for(backend, w), residual)
    assert y is not None
    wide = x.astype(np.float64)
    made = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * gain
    bound = bound_of(backend, made, packed_for(backend, w), terms(w), ulps=24) + 1e-6
    exact = made @ np.asarray(w.dequantize(), np.float64).T + residual
    assert (np.abs(y - exact) / bound).max() < 1


@on_backends("tokens", [(1,)], slow=[(3,)], group="row", fused=True)
def test_swiglu_of_a_gate_above_an_up_matrix(backend, tokens):
    """In segments of their own, as matrices are joined."""
    w, x = matrix(2, 96, 48), activations(tokens)
    fused = compiled(backend, lambda x, w: kernels.fused(x, w, gated=True, backend=backend))
    y = fused(x, packed_for(backend, w))
    assert y is not None
    gate, up = np.split(x.astype(np.float64) @ np.asarray(w.dequantize(), np.float64).T, 2, axis=1)
    exact = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("backend", ["triton-interpret", "mosaic-interpret"])
def test_more_planes_than_kernels_have_columns_for_are_left_to_xla(backend):
    taps = (1.0, 0.5), *[(1.0,)] * 7
    w = weight(Code((taps,)), layout="aligned")
    with pytest.raises(BadInput, match=r"up to 7 planes of a trellis code, not 8; backend 'xla'"):
        kernels.matmul(jnp.ones((1, INPUTS)), w, backend=backend)
    assert kernels.resolve(jnp.ones((1, INPUTS)), w) is xla


@pytest.mark.parametrize("bases", [2, pytest.param(1.5, marks=pytest.mark.slow)])
def test_decoding_goes_chunk_by_chunk(bases, monkeypatch):
    """Of as few rows as a block has, which end in the middle of segments."""
    monkeypatch.setattr(packed, "CHUNK_BYTES", 0)
    w, x = matrix(bases, 60, 20), jnp.asarray(activations(3), jnp.bfloat16)
    backend = Triton(interpret=True, settings=Settings(gemv_tokens=0, gemm_tokens=0))
    found = unoptimized(lambda x, w: backend.multiply(x, w))(x, packed_for("triton", w))
    rounded = np.asarray(w.dequantize()).astype(jnp.bfloat16).astype(np.float32)
    exact = np.asarray(x, np.float32) @ rounded.T
    error = np.abs(np.asarray(found, np.float32) - exact)
    assert error.max() < 0.01 * np.abs(exact).max()
