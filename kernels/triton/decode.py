"""Many tokens times a packed matrix: decoded once into 16 bits, a chunk of rows at a time, and
multiplied by XLA.

A kernel writes the planes of `gemm` one after the other, W_0 | W_1 | ..., so that neighbouring
threads write neighbouring columns, and the activations are put in that order instead:

    y = sum_p W_p x_p = [W_0 | W_1 | ...] [x_0 | x_1 | ...]

For results in float32, with tied weights and one scale per row, W_p holds integers, exact in 16
bits, and the scale multiplies the sums. Otherwise it holds scaled weights rounded to 16 bits, as a
dense model has them.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels import packed, xla
from atd.kernels.triton.gemm import Units, scaled
from atd.kernels.triton.ptx import plt
from atd.kernels.triton.trits import integers_of
from atd.weights import TernaryType

ROWS, UNITS, WARPS = 16, 64, 4  # of a block


@dataclass(frozen=True)
class Geometry:
    """Some rows to decode.

    Attributes:
        of: the matrix.
        start, rows: the first row, and how many.
        exact: whether integers are written, without their scales.
        interpret: whether jax's interpreter runs the kernel, in which PTX is replaced by its twins
            in jnp.
    """

    of: Units
    start: int
    rows: int
    exact: bool
    interpret: bool = False

    @property
    def width(self) -> int:
        """Columns of a decoded row, the planes side by side."""
        return self.of.params * self.of.count


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    type: TernaryType,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies x [M, in], bfloat16 or float16, by the matrix -> [M, out] in dtype.

    Args:
        codes: the matrix in layout `tiles`.
        scales: as they are stored, [rows or 1, groups, N or 1].
        type: of the matrix [out, in].
    """
    of = Units(type)
    units, params = of.count, of.params
    x_planes = jnp.pad(x, ((0, 0), (0, units * params - x.shape[1])))
    x_planes = x_planes.reshape(-1, units, params).swapaxes(1, 2).reshape(-1, params * units)
    step = max(ROWS, packed.CHUNK_BYTES // (2 * params * units) // 128 * 128)
    exact = dtype == jnp.float32 and packed.can_be_exact(type)
    parts = [
        Geometry(of, start, min(step, type.shape[0] - start), exact, interpret)
        for start in range(0, type.shape[0], step)
    ]
    chunks = [decoded(g, codes, scales, x.dtype) for g in parts]
    y = jnp.concatenate([xla.tensor_cores(x_planes, chunk, dtype) for chunk in chunks], axis=1)
    return y * scales[:, 0, 0].astype(jnp.float32) if exact else y


def decoded(
    g: Geometry, codes: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns the rows in 16 bits [rows, planes x units]."""
    return pl.pallas_call(
        functools.partial(_kernel, g=g),
        out_shape=jax.ShapeDtypeStruct((g.rows * g.width,), dtype),
        grid=(-(-g.of.count // UNITS), -(-g.rows // ROWS)),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=g.interpret,
        name=f"ternary_decode_n{g.of.type.bases}",
    )(codes.reshape(-1), scales.reshape(-1)).reshape(g.rows, g.width)


def _kernel(codes_ref, scales_ref, out_ref, *, g: Geometry):
    of, type = g.of, g.of.type
    row = pl.program_id(1) * ROWS + lax.iota(jnp.int32, ROWS)
    at = pl.program_id(0) * UNITS + lax.iota(jnp.int32, UNITS)
    inside = (row < g.rows)[:, None] & (at < of.count)[None, :]
    once = {"eviction_policy": "evict_first"}  # codes are read once
    words = [of.word(codes_ref, g.start + row, at, v, inside, **once) for v in range(of.words)]
    integers = integers_of(words, type, out_ref.dtype, g.interpret)
    for p in range(of.params):
        value, *_ = found = integers(p)
        if not g.exact:
            value = scaled(scales_ref, type, g.start + row, at * of.params + p, found)
        place = row[:, None] * g.width + (at + p * of.count)[None, :]
        plt.store(out_ref.at[place], value.astype(out_ref.dtype), mask=inside)
