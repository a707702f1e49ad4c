"""The mathematics of decomposition: a matrix w becomes trits t and scales s with w ~ sum_i s_i t_i. Arrays in, arrays out.

    greedy   the historic method: one base after the other on the residual, scale_i = mean |residual|
    als      alternating least squares: all scales of a group at once, then every weight to the nearest of the 3^N sums, and again

Groups are runs of inputs of one row, a row, or the whole tensor; scales are shaped as `atd.weights.TernaryType` shapes them. Scales are rounded
to their stored dtype before they are judged and before trits are chosen: what is compared is what will be stored.

How als is made fast: the 3^N sums are symmetric about 0, so only the L = (3^N + 1) / 2 levels that are not negative matter, and |w| is on the level
whose number is the count of midpoints below it. For the nearest assignment, the normal equations and the error depend on the weights only through
how many lie above each midpoint and their sum. So an iteration is L - 1 passes of compare-and-add over |w|; nothing is assigned until the end.
A matrix is cut into chunks of equal shape: matrices that share group size, bases and dtype share one compilation.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import DTypeLike

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
from atd.weights import Group, level_weights
from atd.weights.groups import group_inputs

MOST_BASES = 4
CHUNK = (
    1 << 17
)  # weights in flight: what is made of a chunk stays near the cores, and a small matrix wastes little
RIDGE = 1e-4  # relative, toward the current scales: a base that no weight uses makes the normal equations singular
GRIDS = {1: 16, 2: 16, 3: 32, 4: 64}  # uniform grids tried
# Where free scales start: ratios s_i / s_(i+1). 3 is the uniform grid. Below 2 the levels crowd near 0 (s_0 - s_1 < s_1), which suits weights with a
# peak and tails; least squares alone does not get there from 3. Chosen among all products of ratios of 1.25 to 3 as those that together do best on
# gaussian, Laplace, Student t3 and sparse weights and on a language model's: against the uniform start alone the error falls by 4 to 13 % with two
# bases and 7 to 25 % with three.
START_RATIOS = {
    1: ((),),
    2: ((3,), (1.7,)),
    3: ((3, 3), (1.5, 3), (1.5, 1.7)),
    4: ((3, 3, 3), (1.4, 3, 1.4), (1.7, 1.7, 3)),
}
LEAST_IMPORTANCE = 1e-6  # of the mean: inputs that calibration never saw still get sensible trits


# --- public ------------------------------------------------------------------------------------------------------------


def greedy(
    weight, bases: int, dtype: DTypeLike = np.float32, group: Group = "tensor"
) -> tuple[np.ndarray, np.ndarray]:
    """One base after the other: scale = mean |residual| over the group, trit = clip(round(residual / scale), -1, 1), residual -= scale * trit.

    weight float [out, in] -> trits int8 [out, in, bases], scales `dtype` [rows, groups, bases]. With one scale per tensor (the default) this is the
    method of Bit-TTT-Engine's converter. Raises BadInput where the weights are not finite or a scale overflows `dtype`.
    """
    return _decompose(
        partial(_greedy_chunk, bases=bases, dtype=np.dtype(dtype)), weight, bases, group, None
    )


def als(
    weight,
    bases: int,
    group: Group,
    tied: bool,
    dtype: DTypeLike = np.float16,
    feature_weights=None,
    iterations: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Per group, minimises sum_k d_k (w_k - sum_i s_i t_ki)^2 over scales and trits together.

    weight float [out, in], feature weights d >= 0 float [in] (None: all equal) -> trits int8 [out, in, bases], scales `dtype` [rows, groups, bases],
    or [rows, groups, 1] when tied (u, with s_i = u 3^(bases-1-i)). bases is 1 to 4.

    Free scales alternate s = (T'DT + ridge)^-1 T'Dw with the nearest of the 3^N sums, `iterations` times from each of START_RATIOS, and keep
    the best scales met, which are never behind the greedy ones; they descend. Tied scales take the best of a geometric series of grids and
    alternate s = (q'Dw) / (q'Dq), q the integers, likewise.
    A group of zeros gets zero scales, and a zero scale zero trits; a scale that underflows `dtype` is such a zero.

    Raises BadInput where the weights are not finite or a scale overflows `dtype`, and for bases or feature weights that cannot be.
    """
    if not 1 <= bases <= MOST_BASES:
        raise BadInput(f"als fits 1 to {MOST_BASES} bases, not {bases}")
    chunk = partial(
        _als_chunk, bases=bases, dtype=np.dtype(dtype), tied=tied, iterations=iterations
    )
    return _decompose(chunk, weight, bases, group, _importance(feature_weights, weight.shape[1]))


def relative_rmse(weight, approximation) -> float:
    """|weight - approximation| / |weight|, Frobenius norms (0 for zeros met exactly, inf for zeros that are not)."""
    error = total = 0.0
    for rows in _chunks(weight.shape[0], _step(weight.shape[1])):
        part = np.asarray(weight[rows], np.float64)
        error += float(np.square(part - np.asarray(approximation[rows], np.float64)).sum())
        total += float(np.square(part).sum())
    return _ratio(error, total)


def decomposition_rmse(weight, trits, scales, group: Group) -> float:
    """`relative_rmse` of the weights that trits [out, in, N] and scales [rows, groups, N or 1] stand for, a chunk at a time."""
    bases, size = trits.shape[2], _group_size(weight, group)
    weights = _grouped(weight, size)
    parts = _grouped(trits, size).reshape(-1, size, bases)
    scales = np.asarray(scales, np.float32).reshape(-1, scales.shape[2])
    if scales.shape[1] < bases:
        scales = scales * level_weights(bases)  # [groups, 1] -> [groups, N]
    scales = np.broadcast_to(scales, (len(weights), bases))
    error = total = 0.0
    for rows in _chunks(len(weights), step := _step(size)):
        squares = _squares_chunk(
            _take(weights, rows, step), _take(parts, rows, step), _take(scales, rows, step)
        )
        error, total = error + float(squares[0]), total + float(squares[1])
    return _ratio(error, total)


def _ratio(error: float, total: float) -> float:
    return float(np.sqrt(error / total)) if total else (np.inf if error else 0.0)


# --- matrices to chunks of groups --------------------------------------------------------------------------------------


def _decompose(
    chunk, weight, bases: int, group: Group, importance
) -> tuple[np.ndarray, np.ndarray]:
    """Carries `chunk(weights [groups, size], importance, pooled=)` -> (trits, scales) over a matrix; importance f32 [in] or None."""
    out, inputs = weight.shape
    size = _group_size(weight, group)
    groups = -(-inputs // size)  # of a row
    if group == "tensor":  # one group: all rows at once
        importance = None if importance is None else importance[None]
        trits, scales = map(
            np.asarray, chunk(jnp.asarray(weight, jnp.float32), importance, pooled=True)
        )
    else:
        if importance is None and inputs % size:
            importance = np.ones(
                inputs, np.float32
            )  # the padding of a ragged last group must weigh nothing
        if importance is not None:
            importance = _grouped(importance[None], size)  # [groups of a row, size]
        weights, step = _grouped(weight, size), _step(size)
        trits = np.empty((len(weights), size, bases), np.int8)

        def carry(rows: slice) -> np.ndarray:
            part = (
                None
                if importance is None
                else importance[np.arange(rows.start, rows.start + step) % groups]
            )
            found, scales = chunk(_take(weights, rows, step), part, pooled=False)
            trits[rows] = found[: len(weights) - rows.start]
            return np.asarray(scales)

        first, *rest = _chunks(len(weights), step)
        parts = [carry(first)]  # compiles
        with ThreadPoolExecutor(
            os.cpu_count()
        ) as threads:  # a chunk a core: half as fast again as XLA's own threads
            parts += threads.map(carry, rest)
        scales = np.concatenate(parts)[: len(weights)]
        trits = trits.reshape(out, groups * size, bases)[:, :inputs]
    scales = scales.reshape(-1, groups, scales.shape[-1])
    if not np.isfinite(scales.astype(np.float32)).all():
        _refuse(weight, scales.dtype)
    return trits, scales


def _refuse(weight, dtype):
    weight = np.asarray(weight, np.float32)
    if not np.isfinite(weight).all():
        raise BadInput(
            f"{(~np.isfinite(weight)).sum()} of {weight.size} weights are NaN or infinite"
        )
    largest = np.abs(weight).max()
    raise BadInput(
        f"weights of up to {largest:.3g} overflow scales of {dtype}: store the scales as bfloat16 or float32"
    )


def _importance(feature_weights, inputs: int) -> np.ndarray | None:
    """Feature weights relative to their mean, none of them zero."""
    if feature_weights is None:
        return None
    weights = np.asarray(feature_weights, np.float32)
    if weights.shape != (inputs,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise BadInput(
            f"feature weights must be {inputs} finite numbers >= 0, one an input; found {weights}"
        )
    mean = weights.mean(dtype=np.float64)
    return np.maximum(weights / mean, LEAST_IMPORTANCE).astype(np.float32) if mean else None


def _group_size(weight, group: Group) -> int:
    return weight.shape[1] if isinstance(group, str) else min(group, weight.shape[1])


def _grouped(array, size: int) -> np.ndarray:
    """[out, in, ...] -> [out * groups, size, ...], zeros behind a ragged last group."""
    return group_inputs(np.asarray(array), size).reshape(-1, size, *array.shape[2:])


def _step(size: int) -> int:
    """Groups of a chunk."""
    return max(1, CHUNK // size)


def _chunks(count: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, count, step)]


def _take(array: np.ndarray, rows: slice, step: int) -> np.ndarray:
    """The rows, filled up to `step` with zeros: every chunk has the same shape."""
    part = array[rows]
    part = part if part.dtype == np.int8 else part.astype(np.float32, copy=False)
    return (
        part
        if len(part) == step
        else np.pad(part, [(0, step - len(part))] + [(0, 0)] * (part.ndim - 1))
    )


# --- a chunk: groups [C, size], C groups side by side, or all one group when pooled --------------------------------------
# Per group arrays are [C], [levels, C], [bases, C]; pooled, C is 1 there, which broadcasts.


@partial(jax.jit, static_argnames=("bases", "dtype", "pooled"))
def _greedy_chunk(weight, importance, *, bases, dtype, pooled):
    scales, trits, _ = _greedy(
        weight, importance, bases, pooled, partial(round_scales, dtype=dtype)
    )
    return jnp.stack(trits, axis=-1), scales.T.astype(dtype)


@partial(jax.jit, static_argnames=("bases", "dtype", "pooled", "tied", "iterations"))
def _als_chunk(weight, importance, *, bases, dtype, pooled, tied, iterations):
    size = jnp.abs(weight)
    largest = jnp.max(size, axis=1)
    # Each group is scaled by a power of two so that its largest weight is in [1, 2): exact, and no square over- or underflows.
    unit = jnp.ldexp(1.0, jnp.frexp(jnp.max(largest, keepdims=True) if pooled else largest)[1] - 1)
    size = size / unit[:, None]

    def rounded(scales):
        return round_scales(scales * unit, dtype) / unit

    least = _best_grid(size, importance, bases, pooled, rounded)
    if tied:
        least = _refine_grid(size, importance, least, bases, pooled, rounded, iterations)
        codes = jnp.minimum(jnp.round(size / nonzero(least)[:, None]), top_level(bases)).astype(
            jnp.int8
        )
        scales = least[None]
    else:
        scales = _best_scales(size, importance, least, bases, pooled, rounded, iterations)
        codes = nearest_codes(size, scales)
    trits = trits_of(jnp.where(weight < 0, -codes, codes), bases)
    return trits * (scales != 0).T[:, None, :], (scales * unit).T.astype(dtype)


@jax.jit
def _squares_chunk(weight, trits, scales):
    """Sums of squares of the error and of the weights."""
    approximation = sum(trits[..., i] * scales[:, None, i] for i in range(trits.shape[2]))
    return jnp.square(weight - approximation).sum(), jnp.square(weight).sum()


def _sum(values, pooled: bool):
    """[C, size] -> [C] or, pooled, [1]."""
    sums = jnp.sum(values, axis=1, dtype=jnp.float32)
    return jnp.sum(sums, keepdims=True) if pooled else sums


def _weighted(values, importance):
    return values if importance is None else values * importance


def _total_importance(values, importance, pooled):
    return _sum(jnp.broadcast_to(1.0 if importance is None else importance, values.shape), pooled)


def _energy(size, importance, pooled):
    """The weighted sum of squares of the weights: the error of no bases at all."""
    return _sum(_weighted(jnp.square(size), importance), pooled)


def _greedy(residual, importance, bases, pooled, rounded):
    """-> scales [N, C], trits N x int8 [C, size], what remains of the weights [C, size]."""
    total = _total_importance(residual, importance, pooled)
    scales, trits = [], []
    for _ in range(bases):
        scale = rounded(
            _sum(_weighted(jnp.abs(residual), importance), pooled) / jnp.maximum(total, 1e-30)
        )
        trit = jnp.clip(jnp.round(residual / nonzero(scale)[:, None]), -1, 1)
        residual = residual - scale[:, None] * trit
        scales.append(scale)
        trits.append(trit.astype(jnp.int8))
    return jnp.stack(scales), trits, residual


# --- tied: one scale, a uniform grid -------------------------------------------------------------------------------------


def _grid_moments(size, importance, least, bases, pooled):
    """q'Dw and q'Dq of the nearest assignment to the grid `least` [C]."""
    q = jnp.minimum(jnp.round(size / nonzero(least)[:, None]), top_level(bases))
    weighted = _weighted(q, importance)
    return _sum(weighted * size, pooled), _sum(weighted * q, pooled)


def _best_grid(size, importance, bases, pooled, rounded):
    """The least-squares scale [C] of the best of GRIDS grids: their tops go in a geometric series from 0.8 RMS to beyond the largest weight."""
    energy = _energy(size, importance, pooled)
    rms = jnp.sqrt(energy / jnp.maximum(_total_importance(size, importance, pooled), 1e-30))
    largest = jnp.max(size, axis=1)
    largest = jnp.max(largest, keepdims=True) if pooled else largest
    low, high = jnp.minimum(0.8 * rms, largest), 1.1 * largest

    def fit(fraction):
        top = low * (high / jnp.maximum(low, 1e-30)) ** fraction
        wq, qq = _grid_moments(size, importance, top / top_level(bases), bases, pooled)
        scale = wq / jnp.maximum(qq, 1e-30)
        return scale, wq * scale  # the error is the energy less this

    scales, explained = lax.map(fit, jnp.linspace(0.0, 1.0, GRIDS[bases]))
    return rounded(jnp.take_along_axis(scales, jnp.argmax(explained, axis=0)[None], axis=0)[0])


def _refine_grid(size, importance, least, bases, pooled, rounded, iterations):
    def iterate(carry, _):
        least, best, best_error = carry
        wq, qq = _grid_moments(size, importance, least, bases, pooled)
        error = least * (least * qq - 2 * wq)  # less the energy
        better = error < best_error
        best, best_error = jnp.where(better, least, best), jnp.where(better, error, best_error)
        new = jnp.where(
            jnp.isfinite(least), wq / jnp.maximum(qq, 1e-30), least
        )  # an overflow must stay one to be seen
        return (rounded(new), best, best_error), None

    return lax.scan(iterate, (least, least, jnp.full_like(least, jnp.inf)), length=iterations)[0][1]


# --- free: N scales ------------------------------------------------------------------------------------------------------


def _normal_equations(size, importance, scales, pooled):
    """T'DT [N, N, C] and T'Dw [N, C] of the nearest assignment to `scales` [N, C]."""
    level, sign, rank = ranked_levels(scales)
    weighted = _weighted(size, importance)

    def above(midpoint):
        mask = size > midpoint[:, None]
        return _sum(mask if importance is None else jnp.where(mask, importance, 0), pooled), _sum(
            jnp.where(mask, weighted, 0), pooled
        )

    def by_level(
        above,
    ):  # [L - 1, C] above midpoint m -> [L, C] on half code l (nothing is needed of code 0, the lowest)
        above = jnp.concatenate([jnp.zeros_like(above[:1]), above, jnp.zeros_like(above[:1])])
        return jnp.take_along_axis(above[:-1] - above[1:], rank, axis=0)

    count, total = (by_level(sums) for sums in lax.map(above, midpoints(level, rank)))
    codes = half_codes(len(scales)).T  # [N, L]
    gram = jnp.einsum("ijl,lc->ijc", codes[:, None] * codes, count, precision=lax.Precision.HIGHEST)
    return gram, jnp.einsum("il,lc->ic", codes, sign * total, precision=lax.Precision.HIGHEST)


def _best_scales(size, importance, least, bases, pooled, rounded, iterations):
    """The best scales [N, C] of all starts; those whose ratio is given span what the grid `least` spans."""
    shapes = [np.cumprod([1.0, *(1 / ratio for ratio in ratios)]) for ratios in START_RATIOS[bases]]
    starts = jnp.stack(
        [rounded((shape / shape.sum())[:, None] * (top_level(bases) * least)) for shape in shapes]
    )

    scales, errors = lax.map(
        lambda s: _refine_scales(size, importance, s, pooled, rounded, iterations), starts
    )
    greedy, _, residual = _greedy(
        size, importance, bases, pooled, rounded
    )  # als is never behind greedy
    greedy_error = _sum(_weighted(jnp.square(residual), importance), pooled) - _energy(
        size, importance, pooled
    )
    scales, errors = (
        jnp.concatenate([greedy[None], scales]),
        jnp.concatenate([greedy_error[None], errors]),
    )
    return jnp.take_along_axis(scales, jnp.argmin(errors, axis=0)[None, None], axis=0)[0]


def _refine_scales(size, importance, scales, pooled, rounded, iterations):
    """Alternating least squares from `scales` [N, C] -> the best scales met and their error (less the energy)."""
    ridge = RIDGE * jnp.maximum(_total_importance(size, importance, pooled), 1e-30)

    def iterate(carry, _):
        scales, best, best_error = carry
        gram, right = _normal_equations(size, importance, scales, pooled)
        error = jnp.einsum("ic,ijc,jc->c", scales, gram, scales) - 2 * jnp.sum(
            right * scales, axis=0
        )
        better = error < best_error
        best, best_error = jnp.where(better, scales, best), jnp.where(better, error, best_error)
        gram = gram + ridge * jnp.eye(len(scales))[:, :, None]
        new = _solve(gram, right + ridge * scales)
        return (
            rounded(descending_scales(jnp.abs(new))),
            best,
            best_error,
        ), None  # a negative scale: flipped trits

    start = (scales, scales, jnp.full_like(scales[0], jnp.inf))
    return lax.scan(iterate, start, length=iterations)[0][1:]


def _solve(matrix, right):
    """matrix [N, N, C] positive definite, right [N, C] -> [N, C]: Gaussian elimination, all C at once (LAPACK takes them one by one)."""
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
