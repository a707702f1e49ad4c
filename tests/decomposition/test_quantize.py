"""One matrix into a weight of any type, and how far a trellis code's error is known beforehand."""

import numpy as np
import pytest

from atd.decomposition import error_feedback, quantize
from atd.decomposition.options import trellis_type
from atd.decomposition.second_moments import proxy_loss
from atd.decomposition.trellis_codes import gaussian_error, known_code
from atd.weights import TernaryType, TrellisType

SHAPE = (128, 384)
CODED = trellis_type(SHAPE, known_code(2, "fast"), "f16")
assert CODED is not None


def gaussian(shape=SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("type", [TernaryType(SHAPE, 2, "row", True, "f16"), CODED])
def test_it_makes_a_weight_of_the_type(type):
    """Under second moments less is left than by the nearest weights."""
    weight, x = gaussian(), gaussian((2000, 384), 1) @ gaussian((384, 384), 2)
    hessian = x.T @ x / len(x)
    made = quantize.nearest(weight, type)
    under = quantize.calibrated(weight, type, error_feedback.factor(hessian), hessian, 1, 1)
    assert made.type == under.type == type
    losses = [
        float(proxy_loss(weight - np.asarray(q.dequantize()), hessian).sum()) for q in (under, made)
    ]
    assert losses[0] < 0.7 * losses[1]


def measured(weight: np.ndarray, type: TrellisType) -> float:
    left = weight - np.asarray(quantize.nearest(weight, type).dequantize())
    return float(np.sum(left**2) / np.sum(weight**2))


def test_the_error_of_a_code_is_known_on_gaussians():
    assert CODED is not None
    weight = gaussian() * np.linspace(0.5, 2, 128, dtype=np.float32)[:, None]
    assert abs(quantize.excess_kurtosis(weight)) < 0.1
    assert quantize.code_errors(weight, [CODED]) == [gaussian_error(CODED.code)]
    assert measured(weight, CODED) == pytest.approx(gaussian_error(CODED.code), rel=0.05)


@pytest.mark.parametrize(("draw", "kurtosis"), [("laplace", 3.0), ("uniform", -1.2)])
def test_and_found_on_a_sample_of_other_weights(draw, kurtosis):
    assert CODED is not None
    low = {"uniform": {"low": -1.0}}.get(draw, {})
    drawn = getattr(np.random.default_rng(0), draw)(size=SHAPE, **low)
    weight = drawn.astype(np.float32)
    assert quantize.excess_kurtosis(weight) == pytest.approx(kurtosis, abs=0.3)
    (found,) = quantize.code_errors(weight, [CODED])
    assert found == pytest.approx(measured(weight, CODED), rel=0.1)
    assert abs(found / gaussian_error(CODED.code) - 1) > 0.1


def test_the_kurtosis_is_taken_once_for_all_codes(monkeypatch):
    seen, kurtosis = [], quantize.excess_kurtosis
    monkeypatch.setattr(quantize, "excess_kurtosis", lambda w: seen.append(1) or kurtosis(w))
    types = [trellis_type(SHAPE, known_code(n), "f16") for n in (1.5, 2, 3)]
    errors = quantize.code_errors(gaussian(), [type for type in types if type is not None])
    assert errors == [gaussian_error(known_code(n)) for n in (1.5, 2, 3)]
    assert quantize.code_errors(gaussian(), []) == []
    assert len(seen) == 1
