"""Products with weights that have a trellis code, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.decomposition.trellis_codes import TABLE, known_code
from atd.errors import BadInput
from atd.kernels import matmul as kernels
from atd.kernels import packed, xla
from atd.kernels.triton.fold import Norm
from atd.weights import Packed, PackedType, Trellis, TrellisType
from atd.weights.layouts import LAYOUTS

INPUTS = 323  # no multiple of a cell of any layout
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


@pytest.mark.parametrize(
    ("bases", "kind", "tokens"),
    [
        (2, "default", 1),
        pytest.param(2, "default", 3, marks=pytest.mark.slow),
        pytest.param(2, "best", 16, marks=pytest.mark.slow),
        pytest.param(1.5, "fast", 2, marks=pytest.mark.slow),
        pytest.param(3, "default", 1, marks=pytest.mark.slow),
        pytest.param(3, "fast", 5, marks=pytest.mark.slow),
        pytest.param(2.5, "default", 1, marks=pytest.mark.slow),
    ],
)
def test_triton_multiplies_planes_of_few_tokens(bases, kind, tokens):
    """As exactly as it multiplies by free scales: activations are integers of 22 bits."""
    w = weight(known_code(bases, kind), layout="aligned")
    x = jnp.asarray(np.random.default_rng(tokens).standard_normal((tokens, INPUTS)), jnp.float32)
    found = kernels.matmul(x, w, backend="triton-interpret")
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64).T
    np.testing.assert_allclose(found, exact, atol=2e-6 * np.abs(exact).max())


@pytest.mark.parametrize(("out", "segment"), [(60, 24), (192, 96)])
def test_triton_decodes_segments_for_many_tokens(out, segment, monkeypatch):
    monkeypatch.setattr(packed, "CHUNK_BYTES", 1)
    w = weight(known_code(1.5), out, segment, "aligned")
    x = np.random.default_rng(0).standard_normal((70, INPUTS))
    x = jnp.asarray(x, jnp.bfloat16)
    found = np.asarray(kernels.matmul(x, w, backend="triton-interpret"), np.float32)
    rounded = np.asarray(w.dequantize(jnp.float32).astype(jnp.bfloat16), np.float32)
    exact = np.asarray(x, np.float32) @ rounded.T
    np.testing.assert_allclose(found, exact, atol=0.01 * np.abs(exact).max())


def test_triton_takes_in_what_comes_before_and_after():
    """A norm in front, a residual or SwiGLU behind."""
    w, rng = weight(known_code(2), 64, 32, "tiles"), np.random.default_rng(0)
    x, gain = (jnp.asarray(rng.standard_normal(n), jnp.float32) for n in ((1, INPUTS), INPUTS))
    residual = jnp.asarray(rng.standard_normal((1, 64)), jnp.float32)
    norm = Norm(gain, 1e-5)
    plain = norm(x) @ np.asarray(w.dequantize()).T
    options = {"norm": norm, "backend": "triton-interpret"}
    added = kernels.fused(x, w, residual=residual, **options)
    assert added is not None
    np.testing.assert_allclose(added, plain + residual, rtol=1e-4, atol=1e-4)
    gated = kernels.fused(x, w, gated=True, **options)
    assert gated is not None
    wanted = jax.nn.silu(plain[:, :32]) * plain[:, 32:]
    np.testing.assert_allclose(gated, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("backend", "bases", "reason"),
    [
        ("mosaic-interpret", 2, "no kernels for trellis codes; use backend 'xla'"),
        ("triton-interpret", 1.75, "up to 5 planes of a trellis code, not 7; backend 'xla'"),
    ],
)
def test_backends_without_kernels_for_it_refuse(backend, bases, reason):
    w = weight(known_code(bases), layout="aligned")
    with pytest.raises(BadInput, match=reason):
        kernels.matmul(jnp.ones((1, INPUTS)), w, backend=backend)
