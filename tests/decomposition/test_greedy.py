"""Greedy decomposition against its equations."""

import numpy as np

from atd.decomposition.greedy import greedy
from tests.decomposition.matrices import weights


def test_each_base_is_fitted_to_the_residual_of_those_before():
    weight = weights("gaussian", (40, 30))
    trits, scales = greedy(weight, 3)
    residual = weight.astype(np.float64)
    for i in range(3):
        scale = np.abs(residual).mean()
        expected = np.clip(np.round(residual / scale), -1, 1)
        np.testing.assert_allclose(scales[0, 0, i], scale, rtol=1e-5)
        assert (
            trits[:, :, i] != expected
        ).mean() < 1e-3  # a residual on the very edge may fall either way
        residual -= scale * expected
