"""Levels: scales are rounded as their dtype rounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atd.decomposition.levels import round_scales
from tests.decomposition.matrices import BFLOAT16


@pytest.mark.exact
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([np.float16, BFLOAT16]),
    st.lists(st.floats(2.0**-120, 2.0**60, width=32), min_size=8, max_size=8),
)
def test_rounding_is_that_of_the_dtype(dtype, values):
    array = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        expected = array.astype(dtype).astype(np.float32)
        rounded = np.asarray(round_scales(array, np.dtype(dtype)))
        np.testing.assert_array_equal(rounded.astype(dtype).astype(np.float32), expected)
    assert np.isfinite(rounded).all()  # where the dtype has infinity, numbers go on
    fits = np.isfinite(expected)
    np.testing.assert_array_equal(rounded[fits], expected[fits])
