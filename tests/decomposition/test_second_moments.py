"""Second moments: what errors cost, and moments that are refused."""

import numpy as np
import pytest

from atd.decomposition.correction import asymmetric_target
from atd.decomposition.error_feedback import factor
from atd.decomposition.second_moments import (
    proxy_loss,
    quadratic_forms,
    symmetric,
    upper_products,
)
from atd.errors import BadInput
from tests.decomposition.matrices import gaussian, moment


def test_proxy_loss_is_the_mean_square_error_of_the_outputs():
    x, error = gaussian(500, 20), gaussian(7, 20, seed=1)
    expected = np.square(x @ error.T).mean(axis=0)
    np.testing.assert_allclose(proxy_loss(error, x.T @ x / 500), expected, rtol=1e-4)


def test_products_of_half_of_the_pairs_make_a_whole_moment():
    for inputs in (128, 700):  # one strip, and two
        x = gaussian(40, inputs)
        found = symmetric([np.asarray(strip) for strip in upper_products(x)])
        np.testing.assert_allclose(found, x.T @ x, atol=1e-4)
        np.testing.assert_array_equal(found, found.T)


def test_quadratic_forms():
    for inputs in (128, 600, 700):  # one strip, two, and two of different widths
        rows, hessian = gaussian(6, inputs), moment(inputs)
        expected = np.einsum("ri,ij,rj->r", rows, hessian, rows)
        np.testing.assert_allclose(quadratic_forms(rows, hessian), expected, rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_refused(value):
    hessian = moment(40)
    hessian[3, 4] = hessian[4, 3] = value
    weight, sound = gaussian(5, 40), factor(moment(40))
    for use in (factor, lambda h: asymmetric_target(weight, h, moment(40), sound)):
        with pytest.raises(BadInput, match=r"second moment.*NaN or infinite"):
            use(hessian)
    with pytest.raises(BadInput, match=r"cross moment.*NaN or infinite"):
        asymmetric_target(weight, moment(40), hessian, sound)
