"""Random matrices made on the device, for measuring.

Packed ones hold independent trits, each value equally often, in a layout of dense bytes. Rows
repeat after BLOCK rows, so that a matrix takes no more memory while it is made than afterwards.
Scales keep a product as large as its activations.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from atd.weights import (
    DTYPES,
    Dense,
    DenseType,
    Packed,
    PackedType,
    TernaryType,
    TrellisType,
    Weight,
    level_weights,
)
from atd.weights.layouts import DENSE_CODES, LAYOUTS

BLOCK = 1024


def random_weight(
    type: TernaryType | TrellisType | DenseType, seed: int, layout: str = "tiles"
) -> Weight:
    """Returns a `Packed` for a type of trits, a `Dense` for a dense one.

    Args:
        type: of the weight.
        seed: other seeds make other values.
        layout: of what is packed, one with dense bytes: tiles, words, aligned or interleaved.
    """
    key = jax.random.key(seed, impl="rbg")  # compiles at once, and runs as fast as memory takes it
    if isinstance(type, DenseType):
        return Dense(_normal(key, type))
    packed = PackedType(type, layout)
    return Packed(*_codes_and_scales(key, packed), packed)


@partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, type: DenseType) -> jax.Array:
    size = 1 / math.sqrt(type.shape[-1])
    block = size * jax.random.normal(key, (min(BLOCK, type.shape[0]), *type.shape[1:]), jnp.float32)
    return _repeat(block.astype(DTYPES[type.dtype]), type.shape[0])


@partial(jax.jit, static_argnums=1)
def _codes_and_scales(key: jax.Array, type: PackedType) -> tuple[jax.Array, jax.Array]:
    of_codes, of_scales = jax.random.split(key)
    rows, *of_row = type.codes_shape
    dtype = LAYOUTS[type.layout].dtype
    shape = min(BLOCK, rows), *of_row, dtype.itemsize
    values = jax.random.randint(of_codes, shape, 0, 243, jnp.uint8)  # five trits each
    codes = jnp.asarray(DENSE_CODES)[values].view(dtype)[..., 0]
    ternary = type.ternary
    size = 1 / math.sqrt(_variance(ternary) * ternary.shape[1])
    shape = ternary.scales_shape
    scales = jax.random.uniform(of_scales, shape, jnp.float32, 0.5 * size, 1.5 * size)
    return _repeat(codes, rows), scales.astype(DTYPES[ternary.dtype])


def _variance(type: TernaryType | TrellisType) -> float:
    """The variance of a weight in units of its scale."""
    if isinstance(type, TrellisType):
        taps = [tap for phase in type.code.taps for trit in phase for tap in trit]
        count = type.code.period
    else:
        taps, count = level_weights(type.bases) if type.tied else [1.0] * type.bases, 1
    return 2 / 3 * sum(tap**2 for tap in taps) / count  # 2/3 of a trit


def _repeat(block: jax.Array, rows: int) -> jax.Array:
    times = -(-rows // block.shape[0])
    return jnp.tile(block, (times, *[1] * (block.ndim - 1)))[:rows]
