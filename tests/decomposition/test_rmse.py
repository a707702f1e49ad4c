"""The error of a decomposition: by hand, and at its ends."""

import numpy as np
import pytest

from atd.decomposition.rmse import decomposition_rmse


def rmse(weight, approximation) -> float:
    """The error of one base with a scale per row, whose trits are all 1 or 0."""
    weight, scale = np.array(weight, np.float32), np.array(approximation, np.float32)
    trits = np.broadcast_to((scale != 0).astype(np.int8)[:, :, None], (*weight.shape, 1))
    return decomposition_rmse(weight, trits, scale.max(axis=1)[:, None, None], "row")


def test_decomposition_rmse():
    assert rmse([[3.0, 4.0]], [[0, 0]]) == 1
    assert rmse([[3.0, 4.0]], [[3.0, 3.0]]) == pytest.approx(0.2)
    assert rmse(np.zeros((2, 2)), np.zeros((2, 2))) == 0
    assert rmse(np.zeros((2, 2)), np.ones((2, 2))) == np.inf
