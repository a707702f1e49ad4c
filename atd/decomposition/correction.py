"""Corrects a weight for what the layers before it have changed in its inputs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atd.decomposition.chunks import take
from atd.decomposition.error_feedback import Factor, check_widths
from atd.decomposition.second_moments import checked_moment, matmul
from atd.errors import BadInput
from atd.parallel.workers import on_each_device, spread, workers

ROWS = 1024  # of a chunk on a CPU: LAPACK solves on one core, so that chunks share the cores


def asymmetric_target(weight, hessian, cross, factor: Factor, residual=None) -> np.ndarray:
    """Corrects a weight for what the layers before it have changed:

        W* = W + (W (C - H) + R) (H + damping mean(diag H) I)^-1

    are the weights whose outputs on the quantized model's inputs are closest to those of W on the
    dense model's, and to what a residual stream lacks that they are added to. With
    dW = W* - Q, tr(dW H dW') is the cost of Q against the dense model's outputs, less a constant
    (GPTAQ, 2504.02692, has no R).

    Args:
        weight: W, float [out, in].
        hessian: H = Xq'Xq / n [in, in], of the inputs as the quantized model has them.
        cross: C = X'Xq / n [in, in], X the dense model's inputs.
        factor: that of `hessian`, whose damping holds here too.
        residual: R = (S - Sq)'Xq / n [out, in], S the dense model's residual stream in front of
            the sum, Sq the quantized model's; None: 0.

    Returns:
        float32 [out, in].

    Raises:
        BadInput: H, C or R is not finite, or H of another width.
    """
    weight, hessian = np.asarray(weight, np.float32), checked_moment(hessian)
    check_widths(weight.shape[1], factor, hessian)
    cross = jnp.asarray(cross, jnp.float32)
    residual = np.asarray(weight[:, :0] if residual is None else residual, np.float32)
    for moment, what in ((cross, "dense and quantized inputs"), (residual, "the residual stream")):
        if not bool(jnp.isfinite(moment).all()):
            raise BadInput(f"the cross moment of {what} has entries that are NaN or infinite")
    shared = on_each_device(((cross - hessian)[:, factor.order], factor))
    each = ROWS if jax.default_backend() == "cpu" else -(-len(weight) // workers().of_all)
    count = min(each, len(weight))

    def corrected(start: int) -> tuple[np.ndarray]:
        part = slice(start, start + count)
        return (np.asarray(_corrected(take(weight, part), take(residual, part), *shared())),)

    parts = [rows for (rows,) in spread(corrected, range(0, len(weight), count))]
    return np.concatenate(parts)[: len(weight)]


@jax.jit
def _corrected(rows, residual, change, factor: Factor):
    """W* of rows [B, in]; residual: theirs of R, or [B, 0]; change: C - H, its columns in the order
    of visits.

    There H + damping = R R' = L' D^2 L with `feedback` + I = L and R_jj = D_j.
    """
    right = matmul(rows, change)
    if residual.shape[1]:
        right += residual[:, factor.order]

    def solved(right, transposed: bool):
        options = {"left_side": False, "lower": True, "unit_diagonal": True}
        return lax.linalg.triangular_solve(
            factor.feedback, right, transpose_a=transposed, **options
        )

    found = solved(solved(right, False) / jnp.square(factor.pivots), True)
    return rows.at[:, factor.order].add(found, unique_indices=True)
