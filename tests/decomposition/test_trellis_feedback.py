"""Error feedback with a trellis code: what it leaves, beside rounding each weight by itself."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from atd.decomposition import error_feedback, trellis_feedback
from atd.decomposition.least_squares import als
from atd.decomposition.second_moments import proxy_loss
from atd.decomposition.trellis_codes import known_code
from atd.errors import BadInput
from atd.weights import TernaryType, combine
from atd.weights.codes import values_of

OUT, INPUTS, LENGTH = 192, 160, 96


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray, error_feedback.Factor]:
    """Gaussian weights whose rows differ in size, and inputs that depend on one another."""
    random = np.random.default_rng(0)
    sizes = np.exp(0.3 * random.standard_normal((OUT, 1)))
    weight = (0.02 * sizes * random.standard_normal((OUT, INPUTS))).astype(np.float32)
    mixed = random.standard_normal((INPUTS, INPUTS)) * np.exp(-np.arange(INPUTS) / 40)
    inputs = random.standard_normal((2000, INPUTS)) @ mixed
    hessian = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return weight, hessian, error_feedback.factor(hessian, 0.1)


def weights_of(trits: np.ndarray, scales: np.ndarray, code) -> np.ndarray:
    return values_of(trits, code, LENGTH) * scales[:, 0].astype(np.float32)


def lost(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    return float(np.asarray(proxy_loss(weight - quantized, hessian)).sum())


def test_it_leaves_three_fifths_of_what_rounding_each_weight_leaves(problem):
    weight, hessian, factor = problem
    options = {"bases": 2, "group": "row", "tied": False, "refits": 2}
    plain = combine(
        *error_feedback.decompose(weight, factor, hessian, **options),
        TernaryType((OUT, INPUTS), 2, "row", False, "f16"),
    )
    code = known_code(2)
    trits, scales = trellis_feedback.decompose(weight, factor, hessian, code=code, length=LENGTH)
    assert trits.shape == (OUT, INPUTS, 2)
    assert scales.shape == (OUT, 1, 1)
    assert scales.dtype == np.float16
    coded = weights_of(trits, scales, code)
    assert lost(weight, coded, hessian) < 0.65 * lost(weight, plain, hessian)


def damped(hessian: np.ndarray, factor: error_feedback.Factor) -> np.ndarray:
    return hessian + factor.damping * hessian.diagonal().mean() * np.eye(INPUTS, dtype=np.float32)


def test_sweeps_and_refits_never_raise_the_cost_at_the_best_scales(problem):
    weight, hessian, factor = problem
    code, losses = known_code(2, "fast"), []
    moments = damped(hessian, factor)
    for sweeps, refits in ((0, 0), (1, 0), (1, 1), (1, 3)):
        found = trellis_feedback.decompose(
            weight, factor, hessian, code=code, length=LENGTH, sweeps=sweeps, refits=refits
        )
        values = weights_of(*found, code)
        projected = values @ moments
        best = np.sum(projected * weight, axis=1) / np.sum(projected * values, axis=1)
        losses.append(lost(weight, best[:, None] * values, moments))
    assert all(after <= before * 1.0001 for before, after in pairwise(losses))
    assert losses[-1] < 0.995 * losses[0]


def test_the_outputs_of_a_row_have_the_energy_of_the_weights(problem):
    weight, hessian, factor = problem
    code = known_code(2)
    values = weights_of(
        *trellis_feedback.decompose(weight, factor, hessian, code=code, length=LENGTH), code
    )
    moments = damped(hessian, factor)
    energy, kept = (np.einsum("oi,ij,oj->o", w, moments, w) for w in (weight, values))
    np.testing.assert_allclose(kept, energy, rtol=1.5e-3)  # scales are rounded to f16
    best = np.sum(values @ moments * weight, axis=1) / kept  # what least squares would shrink to
    assert best.mean() < 0.997
    # At what cost: D^2 / 4 of a relative error D.
    least = lost(weight, best[:, None] * values, moments)
    assert least < lost(weight, values, moments) < 1.01 * least


def weighted(weight, quantized, hessian, importance) -> float:
    return float(np.asarray(proxy_loss(weight - quantized, hessian)) @ importance)


def test_trits_are_chosen_for_the_rows_that_count_most(problem):
    """At the same bytes: rows share trits, and those whose errors cost much get the better ones."""
    weight, hessian, factor = problem
    importance = np.exp(np.random.default_rng(1).standard_normal(OUT)).astype(np.float32)
    code, moments = known_code(2, "fast"), damped(hessian, factor)
    make = partial(trellis_feedback.decompose, weight, factor, hessian, code=code, length=LENGTH)
    alike, chosen = (weights_of(*make(importance=c), code) for c in (None, importance))
    cost = weighted(weight, alike, moments, importance)
    assert weighted(weight, chosen, moments, importance) < 0.92 * cost
    assert lost(weight, chosen, moments) > lost(weight, alike, moments)


def test_equal_importance_changes_nothing(problem):
    weight, hessian, factor = problem
    make = partial(trellis_feedback.decompose, weight, factor, hessian, code=known_code(2, "fast"))
    found, alike = (make(length=LENGTH, importance=c) for c in (None, np.ones(OUT)))
    np.testing.assert_array_equal(found[0], alike[0])


def test_without_second_moments(problem):
    weight, hessian, factor = problem
    code = known_code(2, "fast")
    trits, scales = trellis_feedback.nearest(weight, code=code, length=LENGTH)
    error = np.mean((weights_of(trits, scales, code) - weight) ** 2) / np.mean(weight**2)
    assert error < 0.021  # rounding each weight by itself leaves 0.029
    found = trellis_feedback.decompose(weight, factor, hessian, code=code, length=LENGTH)
    with_moments = weights_of(*found, code)
    assert lost(weight, with_moments, hessian) < lost(
        weight, weights_of(trits, scales, code), hessian
    )


def test_a_row_of_zeros_stays_zero(problem):
    weight = problem[0].copy()
    weight[7] = 0
    code = known_code(2, "fast")
    found = trellis_feedback.nearest(weight, code=code, length=LENGTH)
    assert not weights_of(*found, code)[7].any()


def test_what_cannot_be_is_refused(problem):
    weight, hessian, factor = problem
    code = known_code(2)
    one = weight.copy()
    one[3, 5] = np.nan
    searches = (
        partial(trellis_feedback.nearest, code=code, length=LENGTH),
        lambda w: trellis_feedback.decompose(w, factor, hessian, code=code, length=LENGTH),
        partial(als, bases=2, group="row", tied=False),
    )
    for search in searches:  # with a code and without, one message
        with pytest.raises(BadInput, match="1 of 30720 weights are NaN or infinite"):
            search(one)
        with pytest.raises(BadInput, match=r"weights of up to .* overflow scales of float16"):
            search(weight * 1e8)
    with pytest.raises(BadInput, match="second moments of 80 inputs"):
        trellis_feedback.decompose(weight, factor, hessian[:80, :80], code=code, length=LENGTH)
