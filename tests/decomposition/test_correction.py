"""The corrected target of a weight whose inputs have changed."""

import numpy as np
import pytest

from atd.decomposition import correction
from atd.decomposition.correction import asymmetric_target
from atd.decomposition.error_feedback import factor
from atd.errors import BadInput
from tests.decomposition.matrices import gaussian, moment


def test_asymmetric_target_answers_the_dense_outputs_on_quantized_inputs():
    x = gaussian(500, 20)
    x_quantized = x + 0.5 * gaussian(500, 20, seed=1)
    weight = gaussian(7, 20, seed=2)
    hessian, cross = x_quantized.T @ x_quantized / 500, x.T @ x_quantized / 500
    best = np.linalg.lstsq(x_quantized, x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(
        asymmetric_target(weight, hessian, cross, factor(hessian, damping=0.0)), best, atol=1e-4
    )
    np.testing.assert_allclose(
        asymmetric_target(weight, hessian, hessian, factor(hessian)), weight, atol=1e-6
    )

    def error(target):
        return np.square(x @ weight.T - x_quantized @ np.asarray(target).T).sum()

    assert (
        error(asymmetric_target(weight, hessian, cross, factor(hessian)))
        < 1.01 * error(best)
        < 0.9 * error(weight)
    )


def test_what_the_residual_stream_lacks_is_made_up_for():
    """The outputs answer those of the dense model, and what is missing where they are added."""
    x, weight = gaussian(500, 20), gaussian(7, 20, seed=2)
    x_quantized = x + 0.5 * gaussian(500, 20, seed=1)
    lacking = x_quantized @ gaussian(20, 7, seed=3) + gaussian(500, 7, seed=4)
    hessian, cross, residual = (a.T @ x_quantized / 500 for a in (x_quantized, x, lacking))
    best = np.linalg.lstsq(x_quantized, x @ weight.T + lacking, rcond=None)[0].T
    found = asymmetric_target(weight, hessian, cross, factor(hessian, damping=0.0), residual)
    np.testing.assert_allclose(found, best, atol=1e-4)
    with pytest.raises(BadInput, match="residual stream has entries that are NaN"):
        asymmetric_target(weight, hessian, cross, factor(hessian), residual * np.nan)


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
        asymmetric_target(weight, hessian, cross, factor(hessian, damping))
        for damping in (0.001, 0.3)
    )
    x, x_quantized = streams(4000)

    def error(target):
        return np.square(x @ weight.T - x_quantized @ np.asarray(target).T).sum()

    assert error(damped) < 0.85 * error(weight) < 0.85 * error(undamped)


def test_chunks_of_rows_solve_the_same_equations(monkeypatch):
    weight, hessian, cross = gaussian(7, 20), moment(20), gaussian(20, 20, seed=3)
    damped = hessian + 0.1 * np.diagonal(hessian).mean() * np.eye(20)
    expected = weight + weight @ (cross - hessian) @ np.linalg.inv(damped)
    residual = gaussian(7, 20, seed=4)
    for order in (True, False):
        found = asymmetric_target(weight, hessian, cross, factor(hessian, 0.1, order))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        found = asymmetric_target(weight, hessian, cross, factor(hessian, 0.1, order), residual)
        np.testing.assert_allclose(found, expected + residual @ np.linalg.inv(damped), atol=1e-4)
    monkeypatch.setattr(correction, "ROWS", 3)  # the last chunk is filled up
    found = asymmetric_target(weight, hessian, cross, factor(hessian, 0.1))
    np.testing.assert_allclose(found, expected, atol=1e-4)
