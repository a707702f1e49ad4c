"""What the second moment H = X'X / n of a layer's inputs says about errors of its weights.

A row w that becomes q costs (w - q) H (w - q)', the mean square error of its output. Second moments
are estimates from a few thousand tokens, and often singular; *damping* adds a share of the mean
diagonal to the diagonal.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from atd.errors import BadInput

DAMPING = 0.01  # of the mean diagonal
MOST_DAMPING = 10.0  # what needs more is no second moment

matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@jax.jit
def proxy_loss(error, hessian) -> jax.Array:
    """Returns diag(dW H dW'), the mean square error that dW makes in each output.

    Args:
        error: dW, float [out, in].
        hessian: H, float [in, in], the second moment of the inputs.

    Returns:
        float32 [out].
    """
    return jnp.sum(matmul(error, hessian) * error, axis=1)


def asymmetric_target(weight, hessian, cross, damping: float = DAMPING) -> jax.Array:
    """Corrects a weight for what the layers before it have changed in its inputs:

        W* = W + W (C - H) (H + damping mean(diag H) I)^-1

    are the weights whose outputs on the quantized model's inputs are closest to those of W on the
    dense model's. With
    dW = W* - Q, tr(dW H dW') is the cost of Q against the dense model's outputs, less a constant
    (GPTAQ, 2504.02692).

    Args:
        weight: W, float [out, in].
        hessian: H = Xq'Xq / n [in, in], of the inputs as the quantized model has them.
        cross: C = X'Xq / n [in, in], X the dense model's inputs.
        damping: relative to the mean diagonal; raised tenfold until the result is finite.

    Returns:
        float32 [out, in].

    Raises:
        BadInput: H or C is not finite, or H is no second moment.
    """
    hessian = checked_moment(hessian)
    cross = jnp.asarray(cross, jnp.float32)
    if not bool(jnp.isfinite(cross).all()):
        raise BadInput(
            "the cross moment of dense and quantized inputs has entries that are NaN or infinite"
        )
    solve = partial(_target, jnp.asarray(weight, jnp.float32), hessian, cross)
    return damp_until_finite(solve, damping)[0]


@jax.jit
def _target(weight, hessian, cross, damping):
    """W* as in `asymmetric_target`; not finite where the damped H is not positive definite."""
    cholesky = jax.scipy.linalg.cho_factor(damped(hessian, damping))
    return weight + jax.scipy.linalg.cho_solve(cholesky, matmul(weight, cross - hessian).T).T


def checked_moment(hessian) -> jax.Array:
    """Returns a second moment as float32 [in, in].

    Raises:
        BadInput: it is not square, or not finite.
    """
    hessian = jnp.asarray(hessian, jnp.float32)
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise BadInput(
            f"second moments must be a square matrix, [in, in]; found {list(hessian.shape)}"
        )
    if not bool(jnp.isfinite(hessian).all()):
        raise BadInput(
            "the second moment of the inputs has entries that are NaN or infinite: the calibration "
            "run overflowed, or its text or weights are damaged"
        )
    return hessian


@jax.jit
def damped(hessian, damping):
    """Returns H + damping mean(diag H) I."""
    mean = jnp.mean(jnp.diagonal(hessian))
    return hessian + damping * jnp.where(mean == 0, 1.0, mean) * jnp.eye(len(hessian))


def damp_until_finite(
    solve: Callable[[float], jax.Array], damping: float
) -> tuple[jax.Array, float]:
    """Returns the first finite `solve(damping)`, damping raised in steps of ten, and that damping.

    Raises:
        BadInput: no damping up to MOST_DAMPING is enough.
    """
    while damping <= MOST_DAMPING:
        result = solve(damping)
        if bool(jnp.isfinite(result).all()):
            return result, damping
        damping = max(10 * damping, 1e-6)
    raise BadInput(
        f"the second moment of the inputs is not positive semi-definite, even with "
        f"{MOST_DAMPING:g} of its mean diagonal added to its diagonal: it is not of the form X'X"
    )
