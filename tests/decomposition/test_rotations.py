"""Rotations are orthogonal, and of Hadamard matrices where there are any."""

import numpy as np
import pytest

from atd.decomposition.rotations import hadamard, random_rotation


@pytest.mark.parametrize("order", [1, 4, 12, 20, 24, 28, 36, 44, 60, 76, 148])
def test_paleys_matrices_are_hadamard_matrices(order):
    matrix = hadamard(order)
    assert matrix is not None
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix.astype(int) @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [2, 6, 9, 40, 92, 100])
def test_paleys_orders_end_somewhere(order):
    assert hadamard(order) is None


@pytest.mark.parametrize("width", [1, 2, 8, 12, 48, 64, 80, 128, 288, 576, 896, 960, 1536])
def test_widths_of_models_get_hadamard_matrices(width):
    matrix = random_rotation(np.random.default_rng(0), width).apply(np.eye(width))
    np.testing.assert_allclose(np.abs(matrix), width**-0.5, rtol=1e-12)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-12)


@pytest.mark.parametrize("width", [3, 6, 10, 92, 344])
def test_other_widths_get_an_orthogonal_matrix_that_mixes_all_features(width):
    matrix = random_rotation(np.random.default_rng(0), width).apply(np.eye(width))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-12)
    assert np.abs(matrix).min() > 0


def test_copies_rotate_each_run_by_itself_with_signs_of_its_own():
    matrix = (
        random_rotation(np.random.default_rng(1), 12, copies=3)
        .apply(np.eye(36))
        .reshape(3, 12, 3, 12)
    )
    runs = [matrix[i, :, i] for i in range(3)]
    for run in runs:
        np.testing.assert_allclose(run @ run.T, np.eye(12), atol=1e-12)
    assert not np.array_equal(runs[0], runs[1])
    assert np.count_nonzero(matrix) == 3 * 12 * 12
