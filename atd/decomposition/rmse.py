"""The error of a decomposition, relative to the weights."""

import jax
import jax.numpy as jnp
import numpy as np

from atd.decomposition.chunks import chunks, group_size, grouped, take
from atd.weights import Group, Ternary, Trellis, level_weights


def relative_error(weight, made: Ternary | Trellis) -> float:
    """Returns `decomposition_rmse` of a weight that was made of float [out, in]."""
    if isinstance(made, Ternary):
        return decomposition_rmse(weight, made.trits, made.scales, made.type.group)
    error, total = np.linalg.norm(weight - made.dequantize()), np.linalg.norm(weight)
    return float(error / total) if total else (np.inf if error else 0.0)


def decomposition_rmse(weight, trits, scales, group: Group) -> float:
    """Returns the root mean square error of a decomposition over that of zeros: |W - Q| / |W|.

    Args:
        weight: W, float [out, in].
        trits: int8 [out, in, N].
        scales: [rows, groups, N], or [rows, groups, 1] where tied; Q is what they and the trits
            stand for.
        group: inputs that share their scales: a size, "row" or "tensor".

    Returns:
        The ratio of the Frobenius norms; 0 for zeros met exactly, inf for zeros that are not.
    """
    bases, size = trits.shape[2], group_size(weight, group)
    weights, parts = grouped(weight, size), grouped(trits, size)
    scales = np.asarray(scales, np.float32).reshape(-1, scales.shape[2])
    if scales.shape[1] < bases:
        scales = scales * level_weights(bases)  # [groups, 1] -> [groups, N]
    scales = np.broadcast_to(scales, (len(weights), bases))
    error = total = 0.0
    for chunk in chunks(len(weights), size):
        squares = _squares(take(weights, chunk), take(parts, chunk), take(scales, chunk))
        error, total = error + float(squares[0]), total + float(squares[1])
    return float(np.sqrt(error / total)) if total else (np.inf if error else 0.0)


@jax.jit
def _squares(weight, trits, scales):
    """Sums the squares of the errors and of the weights of a chunk."""
    approximation = sum(trits[..., i] * scales[:, None, i] for i in range(trits.shape[2]))
    return jnp.square(weight - approximation).sum(), jnp.square(weight).sum()
