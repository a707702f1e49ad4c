"""Error feedback: trits chosen so that the errors of a row cancel in what the layer puts out.

With H = X'X / n the second moment of a layer's inputs, a row w that becomes q costs

    (w - q) H (w - q)'

Nearest assignment looks at the diagonal of H alone; here the columns are visited one after the
other, and each is rounded to the level nearest to

    x_j = w_j + sum_(i != j) (w_i - q_i) M_ij

which takes over the errors of the others as far as input j can stand in for them. M is one of two
matrices:

    error feedback (GPTQ, OBQ)              M_ij = R_ij / R_jj, H = R R' with R upper triangular.
                                            Only columns visited before count; those to come are
                                            still free to answer. This is successive cancellation of
                                            the components of (w - q) R, and gives GPTQ's q: GPTQ is
                                            written with the Cholesky factor of H^-1 = R^-T R^-1,
                                            without an inverse.
    coordinate descent (LNQ, QuantEase)     M_ij = H_ij / H_jj. All other columns stand as they are,
                                            and x_j is exactly where the cost is least in q_j. The
                                            cost can only fall.

One sweep over the columns with the first matrix starts from q = w, no error at all; sweeps with the
second start from where the one before ended. Scales are fitted beforehand (`least_squares.als`
under the diagonal of H), and may be refitted in closed form under all of H.

How it is made fast: columns go in blocks (`atd.decomposition.sweeps`); rows are cut into chunks of
equal shape, one per core or device, so that all matrices of one input width share compilations.

Sources: GPTQ 2210.17323, QuantEase 2309.01885, LNQ in GuidedQuant 2505.07004; Babai's view of GPTQ
2507.18553.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import DTypeLike

from atd.decomposition.chunks import group_size, stored_scales, take
from atd.decomposition.least_squares import RIDGE, als
from atd.decomposition.level_walks import Walks, fastest_walks, levels_of, top
from atd.decomposition.levels import (
    descending_scales,
    nearest_codes,
    nonzero,
    round_scales,
    top_level,
    trits_of,
)
from atd.decomposition.second_moments import (
    DAMPING,
    checked_moment,
    damp_until_finite,
    damped,
    matmul,
)
from atd.decomposition.sweeps import sweep_columns
from atd.errors import BadInput
from atd.parallel.workers import on_each_device, spread, workers
from atd.weights import Group
from atd.weights.groups import group_inputs

ROWS = 256  # rows of a chunk on a CPU: the errors of a block stay in its cache
REFIT_FLOATS = 1 << 20  # in the normal equations of the rows in flight: they stay near the core
REFIT_FLOATS_ON_GPU = 1 << 28  # few steps, each of which launches some dozen kernels

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Factor(NamedTuple):
    """What all linears that share an input share."""

    order: jax.Array  # int32 [in]: the order in which inputs are visited
    # float32 [in, in], strictly lower triangular, inputs in that order: [j, i] = R_ij / R_jj
    feedback: jax.Array
    pivots: jax.Array  # R_jj float32 [in], in that order
    damping: float  # relative to the mean diagonal: what was given, or the first that was enough


def factor(hessian, damping: float = DAMPING, order: bool = True) -> Factor:
    """Factorises the second moment of a layer's inputs for `decompose`.

    Where H is singular beyond what `damping` mends, damping is raised tenfold until the
    factorisation succeeds.

    Args:
        hessian: H, float [in, in]. Inputs that are always zero are allowed.
        damping: what is added to the diagonal, relative to its mean.
        order: visit inputs by descending H_jj (act-order), else as they stand.

    Raises:
        BadInput: H is not finite, or is no second moment (not positive semi-definite, however
            damped).
    """
    hessian = checked_moment(hessian)
    diagonal = jnp.diagonal(hessian)
    visits = jnp.argsort(-diagonal) if order else jnp.arange(len(diagonal))  # a stable sort
    (feedback, pivots), damping = damp_until_finite(partial(_feedback, hessian, visits), damping)
    return Factor(visits, feedback, pivots, damping)


def check_widths(inputs: int, factor: Factor, hessian) -> None:
    """Raises BadInput where second moments or their factor are of another width than weights."""
    if len(hessian) != inputs or len(factor.order) != inputs:
        raise BadInput(
            f"second moments of {len(hessian)} inputs (factor: {len(factor.order)}) for weights of "
            f"{inputs}"
        )


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
    """Decomposes a matrix with a small error in its outputs: lowers over q = sum_i s_i t_i

        sum_rows (w - q) H (w - q)'

    Scales by als under the diagonal of H; one sweep of error feedback; `sweeps` of coordinate
    descent; then `refits` rounds of scales in closed form under H and one more sweep. H counts with
    factor.damping throughout, and from the error feedback on its cost never rises. What is judged
    are scales rounded to `dtype`, and trits and scales rebuild to the bit the weights that were
    judged.

    Args:
        weight: w, float [out, in].
        factor: that of `hessian`.
        hessian: H, float [in, in].
        bases: N, 1 to 4.
        group: inputs that share their scales: a size (the last group may be ragged) or "row".
        tied: whether one scale u is stored per group, s_i = u 3^(N-1-i).
        dtype: that in which scales are stored.
        sweeps: of coordinate descent after the error feedback.
        refits: rounds of scales and one sweep each.

    Returns:
        Trits int8 [out, in, N], and scales `dtype` [out, groups, N], or u [out, groups, 1] where
        tied.

    Raises:
        BadInput: weights are not finite, a scale overflows `dtype`, or bases, group or widths
            cannot be.
    """
    weight, hessian = np.asarray(weight, np.float32), checked_moment(hessian)
    out, inputs = weight.shape
    if group == "tensor":
        raise BadInput(
            "error feedback works on rows, each with its own scales: group must be a size or "
            "'row', not 'tensor'"
        )
    check_widths(inputs, factor, hessian)
    _, scales = als(weight, bases, group, tied, dtype, feature_weights=jnp.diagonal(hessian))
    scales = np.asarray(scales, np.float32)

    hessian = damped(hessian, factor.damping)
    descent = descent_matrix(hessian, factor.order)
    options = {"bases": bases, "size": group_size(weight, group), "tied": tied}
    walks = fastest_walks(bases, tied)
    count = ROWS if jax.default_backend() == "cpu" else -(-out // workers().of_all)
    shared = on_each_device((factor, hessian, descent))

    def carry(start: int) -> tuple[np.ndarray, np.ndarray]:
        factor, hessian, descent = shared()
        chunk = slice(start, start + count)
        rows, scale = take(weight, chunk), take(scales, chunk)
        target = visit_order(rows, factor.order)
        sweep = partial(_sweep, target, order=factor.order, walks=walks, **options)
        quantized = sweep(target, matrix=factor.feedback, scales=scale)
        for _ in range(sweeps):
            quantized = sweep(quantized, matrix=descent, scales=scale)
        for _ in range(refits):
            quantized, scale = _refit(
                rows, quantized, scale, hessian, factor.order, dtype=np.dtype(dtype), **options
            )
            quantized = sweep(quantized, matrix=descent, scales=scale)
        return np.asarray(trits_on_levels(quantized, scale, factor.order, **options)), np.asarray(
            scale
        )

    parts = spread(carry, range(0, out, count))
    trits, fitted = (np.concatenate(arrays)[:out] for arrays in zip(*parts, strict=True))
    return trits, stored_scales(fitted, weight, dtype)


# --- the two matrices -----------------------------------------------------------------------------


@jax.jit
def _feedback(hessian, order, damping):
    """Row j, column i: R_ij / R_jj for i < j, H = R R' in the order of visits; and R_jj.

    Not finite where H is not positive definite.
    """
    ordered = damped(hessian, damping)[order][:, order]
    lower = jnp.linalg.cholesky(ordered[::-1, ::-1])  # read backwards it is upper: R
    upper = lower[::-1, ::-1]
    pivots = jnp.diagonal(upper)
    return jnp.tril((upper / pivots).T, -1), pivots


@jax.jit
def descent_matrix(hessian, order):
    """Returns H_ij / H_jj in row j, column i, 0 on the diagonal, in the order of visits."""
    matrix = hessian[order][:, order]
    return jnp.fill_diagonal(matrix / nonzero(jnp.diagonal(matrix))[:, None], 0.0, inplace=False)


# --- rows and columns -----------------------------------------------------------------------------
# Weights are [rows, in] as they are stored; target and quantized [in, rows] in the order of visits.


@jax.jit
def visit_order(rows, order):
    """Takes [rows, in] to [in, rows] in the order of visits."""
    return rows.T[order]


def stored_order(quantized, order):
    """Takes [in, rows, ...] in the order of visits back to [rows, in, ...]."""
    stored = jnp.zeros_like(quantized).at[order].set(quantized, unique_indices=True)
    return stored.swapaxes(0, 1)


# --- one sweep over all columns -------------------------------------------------------------------


@partial(jax.jit, static_argnames=("bases", "size", "tied", "walks"))
def _sweep(target, quantized, *, matrix, scales, order, bases, size, tied, walks: Walks):
    """Sweeps to the levels of each weight's group; scales are float32 [rows, groups, N or 1]."""
    walk = walks(levels_of(scales, tied), order // size, top(bases, tied))
    return sweep_columns(target, quantized, (), matrix=matrix, walk=walk)[0]


# --- scales refitted ------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("bases", "size", "tied", "dtype"))
def _refit(weight, quantized, scales, hessian, order, *, bases, size, tied, dtype):
    """Refits scales in closed form: q = B s with the codes B of a row fixed, (B'HB) s = B'Hw.

    A ridge toward the current scales keeps bases that no weight uses where they are. A row whose
    cost would not fall once its scales are rounded keeps them. A negative scale is made positive,
    and scales are sorted: the levels stay the same. Returns quantized [in, rows] and scales [rows,
    groups, N or 1].
    """
    codes = _codes(stored_order(quantized, order), scales, bases=bases, size=size, tied=tied)
    parts = codes[..., None] if tied else trits_of(codes, bases)
    parts = parts.astype(jnp.float32)  # [rows, groups, size, N or 1]
    rows, groups, _, count = parts.shape
    short = groups * size - len(hessian)
    tiles = jnp.pad(hessian, ((0, short), (0, short))).reshape(groups, size, groups, size)
    projected = group_inputs(matmul(weight, hessian), size)

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
            return s @ matmul(gram, s) - 2 * right @ s

        return jnp.where(cost(new) < cost(current), new, current).reshape(groups, count)

    floats = REFIT_FLOATS if jax.default_backend() == "cpu" else REFIT_FLOATS_ON_GPU
    batch = max(1, floats // (groups * count * groups * size))
    # Divides ROWS: a remainder would be compiled apart.
    batch = min(rows, 1 << batch.bit_length() - 1)
    scales = lax.map(solve, (parts, projected, scales), batch_size=batch)
    quantized = _einsum("rgkc,rgc->rgk", parts, scales).reshape(rows, -1)[:, : len(hessian)]
    return quantized.T[order], descending_scales(jnp.abs(scales), axis=-1)


# --- codes ----------------------------------------------------------------------------------------


def _codes(quantized, scales, *, bases, size, tied):
    """The integers sum_i t_i 3^(N-1-i) of weights [rows, in], int8 [rows, groups, size]."""
    groups = group_inputs(quantized, size)
    if tied:
        top = top_level(bases)
        return jnp.clip(jnp.round(groups / nonzero(scales)), -top, top).astype(jnp.int8)
    magnitudes = jnp.abs(groups).reshape(-1, size)
    codes = nearest_codes(magnitudes, scales.reshape(-1, bases).T).reshape(groups.shape)
    return jnp.where(groups < 0, -codes, codes)


@partial(jax.jit, static_argnames=("bases", "size", "tied"))
def trits_on_levels(quantized, scales, order, *, bases, size, tied):
    """Returns the trits int8 [rows, in, N] of quantized [in, rows]."""
    codes = _codes(stored_order(quantized, order), scales, bases=bases, size=size, tied=tied)
    trits = trits_of(codes, bases) * (scales != 0)[:, :, None, :]
    return trits.reshape(len(scales), -1, bases)[:, : len(quantized)]
