"""Second moments: what errors cost, the corrected target, and moments that are refused."""

import numpy as np
import pytest

from atd.decomposition.error_feedback import factor
from atd.decomposition.second_moments import asymmetric_target, proxy_loss
from atd.errors import BadInput
from tests.decomposition.matrices import gaussian, moment


def test_proxy_loss_is_the_mean_square_error_of_the_outputs():
    x, error = gaussian(500, 20), gaussian(7, 20, seed=1)
    expected = np.square(x @ error.T).mean(axis=0)
    np.testing.assert_allclose(proxy_loss(error, x.T @ x / 500), expected, rtol=1e-4)


def test_asymmetric_target_answers_the_dense_outputs_on_quantized_inputs():
    x = gaussian(500, 20)
    x_quantized = x + 0.5 * gaussian(500, 20, seed=1)
    weight = gaussian(7, 20, seed=2)
    hessian, cross = x_quantized.T @ x_quantized / 500, x.T @ x_quantized / 500
    best = np.linalg.lstsq(x_quantized, x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(
        asymmetric_target(weight, hessian, cross, damping=0.0), best, atol=1e-4
    )
    np.testing.assert_allclose(asymmetric_target(weight, hessian, hessian), weight, atol=1e-6)

    def error(target):
        return np.square(x @ weight.T - x_quantized @ np.asarray(target).T).sum()

    assert (
        error(asymmetric_target(weight, hessian, cross)) < 1.01 * error(best) < 0.9 * error(weight)
    )


def test_a_damped_correction_holds_on_inputs_that_were_not_seen():
    """From 100 tokens for 40 inputs the undamped one learns their noise: worse than none."""
    rng, weight = np.random.default_rng(0), gaussian(30, 40, seed=2)
    mix = gaussian(40, 40, seed=1) * np.exp(gaussian(40, seed=5))

    def streams(tokens):
        dense = rng.standard_normal((tokens, 40)) @ mix
        return dense, dense + 0.6 * rng.standard_normal((tokens, 40)) @ mix

    x, x_quantized = streams(100)
    hessian, cross = x_quantized.T @ x_quantized / 100, x.T @ x_quantized / 100
    undamped, damped = (
        asymmetric_target(weight, hessian, cross, damping) for damping in (0.001, 0.3)
    )
    x, x_quantized = streams(4000)

    def error(target):
        return np.square(x @ weight.T - x_quantized @ np.asarray(target).T).sum()

    assert error(damped) < 0.85 * error(weight) < 0.85 * error(undamped)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_refused(value):
    hessian = moment(40)
    hessian[3, 4] = hessian[4, 3] = value
    for use in (factor, lambda h: asymmetric_target(gaussian(5, 40), h, moment(40))):
        with pytest.raises(BadInput, match=r"second moment.*NaN or infinite"):
            use(hessian)
    with pytest.raises(BadInput, match=r"cross moment.*NaN or infinite"):
        asymmetric_target(gaussian(5, 40), moment(40), hessian)
