"""Random matrices made on the device, for measuring.

Packed ones hold independent trits, each value equally often, in the layout that the GPU kernels
read. Rows repeat after BLOCK rows, so that a matrix takes no more memory while it is made than
afterwards. Scales keep a product as large as its activations.
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
    Weight,
    level_weights,
)
from atd.weights.layouts import DENSE_CODES

BLOCK = 1024


def random_weight(type: TernaryType | DenseType, seed: int, layout: str = "tiles") -> Weight:
    """Returns a `Packed` in layout tiles or words for a ternary type, a `Dense` for a dense one."""
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
    shape = min(BLOCK, rows), *of_row, 4
    values = jax.random.randint(of_codes, shape, 0, 243, jnp.uint8)  # five trits each
    codes = jax.lax.bitcast_convert_type(jnp.asarray(DENSE_CODES)[values], jnp.uint32)
    ternary = type.ternary
    levels = level_weights(ternary.bases) if ternary.tied else [1.0] * ternary.bases
    variance = 2 / 3 * sum(level**2 for level in levels)  # 2/3 of a trit
    size = 1 / math.sqrt(variance * ternary.shape[1])
    shape = ternary.scales_shape
    scales = jax.random.uniform(of_scales, shape, jnp.float32, 0.5 * size, 1.5 * size)
    return _repeat(codes, rows), scales.astype(DTYPES[ternary.dtype])


def _repeat(block: jax.Array, rows: int) -> jax.Array:
    times = -(-rows // block.shape[0])
    return jnp.tile(block, (times, *[1] * (block.ndim - 1)))[:rows]
