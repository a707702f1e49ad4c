"""Sampling: the distribution that tokens are drawn from."""

import jax.numpy as jnp
import numpy as np
import pytest

from atd.runtime.sampling import Sampling

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, PROBABILITIES),
        (0.5, 0, 1.0, PROBABILITIES**2),
        (1.0, 2, 1.0, PROBABILITIES * [0, 1, 0, 1, 0]),
        (1.0, 99, 1.0, PROBABILITIES),
        (1.0, 0, 0.6, PROBABILITIES * [0, 1, 0, 1, 0]),  # 0.4 + 0.25 reach 0.6
        (1.0, 0, 0.7, PROBABILITIES * [0, 1, 0, 1, 1]),
        (
            1.0,
            3,
            0.5,
            PROBABILITIES * [0, 1, 0, 1, 0],
        ),  # of the three, 0.4 / 0.85 = 0.47 falls short of 0.5
    ],
)
def test_what_is_sampled(temperature, top_k, top_p, expected):
    draws = 20_000
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES) + 3.0, (draws, 5))
    draw = Sampling(temperature, top_k, top_p).draw()
    tokens = draw(logits, jnp.arange(draws), jnp.zeros((draws, 1), jnp.int32))
    frequencies = np.bincount(np.asarray(tokens), minlength=5) / draws
    expected = expected / expected.sum()
    assert not frequencies[expected == 0].any()
    np.testing.assert_allclose(frequencies, expected, atol=4 * np.sqrt(0.25 / draws))
