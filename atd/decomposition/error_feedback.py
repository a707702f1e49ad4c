"""Decomposition that knows its inputs: trits chosen so that the errors of a row cancel in what the layer puts out.

With H = X'X / n the second moment of a layer's inputs, a row w that becomes q costs (w - q) H (w - q)'. Nearest assignment looks at the diagonal
of H alone; here columns are visited one after the other, and each is snapped to the level nearest to

    x_j = w_j + sum_(i != j) (w_i - q_i) M_ij

which takes over the errors of the others as far as input j can stand in for them. Two matrices M, one visit each:

    feedback (GPTQ, OBQ)                M = R_ij / R_jj, H = R R' with R upper triangular: only columns visited before count, those to come are
                                        still free to answer. Successive cancellation of the components of (w - q) R; the same q as GPTQ's, which
                                        is written with the Cholesky factor of H^-1 = R^-T R^-1, without forming an inverse.
    descent (LNQ, QuantEase)            M = H_ij / H_jj: all other columns stand as they are, and x_j is exactly where the cost is least in q_j. The
                                        cost can only fall.

Feedback starts from q = w, no error at all; descent starts from where the visit before it ended. Scales are fitted beforehand
(`atd.decomposition.least_squares.als` under the diagonal of H) and may be refitted in closed form under all of H.

How it is made fast: matrices lie transposed, [in, rows], so that a column is contiguous and rows are the vector; columns go in blocks, whose
targets take in all errors outside by one matrix product, so that the loop over columns only looks inside the block; rows are cut into chunks of
equal shape, a core each, so that all matrices of one input width share compilations.

Sources: GPTQ 2210.17323, QuantEase 2309.01885, LNQ in GuidedQuant 2505.07004, GPTAQ 2504.02692; Babai's view of GPTQ 2507.18553.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import DTypeLike

from atd.decomposition.least_squares import RIDGE, als
from atd.decomposition.levels import (
    ascending_levels,
    descending_scales,
    nearest_codes,
    nonzero,
    ranked_levels,
    round_scales,
    top_level,
    trits_of,
)
from atd.errors import BadInput
from atd.weights import Group
from atd.weights.groups import group_inputs

DAMPING = 0.01  # of the mean diagonal, added to the diagonal: second moments are estimates, and often singular
MOST_DAMPING = 10.0  # what needs more is no second moment
BLOCK = 64  # columns
ROWS = 256  # rows of a chunk on a CPU: the errors of a block stay in its cache
REFIT_FLOATS = (
    1 << 20
)  # what the normal equations of the rows in flight may take: again, what stays near the core

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Factor(NamedTuple):
    """What all linears that share an input share."""

    order: jax.Array  # int32 [in]: the order in which inputs are visited
    feedback: (
        jax.Array
    )  # float32 [in, in], strictly lower triangular, inputs in that order: [j, i] = R_ij / R_jj
    damping: float  # what the diagonal was raised by, relative to its mean; above what was asked for where that was not enough


# --- public ------------------------------------------------------------------------------------------------------------


def factor(hessian, damping: float = DAMPING, order: bool = True) -> Factor:
    """Prepares the second moment H [in, in] of a layer's inputs for `decompose`.

    order: visit inputs by descending H_jj (act-order), else as they stand. Inputs that are always zero are allowed. Where H is singular beyond
    what `damping` mends, damping is raised tenfold until the factorisation succeeds.
    Raises BadInput where H is not finite, or is no second moment (not positive semi-definite, however damped).
    """
    hessian = _second_moment(hessian)
    diagonal = jnp.diagonal(hessian)
    visits = jnp.argsort(-diagonal) if order else jnp.arange(len(diagonal))  # a stable sort
    feedback, damping = _damp_until(partial(_feedback, hessian, visits), damping)
    return Factor(visits, feedback, damping)


def asymmetric_target(weight, hessian, cross, damping: float = DAMPING) -> jax.Array:
    """W* = W + W (C - H) (H + damping mean(diag H) I)^-1: the weights whose outputs on the quantized inputs are closest to those of W on the dense
    model's (GPTAQ).

    weight [out, in]; hessian H = Xq'Xq / n of the inputs as the quantized model has them; cross C = X'Xq / n [in, in], X the dense model's.
    With dW = W* - Q, tr(dW H dW') is then the cost of Q against the dense model's outputs, less a constant.
    Raises BadInput where H or C is not finite.
    """
    hessian = _second_moment(hessian)
    cross = jnp.asarray(cross, jnp.float32)
    if not bool(jnp.isfinite(cross).all()):
        raise BadInput(
            "the cross moment of dense and quantized inputs has entries that are NaN or infinite"
        )
    return _damp_until(partial(_target, jnp.asarray(weight, jnp.float32), hessian, cross), damping)[
        0
    ]


def decompose(
    weight,
    factor: Factor,
    hessian,
    *,
    bases: int,
    group: Group,
    tied: bool,
    dtype: DTypeLike = np.float16,
    sweeps: int = 2,
    refits: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises sum_rows (w - q) H (w - q)' over q = sum_i s_i t_i, in `atd.decomposition.least_squares.als`'s conventions.

    weight float [out, in], `factor` that of `hessian` [in, in] -> trits int8 [out, in, bases], scales `dtype` [out, groups, bases], or
    [out, groups, 1] when tied. Group: a size along the inputs (the last may be ragged) or "row".

    Scales by als under the diagonal of H; feedback; `sweeps` of coordinate descent; then `refits` rounds of (scales in closed form under H,
    one sweep). H counts with factor.damping throughout, and from the feedback on its cost never rises. What is judged are scales rounded to `dtype`,
    and trits and scales rebuild to the bit the weights that were.

    Raises BadInput where weights are not finite, a scale overflows `dtype`, or for bases or a group that cannot be.
    """
    weight, hessian = np.asarray(weight, np.float32), _second_moment(hessian)
    out, inputs = weight.shape
    if group == "tensor":
        raise BadInput(
            "error feedback works on rows, each with its own scales: group must be a size or 'row', not 'tensor'"
        )
    if len(hessian) != inputs or len(factor.order) != inputs:
        raise BadInput(
            f"second moments of {len(hessian)} inputs (factor: {len(factor.order)}) for weights of {inputs}"
        )
    size = inputs if isinstance(group, str) else min(group, inputs)
    _, scales = als(weight, bases, group, tied, dtype, feature_weights=jnp.diagonal(hessian))
    scales = np.asarray(scales, np.float32)

    hessian = _damped(hessian, factor.damping)
    descent = _descent(hessian, factor.order)
    options = {"bases": bases, "size": size, "tied": tied}
    step = ROWS if jax.default_backend() == "cpu" else out

    def carry(start: int) -> tuple[np.ndarray, np.ndarray]:
        rows, scale = _rows(weight, start, step), _rows(scales, start, step)
        target = _columns(rows, factor.order)
        visit = partial(_visit, target, order=factor.order, **options)
        quantized = visit(target, matrix=factor.feedback, scales=scale)
        for _ in range(sweeps):
            quantized = visit(quantized, matrix=descent, scales=scale)
        for _ in range(refits):
            quantized, scale = _refit(
                rows, quantized, scale, hessian, factor.order, dtype=np.dtype(dtype), **options
            )
            quantized = visit(quantized, matrix=descent, scales=scale)
        return np.asarray(_trits(quantized, scale, factor.order, **options)), np.asarray(scale)

    starts = range(0, out, step)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        parts = list(threads.map(carry, starts))
    trits, fitted = (np.concatenate(arrays)[:out] for arrays in zip(*parts, strict=True))
    return trits, fitted.astype(dtype)


@jax.jit
def proxy_loss(error, hessian) -> jax.Array:
    """diag(dW H dW') float32 [out]: the mean square error that dW [out, in] makes in each output on inputs of second moment H."""
    return jnp.sum(_matmul(error, hessian) * error, axis=1)


# --- second moments ----------------------------------------------------------------------------------------------------


def _second_moment(hessian) -> jax.Array:
    hessian = jnp.asarray(hessian, jnp.float32)
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise BadInput(
            f"second moments must be a square matrix, [in, in]; found {list(hessian.shape)}"
        )
    if not bool(jnp.isfinite(hessian).all()):
        raise BadInput(
            "the second moment of the inputs has entries that are NaN or infinite: the calibration run overflowed, or its text or weights are damaged"
        )
    return hessian


def _damp_until(solve, damping: float):
    """`solve(damping)` with the least damping, in steps of ten, whose result is finite, and that damping."""
    while damping <= MOST_DAMPING:
        result = solve(damping)
        if bool(jnp.isfinite(result).all()):
            return result, damping
        damping = max(10 * damping, 1e-6)
    raise BadInput(
        f"the second moment of the inputs is not positive semi-definite, even with {MOST_DAMPING:g} of its mean diagonal added to its diagonal: "
        "it is not of the form X'X"
    )


@jax.jit
def _damped(hessian, damping):
    mean = jnp.mean(jnp.diagonal(hessian))
    return hessian + damping * jnp.where(mean == 0, 1.0, mean) * jnp.eye(len(hessian))


@jax.jit
def _feedback(hessian, order, damping):
    """Row j, column i: R_ij / R_jj for i < j, H = R R' in the order of visits. Not finite where H is not positive definite."""
    damped = _damped(hessian, damping)[order][:, order]
    reversed_ = jnp.linalg.cholesky(
        damped[::-1, ::-1]
    )  # lower triangular; read backwards it is upper: R
    upper = reversed_[::-1, ::-1]
    return jnp.tril((upper / jnp.diagonal(upper)).T, -1)


@jax.jit
def _descent(hessian, order):
    """Row j, column i: H_ij / H_jj for i != j, in the order of visits."""
    matrix = hessian[order][:, order]
    return jnp.fill_diagonal(matrix / nonzero(jnp.diagonal(matrix))[:, None], 0.0, inplace=False)


@jax.jit
def _target(weight, hessian, cross, damping):
    cholesky = jax.scipy.linalg.cho_factor(_damped(hessian, damping))
    return weight + jax.scipy.linalg.cho_solve(cholesky, _matmul(weight, cross - hessian).T).T


# --- rows and columns --------------------------------------------------------------------------------------------------
# weight [rows, in] in the order of the matrix; target and quantized [in, rows] in the order of visits.


def _rows(array: np.ndarray, start: int, step: int) -> np.ndarray:
    """`step` rows, filled up with zeros: every chunk has the same shape."""
    part = array[start : start + step]
    return np.pad(part, [(0, step - len(part))] + [(0, 0)] * (part.ndim - 1))


@jax.jit
def _columns(rows, order):
    return rows.T[order]


def _natural(quantized, order):
    """[in, rows] in the order of visits -> [rows, in]."""
    return jnp.zeros_like(quantized).at[order].set(quantized, unique_indices=True).T


# --- one visit to all columns -------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("bases", "size", "tied"))
def _visit(target, quantized, *, matrix, scales, order, bases, size, tied):
    """Snaps each column j of [in, rows] to the level nearest to target_j + sum_i matrix[j, i] (target_i - quantized_i), which later ones then see.

    matrix [in, in] with a diagonal of zeros. scales float32 [rows, groups, N or 1].
    """
    inputs = len(target)
    block = min(BLOCK, inputs)
    group = order // size
    grid = _grid(scales, tied)
    snap = partial(_snap_tied, top=top_level(bases)) if tied else _snap_free

    def visit_block(number, carry):
        quantized, error = carry
        # The last block reaches back into the one before it: feedback finds there what it found, descent descends once more.
        start = jnp.minimum(number * block, inputs - block)
        matrix_rows, old = (lax.dynamic_slice_in_dim(a, start, block) for a in (matrix, quantized))
        within = lax.dynamic_slice_in_dim(matrix_rows, start, block, axis=1)
        wanted = lax.dynamic_slice_in_dim(target, start, block)
        asked = wanted + _matmul(
            matrix_rows, error
        )  # [block, rows], as the errors were before this block

        def visit_column(j, carry):
            new, change = carry  # change of the error: old - new
            x = asked[j] + _matmul(within[j], change)
            value = snap(x, grid[group[start + j]])
            return new.at[j].set(value), change.at[j].set(old[j] - value)

        new, _ = lax.fori_loop(0, block, visit_column, (old, jnp.zeros_like(old)))
        return (
            lax.dynamic_update_slice_in_dim(quantized, new, start, axis=0),
            lax.dynamic_update_slice_in_dim(error, wanted - new, start, axis=0),
        )

    return lax.fori_loop(0, -(-inputs // block), visit_block, (quantized, target - quantized))[0]


def _grid(scales, tied):
    """What a column needs of its group: the scale [groups, rows], or the levels that are not negative, ascending, [groups, L, rows]."""
    rows, groups, bases = scales.shape
    if tied:
        return scales[..., 0].T
    level, _, rank = ranked_levels(scales.reshape(-1, bases).T)  # [L, rows * groups]
    return ascending_levels(level, rank).reshape(-1, rows, groups).transpose(2, 0, 1)


def _snap_tied(x, least, top):
    return jnp.clip(jnp.round(x / nonzero(least)), -top, top) * least


def _snap_free(x, level):
    """x [rows], level [L, rows] ascending from 0. The highest level whose midpoint to the one below it is passed."""
    passed = jnp.abs(x) > (level[1:] + level[:-1]) / 2
    return jnp.where(x < 0, -1.0, 1.0) * jnp.max(jnp.where(passed, level[1:], 0.0), axis=0)


# --- scales ------------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("bases", "size", "tied", "dtype"))
def _refit(weight, quantized, scales, hessian, order, *, bases, size, tied, dtype):
    """Closed form: with the codes B of a row fixed, q = B s, the scales solve (B'HB) s = B'Hw. -> quantized, scales.

    A ridge toward the current scales keeps bases that no weight uses where they are. A row whose cost would not fall once its scales are rounded
    keeps them. A negative scale is made positive, and scales are sorted: the levels stay the same.
    """
    codes = _codes(_natural(quantized, order), scales, bases=bases, size=size, tied=tied)
    codes = (
        codes.astype(jnp.float32)[..., None] if tied else trits_of(codes, bases).astype(jnp.float32)
    )  # [rows, groups, size, C]
    rows, groups, _, count = codes.shape
    short = groups * size - len(hessian)
    tiles = jnp.pad(hessian, ((0, short), (0, short))).reshape(groups, size, groups, size)
    projected = group_inputs(_matmul(weight, hessian), size)

    def solve(row):
        codes, projected, current = row
        half = _einsum("gkc,gklm->gclm", codes, tiles)
        gram = _einsum("gclm,lmd->gcld", half, codes).reshape(groups * count, -1)
        right = _einsum("gkc,gk->gc", codes, projected).reshape(-1)
        current = current.reshape(-1)
        ridge = RIDGE * jnp.mean(jnp.diagonal(gram)) + 1e-30
        new = jax.scipy.linalg.solve(
            gram + ridge * jnp.eye(len(gram)), right + ridge * current, assume_a="pos"
        )
        new = jnp.where(new < 0, -1.0, 1.0) * round_scales(jnp.abs(new), dtype)

        def cost(s):  # less that of no codes at all
            return s @ _matmul(gram, s) - 2 * right @ s

        return jnp.where(cost(new) < cost(current), new, current).reshape(groups, count)

    batch = max(1, REFIT_FLOATS // (groups * count * groups * size))
    batch = min(
        rows, 1 << batch.bit_length() - 1
    )  # divides ROWS: a remainder would be compiled apart
    scales = lax.map(solve, (codes, projected, scales), batch_size=batch)
    quantized = _einsum("rgkc,rgc->rgk", codes, scales).reshape(rows, -1)[:, : len(hessian)]
    return quantized.T[order], jnp.moveaxis(
        descending_scales(jnp.moveaxis(jnp.abs(scales), -1, 0)), 0, -1
    )


# --- codes -------------------------------------------------------------------------------------------------------------


def _codes(quantized, scales, *, bases, size, tied):
    """quantized [rows, in], each on a level of its group -> int8 [rows, groups, size], the integers sum_i t_i 3^(N-1-i)."""
    groups = group_inputs(quantized, size)
    if tied:
        return jnp.clip(
            jnp.round(groups / nonzero(scales)), -top_level(bases), top_level(bases)
        ).astype(jnp.int8)
    codes = nearest_codes(jnp.abs(groups).reshape(-1, size), scales.reshape(-1, bases).T).reshape(
        groups.shape
    )
    return jnp.where(groups < 0, -codes, codes)


@partial(jax.jit, static_argnames=("bases", "size", "tied"))
def _trits(quantized, scales, order, *, bases, size, tied):
    """[in, rows] -> int8 [rows, in, bases]."""
    codes = _codes(_natural(quantized, order), scales, bases=bases, size=size, tied=tied)
    trits = trits_of(codes, bases) * (scales != 0)[:, :, None, :]
    return trits.reshape(len(scales), -1, bases)[:, : len(quantized)]
