"""Marks of tests whose figures are those of real models: they run in the slow set alone."""

import pytest

SMALL_ONLY = pytest.mark.parametrize(
    "small", [pytest.param("stories260K", marks=pytest.mark.slow)], indirect=True
)
TRAINED_ONLY = pytest.mark.parametrize(
    "trained", [pytest.param("stories15M", marks=pytest.mark.slow)], indirect=True
)
