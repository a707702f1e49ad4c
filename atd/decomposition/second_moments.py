"""What the second moment H = X'X / n of a layer's inputs says about errors of its weights.

A row w that becomes q costs (w - q) H (w - q)', the mean square error of its output. Second moments
are estimates from a few thousand tokens, and often singular; *damping* adds a share of the mean
diagonal to the diagonal.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atd.errors import BadInput

DAMPING = 0.01  # of the mean diagonal
MOST_DAMPING = 10.0  # what needs more is no second moment
STRIPS, LEAST_STRIP = 8, 256  # of a symmetric matrix of which one half is enough; their width

matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _strips(inputs: int) -> list[tuple[int, int]]:
    """(start, stop) of the strips of a symmetric matrix."""
    width = -(-inputs // max(1, min(STRIPS, inputs // LEAST_STRIP)))
    return [(start, min(start + width, inputs)) for start in range(0, inputs, width)]


def upper_products(x) -> list[jax.Array]:
    """Returns X'X in strips of rows, each from its diagonal on: about half of the products.

    Args:
        x: X, float [n, in].

    Returns:
        float32 [width, in - start] each; `symmetric` puts them together.
    """
    return [matmul(x[:, start:stop].T, x[:, start:]) for start, stop in _strips(x.shape[1])]


def symmetric(strips: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the symmetric matrix float32 [in, in] of which these are the strips of rows, each
    from its diagonal on.
    """
    inputs = strips[0].shape[1]
    whole, start = np.empty((inputs, inputs), np.float32), 0
    for strip in strips:
        stop = start + len(strip)
        whole[start:stop, start:] = strip
        whole[stop:, start:stop] = whole[start:stop, stop:].T
        start = stop
    return whole


def quadratic_forms(rows, hessian):
    """Returns diag(V H V') of rows V, from the upper half of H: about half of the products.

    Args:
        rows: V, float [R, in].
        hessian: H, float [in, in], symmetric.

    Returns:
        float32 [R].
    """
    total = jnp.zeros(len(rows), jnp.float32)
    for start, stop in _strips(rows.shape[1]):
        strip, columns = rows[:, start:stop], hessian[:, start:stop]
        product = matmul(strip, columns[start:stop])
        if start:  # what stands above counts for what stands on the left as well
            product += 2 * matmul(rows[:, :start], columns[:start])
        total += jnp.sum(product * strip, axis=1)
    return total


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
    solve: Callable[[float], tuple[jax.Array, ...]], damping: float
) -> tuple[tuple[jax.Array, ...], float]:
    """Returns the first `solve(damping)` of finite arrays, damping raised in steps of ten, and that
    damping.

    Raises:
        BadInput: no damping up to MOST_DAMPING is enough.
    """
    while damping <= MOST_DAMPING:
        result = solve(damping)
        if all(bool(jnp.isfinite(array).all()) for array in result):
            return result, damping
        damping = max(10 * damping, 1e-6)
    raise BadInput(
        f"the second moment of the inputs is not positive semi-definite, even with "
        f"{MOST_DAMPING:g} of its mean diagonal added to its diagonal: it is not of the form X'X"
    )
