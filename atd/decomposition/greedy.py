"""Greedy decomposition: each base is fitted to what the bases before it leave over."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from atd.decomposition.chunks import Groups, fit_chunks
from atd.decomposition.levels import nonzero, round_scales
from atd.weights import Group


def greedy(
    weight, bases: int, dtype: DTypeLike = np.float32, group: Group = "tensor"
) -> tuple[np.ndarray, np.ndarray]:
    """Decomposes a matrix base by base.

        r_0 = w,  s_i = mean |r_i|,  t_i = clip(round(r_i / s_i), -1, 1),  r_(i+1) = r_i - s_i t_i

    With one scale per tensor and base (the default) this is the method of Bit-TTT-Engine's
    converter.

    Args:
        weight: float [out, in].
        bases: N, any number.
        dtype: that in which scales are stored; they are rounded to it before trits are chosen.
        group: inputs that share their scales: a size, "row" or "tensor".

    Returns:
        Trits int8 [out, in, N] and scales `dtype` [rows, groups, N].

    Raises:
        BadInput: weights are not finite, or a scale overflows `dtype`.
    """
    fit = partial(_fit_chunk, bases=bases, dtype=np.dtype(dtype))
    return fit_chunks(fit, weight, bases, group, None)


@partial(jax.jit, static_argnames=("bases", "dtype", "pooled"))
def _fit_chunk(weights, importance, *, bases, dtype, pooled):
    """Fits float32 [C, size] -> trits int8 [C, size, N], scales `dtype` [C, N]."""
    groups = Groups(weights, importance, pooled)
    scales, trits, _ = fit_residuals(groups, bases, partial(round_scales, dtype=dtype))
    return jnp.stack(trits, axis=-1), scales.T.astype(dtype)


def fit_residuals(
    groups: Groups, bases: int, rounded: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Fits one base after the other, inside a compiled function.

    Args:
        groups: C groups of weights.
        bases: N.
        rounded: rounds scales [C] to what can be stored.

    Returns:
        Scales float32 [N, C], N times trits int8 [C, size], and what is left of the weights,
        float32 [C, size].
    """
    residual, total = groups.weights, groups.total_importance()
    scales, trits = [], []
    for _ in range(bases):
        mean = groups.sum(groups.weighted(jnp.abs(residual))) / jnp.maximum(total, 1e-30)
        scale = rounded(mean)
        trit = jnp.clip(jnp.round(residual / nonzero(scale)[:, None]), -1, 1)
        residual = residual - scale[:, None] * trit
        scales.append(scale)
        trits.append(trit.astype(jnp.int8))
    return jnp.stack(scales), trits, residual
