"""Alternating least squares (als): scales and trits of a group are fitted in turns.

All N scales are fitted together to the trits, then every weight goes to the nearest of the 3^N
sums, and again.

Scales are rounded to their stored dtype before they are judged and before trits are chosen: what is
compared is what will be stored. That they overflow it shows at the end alone: the best scales are
refused then, and worse ones that fit do not take their place.

How it is made fast: the 3^N sums are symmetric about 0, so only the L = (3^N + 1) / 2 levels that
are not negative matter, and |w| is on the level whose number is the count of midpoints below it.
The normal equations of the nearest assignment and its error depend on the weights only through how
many lie above each midpoint, and their sum. So an iteration is L - 1 passes of compare-and-add over
|w|; nothing is assigned until the end.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import DTypeLike

from atd.decomposition.chunks import Groups, fit_chunks
from atd.decomposition.greedy import fit_residuals
from atd.decomposition.levels import (
    descending_scales,
    half_codes,
    midpoints,
    nearest_codes,
    nonzero,
    ranked_levels,
    round_scales,
    top_level,
    trits_of,
)
from atd.errors import BadInput
from atd.weights import Group

MOST_BASES = 4
# Relative, toward the current scales: a base that no weight uses makes the normal equations
# singular.
RIDGE = 1e-4
GRIDS = {1: 16, 2: 16, 3: 32, 4: 64}  # uniform grids tried
# Where free scales start: ratios s_i / s_(i+1). 3 is the uniform grid. Below 2 the levels crowd
# near 0 (s_0 - s_1 < s_1), which suits weights with a peak and tails; least squares alone does not
# get there from 3. Chosen among all products of ratios of 1.25 to 3 as those that together do best
# on Gaussian, Laplace, Student t3 and sparse weights and on a language model's: against the uniform
# start alone the error falls by 4 to 13 % with two bases and 7 to 25 % with three.
START_RATIOS = {
    1: ((),),
    2: ((3,), (1.7,)),
    3: ((3, 3), (1.5, 3), (1.5, 1.7)),
    4: ((3, 3, 3), (1.4, 3, 1.4), (1.7, 1.7, 3)),
}
LEAST_IMPORTANCE = 1e-6  # of the mean: inputs that calibration never saw still get sensible trits

Rounding = Callable[[jax.Array], jax.Array]  # scales -> the nearest that can be stored


def als(
    weight,
    bases: int,
    group: Group,
    tied: bool,
    dtype: DTypeLike = np.float16,
    feature_weights=None,
    iterations: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Decomposes a matrix group by group: minimises over scales and trits

        sum_k d_k (w_k - sum_i s_i t_ki)^2

    Free scales alternate s = (T'DT + ridge)^-1 T'Dw with the nearest of the 3^N sums, `iterations`
    times from each of START_RATIOS, and keep the best scales met, which are never behind the greedy
    ones; they descend. Tied scales, s_i = u 3^(N-1-i), take the best of a geometric series of
    uniform grids and alternate u = (q'Dw) / (q'Dq), q the integers, likewise. A group of zeros gets
    zero scales, and a zero scale zero trits; a scale that underflows `dtype` is such a zero.

    Args:
        weight: w, float [out, in].
        bases: N, 1 to 4.
        group: inputs that share their scales: a size (the last group may be ragged), "row" or
            "tensor".
        tied: whether one scale u is stored per group.
        dtype: that in which scales are stored.
        feature_weights: d, float [in], none negative; None: all equal.
        iterations: of alternating least squares, from each start.

    Returns:
        Trits int8 [out, in, N], and scales `dtype` [rows, groups, N], or u [rows, groups, 1] where
        tied.

    Raises:
        BadInput: weights are not finite, a scale overflows `dtype`, or bases or feature weights
            cannot be.

    Alternating minimisation over codes and coefficients is that of 1802.00150, here for ternary
    codes.
    """
    if not 1 <= bases <= MOST_BASES:
        raise BadInput(f"als fits 1 to {MOST_BASES} bases, not {bases}")
    fit = partial(_fit_chunk, bases=bases, dtype=np.dtype(dtype), tied=tied, iterations=iterations)
    return fit_chunks(fit, weight, bases, group, _importance(feature_weights, weight.shape[1]))


def _importance(feature_weights, inputs: int) -> np.ndarray | None:
    """Returns feature weights relative to their mean, none of them zero."""
    if feature_weights is None:
        return None
    weights = np.asarray(feature_weights, np.float32)
    if weights.shape != (inputs,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise BadInput(
            f"feature weights must be {inputs} finite numbers >= 0, one per input; found {weights}"
        )
    mean = weights.mean(dtype=np.float64)
    return np.maximum(weights / mean, LEAST_IMPORTANCE).astype(np.float32) if mean else None


@partial(jax.jit, static_argnames=("bases", "dtype", "pooled", "tied", "iterations"))
def _fit_chunk(weights, importance, *, bases, dtype, pooled, tied, iterations):
    """Fits float32 [C, size] -> trits int8 [C, size, N], scales `dtype` [C, N or 1]."""
    groups = Groups(jnp.abs(weights), importance, pooled)
    # Each group is scaled by a power of two so that its largest weight is in [1, 2): exact, and no
    # square over- or underflows.
    unit = jnp.ldexp(1.0, jnp.frexp(groups.largest())[1] - 1)
    groups = replace(groups, weights=groups.weights / unit[:, None])

    def rounded(scales):
        return round_scales(scales * unit, dtype) / unit

    step = _best_grid(groups, bases, rounded)
    if tied:
        step = _refine_grid(groups, step, bases, rounded, iterations)
        scales, codes = step[None], _nearest_integers(groups, step, bases).astype(jnp.int8)
    else:
        scales = _best_scales(groups, step, bases, rounded, iterations)
        codes = nearest_codes(groups.weights, scales)
    trits = trits_of(jnp.where(weights < 0, -codes, codes), bases)
    return trits * (scales != 0).T[:, None, :], (scales * unit).T.astype(dtype)


# In what follows weights are |w|. Errors are those of a fit less the energy of the group, which is
# the same for all fits.
# --- tied: one scale per group, the step of a uniform grid ----------------------------------------


def _nearest_integers(groups: Groups, step, bases: int):
    """Assigns weights to the nearest multiples of `step` [C]: float32 [C, size]."""
    return jnp.minimum(jnp.round(groups.weights / nonzero(step)[:, None]), top_level(bases))


def _grid_moments(groups: Groups, step, bases: int):
    """q'Dw and q'Dq [C] of the nearest assignment q to the grid of `step` [C]."""
    q = _nearest_integers(groups, step, bases)
    weighted = groups.weighted(q)
    return groups.sum(weighted * groups.weights), groups.sum(weighted * q)


def _best_grid(groups: Groups, bases: int, rounded: Rounding):
    """The least-squares step [C] of the best of GRIDS uniform grids.

    Their tops go in a geometric series from 0.8 RMS to beyond the largest weight.
    """
    energy = groups.energy()
    rms = jnp.sqrt(energy / jnp.maximum(groups.total_importance(), 1e-30))
    largest = groups.largest()
    low, high = jnp.minimum(0.8 * rms, largest), 1.1 * largest

    def fit(fraction):
        top = low * (high / jnp.maximum(low, 1e-30)) ** fraction
        wq, qq = _grid_moments(groups, top / top_level(bases), bases)
        step = wq / jnp.maximum(qq, 1e-30)
        return step, wq * step  # the error is the energy less this

    steps, explained = lax.map(fit, jnp.linspace(0.0, 1.0, GRIDS[bases]))
    return rounded(jnp.take_along_axis(steps, jnp.argmax(explained, axis=0)[None], axis=0)[0])


def _refine_grid(groups: Groups, step, bases: int, rounded: Rounding, iterations: int):
    """Alternates assignment and least-squares step from `step` [C]; returns the best step met."""

    def iterate(carry, _):
        step, best, best_error = carry
        wq, qq = _grid_moments(groups, step, bases)
        error = step * (step * qq - 2 * wq)
        better = error < best_error
        best, best_error = jnp.where(better, step, best), jnp.where(better, error, best_error)
        return (rounded(wq / jnp.maximum(qq, 1e-30)), best, best_error), None

    start = (step, step, jnp.full_like(step, jnp.inf))
    return lax.scan(iterate, start, length=iterations)[0][1]


# --- free: N scales per group ---------------------------------------------------------------------


def _normal_equations(groups: Groups, scales):
    """T'DT [N, N, C] and T'Dw [N, C] of the nearest assignment T to `scales` [N, C]."""
    level, sign, rank = ranked_levels(scales)
    weighted = groups.weighted(groups.weights)

    def above(midpoint):
        mask = groups.weights > midpoint[:, None]
        count = mask if groups.importance is None else jnp.where(mask, groups.importance, 0)
        return groups.sum(count), groups.sum(jnp.where(mask, weighted, 0))

    def by_level(above):
        """[L - 1, C] above midpoints -> [L, C] on half codes, of which code 0 needs none."""
        above = jnp.concatenate([jnp.zeros_like(above[:1]), above, jnp.zeros_like(above[:1])])
        return jnp.take_along_axis(above[:-1] - above[1:], rank, axis=0)

    count, total = (by_level(sums) for sums in lax.map(above, midpoints(level, rank)))
    codes = half_codes(len(scales)).T  # [N, L]
    gram = jnp.einsum("ijl,lc->ijc", codes[:, None] * codes, count, precision=lax.Precision.HIGHEST)
    return gram, jnp.einsum("il,lc->ic", codes, sign * total, precision=lax.Precision.HIGHEST)


def _best_scales(groups: Groups, step, bases: int, rounded: Rounding, iterations: int):
    """The best scales [N, C] of all starts, which span what the grid of `step` [C] spans."""
    shapes = [np.cumprod([1.0, *(1 / ratio for ratio in ratios)]) for ratios in START_RATIOS[bases]]
    starts = jnp.stack(
        [rounded((shape / shape.sum())[:, None] * (top_level(bases) * step)) for shape in shapes]
    )
    scales, errors = lax.map(lambda s: _refine_scales(groups, s, rounded, iterations), starts)
    greedy, _, residual = fit_residuals(groups, bases, rounded)
    greedy_error = groups.sum(groups.weighted(jnp.square(residual))) - groups.energy()
    scales = jnp.concatenate([greedy[None], scales])
    errors = jnp.concatenate([greedy_error[None], errors])
    return jnp.take_along_axis(scales, jnp.argmin(errors, axis=0)[None, None], axis=0)[0]


def _refine_scales(groups: Groups, scales, rounded: Rounding, iterations: int):
    """Alternates assignment and least squares from `scales` [N, C]; returns the best, and their
    error.
    """
    ridge = RIDGE * jnp.maximum(groups.total_importance(), 1e-30)

    def iterate(carry, _):
        scales, best, best_error = carry
        gram, right = _normal_equations(groups, scales)
        error = jnp.einsum("ic,ijc,jc->c", scales, gram, scales) - 2 * jnp.sum(
            right * scales, axis=0
        )
        better = error < best_error
        best, best_error = jnp.where(better, scales, best), jnp.where(better, error, best_error)
        gram = gram + ridge * jnp.eye(len(scales))[:, :, None]
        new = jnp.abs(_solve(gram, right + ridge * scales))  # a negative scale: flipped trits
        return (rounded(descending_scales(new)), best, best_error), None

    start = (scales, scales, jnp.full_like(scales[0], jnp.inf))
    return lax.scan(iterate, start, length=iterations)[0][1:]


def _solve(matrix, right):
    """Solves positive definite systems, matrix [N, N, C] and right [N, C] -> [N, C].

    Gaussian elimination of all C at once, because LAPACK takes them one by one.
    """
    n = len(right)
    matrix, right = [list(row) for row in matrix], list(right)
    for i in range(n):
        for k in range(i + 1, n):
            factor = matrix[k][i] / matrix[i][i]
            right[k] = right[k] - factor * right[i]
            for j in range(i, n):
                matrix[k][j] = matrix[k][j] - factor * matrix[i][j]
    for i in reversed(range(n)):
        right[i] = (right[i] - sum(matrix[i][j] * right[j] for j in range(i + 1, n))) / matrix[i][i]
    return jnp.stack(right)
