"""Error feedback with a trellis code: the visits of `atd.decomposition.error_feedback`, a column of
rows at a time.

Only the snap is another: a column's trits are found by Viterbi over its rows instead of each row by
itself (`atd.decomposition.trellis`). The first visit finds the state at the seam of each segment;
later visits keep it, so that their cost cannot rise. There is one scale per row; its first value is
the row's root mean square, for which the taps were made."""

import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import DTypeLike

from atd.decomposition.chunks import stored_scales
from atd.decomposition.error_feedback import (
    Factor,
    check_widths,
    descent_matrix,
    stored_order,
    visit_order,
)
from atd.decomposition.levels import round_scales
from atd.decomposition.second_moments import checked_moment, damped, matmul, quadratic_forms
from atd.decomposition.sweeps import sweep_columns
from atd.decomposition.trellis import Search, snap_column
from atd.decomposition.trellis_kernel import fastest_search
from atd.decomposition.trellis_walks import Walks, empty, fastest_walks
from atd.parallel.workers import on_each_device, spread, workers
from atd.weights.codes import Code

ROWS = 1024  # of a chunk on a CPU, about: wide enough for vectors, small enough for the cache
LANES = 1024  # segments, of all columns that are searched together without second moments
LEAST_SEGMENTS = 3  # of a chunk, where there are this many: vectors run over segments


def decompose(
    weight,
    factor: Factor,
    hessian,
    *,
    code: Code,
    length: int,
    dtype: DTypeLike = np.float16,
    sweeps: int = 1,
    refits: int = 2,
    importance=None,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises sum_o c_o (w_o - q_o) H (w_o - q_o)' over what the code can make of one scale per
    row.

    Feedback, `sweeps` of coordinate descent, then `refits` rounds of (scales in closed form, one
    more sweep). The scales that are stored then give each row's outputs the energy of the weights'.

    Args:
        weight: float [out, in].
        factor: that of `hessian`.
        hessian: H float32 [in, in].
        code: the code; its period divides `out` and `length`.
        length: rows per segment.
        dtype: of the scales that are stored.
        importance: c float32 [out], what errors of each row cost; None: the same in all rows. A
            trit counts in several rows, and is chosen for those that count most.

    Returns:
        (trits int8 [out / period, in, code.trits], scales `dtype` [out, 1, 1]).

    Raises:
        BadInput: weights that are not finite; a scale that overflows `dtype`; second moments of
            another width.
    """
    (weight, scales), hessian = _with_scales(weight, dtype), checked_moment(hessian)
    inputs = weight.shape[1]
    check_widths(inputs, factor, hessian)
    hessian = damped(hessian, factor.damping)
    descent = descent_matrix(hessian, factor.order)
    options = {"code": code, "length": length, "walks": fastest_walks(code)}
    shared = on_each_device((factor, hessian, descent))

    def carry(chunk: slice) -> tuple[np.ndarray, np.ndarray]:
        factor, hessian, descent = shared()
        rows, scale = weight[chunk], scales[chunk]
        target = visit_order(rows, factor.order)
        costs = None if importance is None else jnp.asarray(importance[chunk], jnp.float32)
        visit = partial(sweep, target, importance=costs, **options)
        found = visit(target, None, matrix=factor.feedback, scale=scale)
        for _ in range(sweeps):
            found = visit(*found[:2], matrix=descent, scale=scale)
        fit = {"hessian": hessian, "order": factor.order, "dtype": np.dtype(dtype)}
        projected = _product(rows, hessian)
        for _ in range(refits):
            quantized, scale = _refit(projected, found[0], scale, **fit)
            found = visit(quantized, found[1], matrix=descent, scale=scale)
        scale = _equal_energy(rows, projected, found[0], scale, **fit)
        return np.asarray(stored_order(found[2], factor.order)), np.asarray(scale)

    return _in_chunks(carry, weight, length, dtype)


def nearest(
    weight, *, code: Code, length: int, dtype: DTypeLike = np.float16, refits: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises sum (w - q)^2 over what the code can make of one scale per row: no second moments
    are needed.

    Each column is searched by itself; then `refits` rounds of (scales in closed form, search).
    Arguments, results and errors are those of `decompose`.
    """
    weight, scales = _with_scales(weight, dtype)
    options = {"code": code, "length": length, "dtype": np.dtype(dtype), "refits": refits}
    search = fastest_search(code)

    def carry(chunk: slice) -> tuple[np.ndarray, np.ndarray]:
        trits, scale = _nearest(weight[chunk], scales[chunk], search=search, **options)
        return np.asarray(trits), np.asarray(scale)

    return _in_chunks(carry, weight, length, dtype)


@partial(jax.jit, static_argnames=("code", "length", "dtype", "refits", "search"))
def _nearest(weight, scale, *, code: Code, length: int, dtype, refits: int, search: Search):
    """weight [rows, in], scale [rows] -> (trits int8 [rows / P, in, M], scales [rows])."""
    rows, inputs = weight.shape
    count = max(1, LANES // max(1, rows // length))  # columns that are searched together
    columns = jnp.pad(weight.T, ((0, -inputs % count), (0, 0))).reshape(-1, count, rows)

    def searched(scale, seams=None):
        """(trits, values, seams), [batches, count, ...] each."""
        given = (columns,) if seams is None else (columns, seams)
        snap = jax.vmap(lambda x, seam=None: snap_column(x, scale, code, length, seam, search))
        return lax.map(lambda some: snap(*some), given)

    trits, values, seams = searched(scale)
    for _ in range(refits):
        v = values.reshape(-1, rows)[:inputs].T / jnp.where(scale > 0, scale, 1.0)[:, None]
        right, gram = jnp.sum(v * weight, axis=1), jnp.sum(v * v, axis=1)
        scale = _better_scale(right, gram, scale, dtype)
        trits, values, seams = searched(scale, seams)
    return trits.reshape(-1, *trits.shape[2:])[:inputs].swapaxes(0, 1), scale


def _with_scales(weight, dtype: DTypeLike) -> tuple[np.ndarray, jax.Array]:
    """The weights in float32, and their rows' root mean squares as `dtype` stores them."""
    weight = np.asarray(weight, np.float32)
    scales = round_scales(jnp.sqrt(jnp.mean(jnp.square(weight), axis=1)), np.dtype(dtype))
    stored_scales(scales, weight, dtype)  # refused now rather than after the search
    return weight, scales


def _better_scale(right, gram, scale, dtype):
    """right / gram as `dtype` stores it, where it is positive and lowers s^2 gram - 2 s right; else
    the scale that was.
    """
    new = round_scales(right / jnp.where(gram > 0, gram, 1.0), dtype)
    lower = new * (new * gram - 2 * right) < scale * (scale * gram - 2 * right)
    return jnp.where((new > 0) & lower, new, scale)


def _in_chunks(
    carry: Callable[[slice], tuple[np.ndarray, np.ndarray]],
    weight: np.ndarray,
    length: int,
    dtype: DTypeLike,
) -> tuple[np.ndarray, np.ndarray]:
    """carry(chunk) -> (trits, scales [rows]) of all chunks, a core or device each, joined."""
    parts = spread(carry, row_chunks(len(weight), length))
    trits, fitted = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return trits, stored_scales(fitted, weight, dtype)[:, None, None]


def row_chunks(out: int, length: int) -> list[slice]:
    """Returns the rows that are worked on together: whole segments, as many in each chunk where
    that can be, since each number of rows is compiled anew; on GPUs a chunk for each.
    """
    segments = max(1, out // length)
    if jax.default_backend() == "cpu":
        most = max(1, ROWS // length)
        least = min(LEAST_SEGMENTS, segments)
        cores = os.cpu_count() or 1
        fewest = max(-(-segments // most), min(cores, segments // least))
        counts = range(fewest, max(fewest, segments // least) + 1)
        chunks = next((n for n in counts if segments % n == 0), fewest)
    else:
        chunks = min(workers().of_all, segments)
    starts = [*range(0, segments * length, -(-segments // chunks) * length)]
    return [slice(*ends) for ends in zip(starts, [*starts[1:], out], strict=True)]


@partial(jax.jit, static_argnames=("code", "length", "walks"))
def sweep(
    target,
    quantized,
    seams,
    *,
    matrix,
    scale,
    code: Code,
    length: int,
    walks: Walks,
    importance=None,
):
    """Does one sweep over all columns: `sweep_columns`, with trits of the code.

    Args:
        target, quantized, matrix: as `sweep_columns` takes them; rows are those of a chunk.
        seams: int32 [in, segments], which are kept; None: they are found.
        scale: float32 [rows].
        walks: `atd.decomposition.trellis_walks.column_by_column`, or what does the same.
        importance: float32 [rows], or None.

    Returns:
        (quantized [in, rows], seams, trits int8 [in, rows / P, M]).
    """
    inputs, rows = target.shape
    zeros, trits = empty(inputs, rows, code, length)
    kept = zeros if seams is None else seams, trits
    walk = walks(scale, code, length, importance, keep=seams is not None)
    quantized, kept = sweep_columns(target, quantized, kept, matrix=matrix, walk=walk)
    return quantized, *kept


_product = jax.jit(matmul)  # w H, [rows, in]


@partial(jax.jit, static_argnames="dtype")
def _refit(projected, quantized, scale, *, hessian, order, dtype):
    """Scales in closed form: with v = q / s fixed, s = v H w' / v H v'. -> (quantized, scales).

    A row keeps its scale where the new one is not positive, or its cost would not fall once it is
    rounded. projected: w H, [rows, in].
    """
    values = _values(quantized, scale, order)
    right = jnp.sum(values * projected, axis=1)
    kept = _better_scale(right, quadratic_forms(values, hessian), scale, dtype)
    return visit_order(values * kept[:, None], order), kept


@partial(jax.jit, static_argnames="dtype")
def _equal_energy(weight, projected, quantized, scale, *, hessian, order, dtype):
    """Scales [rows] for which s^2 v H v' = w H w', v = q / scale.

    The scale of least squares shrinks the outputs by the energy that is lost, row for row, and
    over the blocks of a model this adds up. Keeping the energy raises a row's relative error D by
    D^2 / 4 only, and lowers the divergence of the whole model.
    """
    energy = jnp.sum(weight * projected, axis=1)
    gram = quadratic_forms(_values(quantized, scale, order), hessian)
    new = round_scales(jnp.sqrt(energy / jnp.where(gram > 0, gram, 1.0)), dtype)
    return jnp.where((gram > 0) & (new > 0), new, scale)


def _values(quantized, scale, order):
    """v = q / s in the stored order of the inputs, [rows, in]."""
    return stored_order(quantized / jnp.where(scale > 0, scale, 1.0), order)
