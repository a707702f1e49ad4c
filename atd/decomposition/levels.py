"""Levels: the sums that N scales and trits can make, and which of them is nearest to a weight.

The 3^N sums of a group are symmetric about 0, so only the L = (3^N + 1) / 2 that are not negative matter: |w| is on the
level whose number is the count of midpoints below it. Arrays hold one column a group: scales [N, C], levels [L, C].
"""

from itertools import product

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from atd.weights import level_weights


def round_scales(scales, dtype):
    """scales as `dtype` would store them, inf where it can not. Not by a cast there and back: XLA drops that as excess precision."""
    if dtype.itemsize >= 4:
        return scales
    info = ml_dtypes.finfo(dtype)
    exponent = jnp.maximum(jnp.frexp(scales)[1] - 1, int(info.minexp)) - int(info.nmant)
    # Of float32's own denormals, which are flushed, nothing is left to round.
    quantum = jnp.ldexp(1.0, jnp.maximum(exponent, -126))
    rounded = jnp.round(scales / quantum) * quantum
    return jnp.where(rounded > float(info.max), jnp.inf, rounded)


def nonzero(scale):
    """The scale as a divisor: inf in place of 0, so that whatever is divided by it is 0."""
    return jnp.where(scale > 0, scale, jnp.inf)


def descending_scales(scales):
    """Sorts [N, C] along its few rows, the largest first."""
    rows = list(scales)
    for last in range(len(rows) - 1, 0, -1):
        for i in range(last):
            rows[i], rows[i + 1] = (
                jnp.maximum(rows[i], rows[i + 1]),
                jnp.minimum(rows[i], rows[i + 1]),
            )
    return jnp.stack(rows)


def top_level(bases: int) -> int:
    """The largest sum of a tied decomposition: its levels are u * -top..top."""
    return (3**bases - 1) // 2


def trits_of(integers, bases: int):
    """int8 integers in -top..top -> trits int8 [..., N], the most significant first: integer = sum_i t_i 3^(N-1-i)."""
    digits = (integers + top_level(bases)).astype(jnp.uint8)
    return jnp.stack(
        [((digits // 3 ** (bases - 1 - i)) % 3).astype(jnp.int8) - 1 for i in range(bases)], axis=-1
    )


def half_codes(bases: int) -> np.ndarray:
    """[L, N]: zero, then of each pair of opposite codes the one whose first trit that is not zero is +1."""
    codes = np.array(list(product((-1, 0, 1), repeat=bases)))
    return codes[len(codes) // 2 :].astype(np.float32)


def ranked_levels(scales):
    """scales [N, C] -> each half code's |sum| [L, C], the sign of its sum, and its rank among them by size."""
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


def ascending_levels(values, rank):
    """values [L, C] of the half codes, those of the lowest level first."""
    return jnp.put_along_axis(jnp.zeros_like(values), rank, values, axis=0, inplace=False)


def midpoints(level, rank):
    ascending = ascending_levels(level, rank)
    return (ascending[1:] + ascending[:-1]) / 2


def nearest_codes(size, scales):
    """int8 [C, size]: the code of the level nearest to each |w|, as the integer sum_i t_i 3^(N-1-i)."""
    bases = len(scales)
    level, sign, rank = ranked_levels(scales)
    integers = sign * (half_codes(bases) @ level_weights(bases))[:, None]  # [L, C]
    ascending = ascending_levels(integers, rank).astype(jnp.int8)

    def climb(codes, step):
        midpoint, rise = step
        return codes + jnp.where(size > midpoint[:, None], rise[:, None], 0), None

    steps = midpoints(level, rank), ascending[1:] - ascending[:-1]
    return lax.scan(climb, jnp.zeros(size.shape, jnp.int8), steps)[0]
