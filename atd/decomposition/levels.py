"""Levels: the sums that N scales and trits can make, and which of them is nearest to a weight.

The 3^N sums of a group are symmetric about 0, so only the L = (3^N + 1) / 2 that are not negative
matter: |w| is on the level whose number is the count of midpoints below it. Their codes, of each
pair of opposite ones the one whose first trit that is not zero is +1, are the *half codes*. Arrays
hold one column per group: scales [N, C], levels [L, C].
"""

from itertools import product

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from atd.weights import level_weights

# --- scales ---------------------------------------------------------------------------------------


def round_scales(scales, dtype: np.dtype) -> jax.Array:
    """Rounds float32 scales >= 0 as `dtype` does, but for its largest number: there is no end.

    So scales that overflow are compared with others like any scales, and if they are the best,
    `chunks.stored_scales` refuses them; as infinity they would lose to worse ones that fit. The
    result is float32. Not by a cast there and back, which XLA drops as excess precision.
    """
    if dtype.itemsize >= 4:
        return scales
    info = ml_dtypes.finfo(dtype)
    exponent = jnp.maximum(jnp.frexp(scales)[1] - 1, int(info.minexp)) - int(info.nmant)
    # Of float32's own denormals, which are flushed, nothing is left to round.
    quantum = jnp.ldexp(1.0, jnp.maximum(exponent, -126))
    return jnp.round(scales / quantum) * quantum


def nonzero(scale) -> jax.Array:
    """Returns a scale as a divisor: inf in place of 0, so that whatever is divided by it is 0."""
    return jnp.where(scale > 0, scale, jnp.inf)


def descending_scales(scales, axis: int = 0) -> jax.Array:
    """Sorts the few scales along an axis, the largest first, by compare and swap."""
    rows = list(jnp.moveaxis(scales, axis, 0))
    for last in range(len(rows) - 1, 0, -1):
        for i in range(last):
            rows[i], rows[i + 1] = (
                jnp.maximum(rows[i], rows[i + 1]),
                jnp.minimum(rows[i], rows[i + 1]),
            )
    return jnp.stack(rows, axis=axis)


# --- codes and levels -----------------------------------------------------------------------------


def top_level(bases: int) -> int:
    """Returns (3^N - 1) / 2, the largest integer of N trits: tied levels are u times -top..top."""
    return (3**bases - 1) // 2


def trits_of(integers, bases: int) -> jax.Array:
    """Writes int8 integers sum_i t_i 3^(N-1-i) as trits t int8 [..., N]."""
    digits = (integers + top_level(bases)).astype(jnp.uint8)
    return jnp.stack(
        [((digits // 3 ** (bases - 1 - i)) % 3).astype(jnp.int8) - 1 for i in range(bases)], axis=-1
    )


def half_codes(bases: int) -> np.ndarray:
    """Returns the trits of all half codes, float32 [L, N], zero first."""
    codes = np.array(list(product((-1, 0, 1), repeat=bases)))
    return codes[len(codes) // 2 :].astype(np.float32)


def ranked_levels(scales) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums up all half codes of scales [N, C].

    Returns:
        |sum| [L, C], the sign of the sum [L, C], and its rank among them by size, int32 [L, C].
    """
    signed = sum(
        code[:, None] * scale for code, scale in zip(half_codes(len(scales)).T, scales, strict=True)
    )
    level = jnp.abs(signed)
    number = jnp.arange(len(level))

    def rank(own):  # ranks by counting: for so few levels a sort is several times slower
        own_level, own_number = own
        before = (level < own_level) | ((level == own_level) & (number < own_number)[:, None])
        return jnp.sum(before, axis=0, dtype=jnp.int32)

    return level, jnp.where(signed < 0, -1.0, 1.0), lax.map(rank, (level, number))


def ascending_levels(values, rank) -> jax.Array:
    """Sorts values [L, C] of half codes by the rank [L, C] of their levels, the lowest first."""
    return jnp.put_along_axis(jnp.zeros_like(values), rank, values, axis=0, inplace=False)


def midpoints(level, rank) -> jax.Array:
    """Returns the means of neighbouring levels, [L - 1, C], ascending."""
    ascending = ascending_levels(level, rank)
    return (ascending[1:] + ascending[:-1]) / 2


def nearest_codes(magnitudes, scales) -> jax.Array:
    """Assigns each |w| to the nearest level of its group.

    Args:
        magnitudes: |w|, float32 [C, size].
        scales: float32 [N, C], descending.

    Returns:
        int8 [C, size], the trits of the level as the integer sum_i t_i 3^(N-1-i).
    """
    bases = len(scales)
    level, sign, rank = ranked_levels(scales)
    integers = sign * (half_codes(bases) @ level_weights(bases))[:, None]  # [L, C]
    ascending = ascending_levels(integers, rank).astype(jnp.int8)

    def climb(codes, step):
        midpoint, rise = step
        return codes + jnp.where(magnitudes > midpoint[:, None], rise[:, None], 0), None

    steps = midpoints(level, rank), ascending[1:] - ascending[:-1]
    return lax.scan(climb, jnp.zeros(magnitudes.shape, jnp.int8), steps)[0]
