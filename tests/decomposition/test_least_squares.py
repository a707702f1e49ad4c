"""als: how good it is, its limits (brute force, greedy), its conventions, and what it refuses.

Each combination of group size, bases, dtype and tied compiles for a second or two: most tests keep
to G = 64 and N = 2.
"""

from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike
from safetensors.numpy import load_file

from atd.decomposition.greedy import greedy
from atd.decomposition.least_squares import START_RATIOS, als
from atd.decomposition.rmse import decomposition_rmse
from atd.errors import BadInput
from atd.weights import level_weights
from tests.decomposition.matrices import BFLOAT16, KINDS, dequantize, relative_rmse, weights


def rmse(weight, group, *args, method=als, tied=False, **kwargs) -> float:
    trits, scales = method(weight, *args, **kwargs)
    return relative_rmse(weight, dequantize(trits, scales, group, tied))


def als_rmse(weight, bases, group, tied=False, dtype: DTypeLike = np.float32, **kwargs) -> float:
    return rmse(weight, group, bases, group, tied, dtype, tied=tied, **kwargs)


# --- quality: bounds that a broken algorithm fails ------------------------------------------------


@pytest.mark.parametrize(
    ("bases", "tensor", "group64"),
    [
        pytest.param(1, 0.436, 0.429, marks=pytest.mark.slow),
        (2, 0.175, 0.167),
        pytest.param(3, 0.080, 0.066, marks=pytest.mark.slow),
    ],
)
def test_known_errors_on_a_gaussian_matrix(bases, tensor, group64):
    weight = weights("gaussian", (96, 1024))
    assert rmse(weight, "tensor", bases, method=greedy) == pytest.approx(
        {1: 0.513, 2: 0.337, 3: 0.265}[bases], rel=0.01
    )
    assert als_rmse(weight, bases, "tensor") <= tensor * 1.01
    assert als_rmse(weight, bases, 64) <= group64 * 1.01
    assert (
        als_rmse(weight, bases, 64) > group64 * 0.7
    )  # better than any quantizer with that many levels: not measured rightly


@pytest.mark.parametrize(
    ("group", "most"),
    [(64, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("tensor", 2), (50, 2)))],
)
def test_als_is_never_behind_greedy_and_falls_with_bases(group, most):
    for kind in KINDS:
        weight, before = weights(kind), np.inf
        for bases in range(1, most + 1):
            error = als_rmse(weight, bases, group)
            assert error <= rmse(weight, group, bases, np.float32, group, method=greedy) * (
                1 + 1e-5
            )
            assert error < before
            before = error


@pytest.mark.parametrize("bases", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_free_scales_beat_tied_ones_and_small_groups_large_ones(bases):
    weight = weights("laplace")
    free, tied = (als_rmse(weight, bases, 64, tied) for tied in (False, True))
    assert free < tied < als_rmse(weight, bases, "row", tied=True)
    assert free < als_rmse(weight, bases, "row")


def test_crowded_starts_pay(monkeypatch):
    """They gain 3 % at the least against more iterations from the uniform grid alone."""
    kinds = "gaussian", "laplace", "student"
    ours = [als_rmse(weights(kind), 2, 64) for kind in kinds]
    monkeypatch.setitem(START_RATIOS, 2, START_RATIOS[2][:1])
    uniform = [
        als_rmse(weights(kind), 2, 64, iterations=17) for kind in kinds
    ]  # 17: nobody else's compilation
    assert (np.array(ours) < 0.97 * np.array(uniform)).all()


BOUNDS = {
    1: (0.442, 0.442),
    2: (0.16, 0.17),
    3: (0.053, 0.06),
}  # free and tied, 2 % above what was measured


@pytest.mark.parametrize(
    "bases", [2, *(pytest.param(bases, marks=pytest.mark.slow) for bases in (1, 3))]
)
def test_real_weights(trained, bases):
    tensors = load_file(trained.folder / "model.safetensors")
    linears = [
        w.astype(np.float32) for name, w in tensors.items() if "layers.2." in name and w.ndim == 2
    ]
    assert len(linears) == 7
    for tied, bound in zip((False, True), BOUNDS[bases], strict=True):
        errors = [als_rmse(w, bases, 96, tied, np.float16) for w in linears]
        assert np.mean(errors) < bound
        assert np.mean(errors) > 0.8 * bound


# --- optimality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bases", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_no_single_change_lowers_the_error(bases, tied):
    """Each weight is on the nearest level, and no scale alone is improved by more than rounding."""
    weight = weights("student", (6, 96))
    importance = np.random.default_rng(1).uniform(0.2, 3, 96).astype(np.float32)
    trits, scales = als(weight, bases, 32, tied, np.float32, importance, iterations=60)
    approximation = dequantize(trits, scales, 32, tied)
    full = scales * level_weights(bases) if tied else scales
    levels = np.einsum("rgn,ln->rgl", full, np.array(list(product((-1, 0, 1), repeat=bases))))
    nearest = np.abs(weight[..., None] - np.repeat(levels, 32, axis=1)).min(axis=-1)
    np.testing.assert_allclose(np.abs(weight - approximation), nearest, atol=1e-5)

    def error(scales):
        squares = np.square(
            weight.astype(np.float64) - dequantize(trits, scales.astype(np.float32), 32, tied)
        )
        return (squares * importance).reshape(6, 3, 32).sum(axis=-1)

    least = error(scales)
    for i, factor in product(range(scales.shape[-1]), (0.99, 1.01)):
        moved = scales.copy()
        moved[..., i] *= factor
        assert (error(moved) > least).all()


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_scales_are_rounded_before_trits_are_chosen(dtype):
    """The trits are nearest for the stored scales, fp16's denormals among them."""
    for factor in (1, 3e-6):
        weight = weights("gaussian", (24, 64)) * np.float32(factor)
        trits, scales = als(weight, 2, 64, False, dtype)
        # [24, 9]
        levels = (
            scales[:, 0].astype(np.float32)
            @ np.array(list(product((-1, 0, 1), repeat=2)), np.float32).T
        )
        nearest = np.abs(weight[..., None] - levels[:, None]).min(axis=-1)
        np.testing.assert_allclose(
            np.abs(weight - dequantize(trits, scales, 64)), nearest, atol=1e-6 * factor
        )


def brute_force(w: np.ndarray, bases: int) -> float:
    """The least squared error of all assignments, each with its own least-squares scales."""
    codes = np.array(list(product((-1, 0, 1), repeat=bases)), float)
    t = codes[
        np.array(list(product(range(len(codes)), repeat=len(w))))
    ]  # [assignments, weights, bases]
    residual = w - (t @ (np.linalg.pinv(t) @ w)[..., None])[..., 0]
    return float(np.square(residual).sum(axis=1).min())


def test_against_brute_force():
    rng = np.random.default_rng(5)
    one = rng.standard_normal((12, 6)).astype(np.float32)
    best = np.array([brute_force(w.astype(float), 1) for w in one])
    found = np.square(one - dequantize(*als(one, 1, "row", False, np.float32), "row")).sum(axis=1)
    assert (found > best - 1e-6).all()
    assert (
        found <= best * 1.05 + 1e-6
    ).mean() > 0.7  # alternating descends to a local minimum, here mostly the global one
    assert found.sum() < 1.15 * best.sum()
    two = rng.standard_normal((5, 4)).astype(np.float32)
    best = np.array([brute_force(w.astype(float), 2) for w in two])
    found = np.square(two - dequantize(*als(two, 2, "row", False, np.float32), "row")).sum(axis=1)
    assert (found > best - 1e-6).all()
    assert found.sum() < best.sum() + 0.01 * np.square(two).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_tied_scales_against_a_fine_search(kind, bases):
    weight, top = weights(kind, (32, 64)), (3**bases - 1) // 2
    least = np.full(32, np.inf)
    for fraction in np.linspace(0.02, 1.05, 500):
        unit = np.abs(weight).max(axis=1, keepdims=True) * fraction / top
        error = np.square(weight - np.clip(np.round(weight / unit), -top, top) * unit).sum(axis=1)
        least = np.minimum(least, error)
    found = als_rmse(weight, bases, 64, tied=True)
    slack = 1.25 if kind == "sparse" else 1.04  # a handful of weights fit many grids by chance
    assert found <= np.sqrt(least.sum() / np.square(weight).sum()) * slack


def test_feature_weights_lower_the_weighted_error():
    weight = weights("gaussian", (32, 256))
    importance = np.random.default_rng(2).lognormal(0, 2, 256).astype(np.float32)
    for tied in (False, True):
        errors = []
        for d in (None, importance):
            difference = weight - dequantize(*als(weight, 2, 64, tied, np.float16, d), 64, tied)
            errors.append(
                [np.square(difference).mean(), (np.square(difference) * importance).mean()]
            )
        (plain, plain_weighted), (other, other_weighted) = errors
        assert other_weighted < 0.8 * plain_weighted
        assert other > plain


@pytest.mark.exact
def test_feature_weights_count_relative_to_each_other_alone():
    weight, importance = weights("laplace", (8, 128)), np.linspace(0, 2, 128, dtype=np.float32)
    few, many = (
        als(weight, 2, 64, False, np.float16, importance * factor) for factor in (1e-12, 1e12)
    )
    np.testing.assert_array_equal(few[0], many[0])
    for none in (np.zeros(128), np.ones(128)):
        found = als(weight, 2, 64, False, np.float16, none)
        np.testing.assert_allclose(found[1], als(weight, 2, 64, False)[1], rtol=2e-3)


# --- conventions ----------------------------------------------------------------------------------


@pytest.mark.exact
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bases", "dtype"), [(1, np.float16), (2, BFLOAT16)])
def test_what_a_decomposition_can_hold_it_holds_exactly(bases, dtype, tied):
    """Weights on a uniform grid come back with the same trits: what was ternary stays so."""
    rng = np.random.default_rng(3)
    integers = rng.integers(-((3**bases - 1) // 2), (3**bases + 1) // 2, (40, 256)).astype(
        np.float32
    )
    unit = np.asarray(rng.uniform(0.01, 0.02, (40, 1)), dtype).astype(np.float32)
    trits, scales = als(integers * unit, bases, "row", tied, dtype)
    np.testing.assert_array_equal(trits @ level_weights(bases).astype(np.int8), integers)
    np.testing.assert_allclose(
        scales[:, 0].astype(np.float32), unit * level_weights(bases)[-scales.shape[-1] :], rtol=1e-2
    )


@pytest.mark.parametrize("method", ["greedy", "free", "tied"])
def test_scales_are_positive_and_descend(method):
    weight = weights("student")
    _, scales = (
        greedy(weight, 2, np.float16)
        if method == "greedy"
        else als(weight, 2, 64, method == "tied")
    )
    assert scales.dtype == np.float16
    assert (scales > 0).all()
    assert (np.diff(scales.astype(np.float32), axis=-1) <= 0).all()


@pytest.mark.exact
@pytest.mark.parametrize("tied", [False, True])
def test_groups_stand_alone(tied):
    """A group does not depend on its neighbours, nor on the padding of a ragged last group."""
    weight = weights("laplace", (5, 64 + 50))
    trits, scales = als(weight, 2, 64, tied)
    assert scales.shape == (5, 2, 1 if tied else 2)
    for g, part in enumerate((slice(0, 64), slice(64, None))):
        alone = als(weight[:, part], 2, "row", tied)
        np.testing.assert_array_equal(trits[:, part], alone[0])
        np.testing.assert_array_equal(scales[:, g : g + 1], alone[1])


@pytest.mark.exact
@pytest.mark.parametrize("tied", [False, True])
def test_a_group_beyond_the_row_is_a_row(tied):
    weight = weights("laplace", (5, 64))
    for a, b in zip(als(weight, 2, 1000, tied), als(weight, 2, "row", tied), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.exact
def test_more_than_one_chunk(monkeypatch):
    weight = weights("gaussian", (37, 200))
    importance = np.random.default_rng(2).lognormal(0, 1, 200)
    whole = als(weight, 2, 64, False, np.float16, importance)
    monkeypatch.setattr("atd.decomposition.chunks.CHUNK", 64 * 10)
    pieces = als(weight, 2, 64, False, np.float16, importance)
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a, b)
    assert decomposition_rmse(weight, *pieces, 64) == pytest.approx(
        relative_rmse(weight, dequantize(*pieces, 64))
    )


@pytest.mark.parametrize("tied", [False, True])
def test_groups_of_zeros(tied):
    weight = weights("gaussian", (4, 256))
    weight[1, 64:128] = 0
    weight[2] = 0
    trits, scales = als(weight, 2, 64, tied)
    assert not trits[1, 64:128].any()
    assert not trits[2].any()
    assert not scales[1, 1].any()
    assert not scales[2].any()
    assert scales[0].all()
    for group in (64, "tensor"):
        trits, scales = als(np.zeros((24, 192), np.float32), 2, group, tied, np.float32)
        assert not trits.any()
        assert not scales.any()


@pytest.mark.parametrize("tied", [False, True])
def test_extreme_magnitudes(tied):
    weight = weights("gaussian", (4, 64))
    usual = als_rmse(weight, 2, "row", tied)
    for factor in (1e30, 1e-30):  # squares leave float32
        assert als_rmse(weight * np.float32(factor), 2, "row", tied) == pytest.approx(
            usual, rel=1e-4
        )
    denormal = als(weight * np.float32(1e-40), 2, "row", tied, np.float32)
    assert np.isfinite(denormal[1]).all()
    tiny, scales = als(
        weight * np.float32(1e-12), 2, "row", tied
    )  # below fp16's least: zeros, and said so by the scales
    assert not tiny.any()
    assert not scales.any()
    outlier = weight.copy()
    outlier[:, 7] = 1000
    approximation = dequantize(*als(outlier, 2, "row", tied, np.float32), "row", tied)
    assert relative_rmse(outlier, approximation) < 0.01
    constant = np.full((2, 64), -0.25, np.float32)
    assert als_rmse(constant, 2, "row", tied) < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(65, 200),
    st.booleans(),
    st.sampled_from([1.0, 1e-3, 1e3]),
    st.integers(0, 2**32 - 1),
)
def test_any_shape(out, inputs, tied, factor, seed):
    weight = (weights("student", (out, inputs), seed) * factor).astype(np.float32)
    trits, scales = als(weight, 2, 64, tied, np.float32)
    approximation = dequantize(trits, scales, 64, tied)
    error = relative_rmse(weight, approximation)
    assert error <= 0.5
    assert decomposition_rmse(weight, trits, scales, 64) == pytest.approx(error, rel=1e-3, abs=1e-5)
    np.testing.assert_array_equal(als(-weight, 2, 64, tied, np.float32)[0], -trits)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["greedy", "free", "tied", "tensor"])
def test_weights_that_are_not_finite(bad, method):
    weight = weights("gaussian", (4, 64))
    weight[2, 3] = bad
    decompose = partial(als, group="tensor" if method == "tensor" else 64, tied=method == "tied")
    with pytest.raises(BadInput, match="1 of 256 weights are NaN or infinite"):
        (greedy if method == "greedy" else decompose)(weight, 2)


def test_scales_that_overflow():
    weight = weights("gaussian", (4, 64)) * np.float32(1e6)
    for tied in (False, True):
        with pytest.raises(BadInput, match="overflow scales of float16"):
            als(weight, 2, 64, tied, np.float16)
        assert als_rmse(weight, 2, 64, tied, BFLOAT16) < 0.2
    with pytest.raises(BadInput, match="overflow scales of float16"):
        greedy(weight, 2, np.float16)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("group", [64, pytest.param("tensor", marks=pytest.mark.slow)])
def test_one_weight_that_overflows_is_not_given_up_for_the_others(group, tied):
    """It is met in bf16; in f16 either as well, as a tied step is a part of it, or not at all."""
    weight = weights("gaussian", (4, 64)) * np.float32(0.02)
    for largest in (150_000, 600_000):
        weight[1, 7] = largest
        trits, scales = als(weight, 2, group, tied, BFLOAT16)
        assert dequantize(trits, scales, group, tied)[1, 7] == pytest.approx(largest, rel=0.05)
        if scales.astype(np.float32).max() > np.finfo(np.float16).max:
            with pytest.raises(BadInput, match=r"weights of up to .* overflow scales of float16"):
                als(weight, 2, group, tied, np.float16)
        else:
            trits, scales = als(weight, 2, group, tied, np.float16)
            assert dequantize(trits, scales, group, tied)[1, 7] == pytest.approx(largest, rel=0.05)


def test_options_that_cannot_be():
    weight = weights("gaussian", (4, 64))
    for bases in (0, 5):
        with pytest.raises(BadInput, match=f"1 to 4 bases, not {bases}"):
            als(weight, bases, 64, False)
    for features in (np.ones(63), -np.ones(64), np.full(64, np.nan)):
        with pytest.raises(BadInput, match="feature weights must be 64 finite numbers"):
            als(weight, 2, 64, False, feature_weights=features)
