"""Products with weights that have a trellis code: planes of trits, and the code's filter behind
them.

The M planes of a code are what the bases of free scales are, M sums over the same codes: the
kernels for those multiply, without scales. What they find is as small as the outputs; the filter of
it is left to XLA, which fuses it with what comes next.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp

from atd.kernels import packed, xla
from atd.weights import Packed, PackedType, TernaryType, TrellisType
from atd.weights.layouts import TILE_ROWS


def planes_type(type: TrellisType) -> TernaryType:
    """Returns the type that kernels for free scales multiply by: [out / P, in] of M bases."""
    rows, inputs, planes = type.trits_shape
    return TernaryType((rows, inputs), planes, "row", False, type.dtype)


def decode_once(x: jax.Array, weight: Packed) -> jax.Array:
    """Multiplies x [M, in] by weight [out, in] in x's 16 bits -> float32 [M, out].

    XLA decodes whole segments of rows at a time. The layout is `tiles`.
    """
    type = weight.type.ternary
    assert isinstance(type, TrellisType)
    assert weight.type.layout == "tiles"
    (out, inputs), period = type.shape, type.code.period
    alike = math.lcm(type.segment, TILE_ROWS * period)  # rows after which segments and tiles begin
    step = max(1, packed.CHUNK_BYTES // (2 * inputs * alike)) * alike
    starts = [step * i for i in range(max(1, out // step))]
    results = []
    for start, stop in zip(starts, [*starts[1:], out], strict=True):
        tiles = slice(start // period // TILE_ROWS, -(-stop // period // TILE_ROWS))
        part = PackedType(replace(type, shape=(stop - start, inputs)), "tiles")
        rows = Packed(weight.codes[tiles], weight.scales[start:stop], part)
        decoded = jnp.asarray(rows.dequantize(jnp.float32)).astype(x.dtype)
        results.append(xla.tensor_cores(x, decoded))
    return jnp.concatenate(results, axis=1)
