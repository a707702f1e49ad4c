"""Very many tokens times a packed matrix: decoded once into 16 bits, chunk of rows by chunk, and multiplied by XLA.

A kernel writes the planes of `triton_gemm` one after the other, W_0 | W_1 | ..., so that neighbouring threads write
neighbouring columns, and the activations are put in that order instead:

    y = sum_p W_p x_p = [W_0 | W_1 | ...] [x_0 | x_1 | ...]

For results in float32, with tied weights and a scale a row, W_p holds integers, exact in 16 bits, and the scale multiplies
the sums. Otherwise scaled weights rounded to 16 bits, as a dense model has them: what XLA multiplies is the result.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels import packed, xla
from atd.kernels.triton.gemm import scaled, unit, units_of
from atd.kernels.triton.gemv import word_at
from atd.kernels.triton.ptx import plt
from atd.kernels.triton.trits import integers_of
from atd.weights import TernaryType

CHUNK_BYTES = (
    128 << 20
)  # of decoded weights at a time: enough for the matrix product, little beside a model
ROWS, UNITS, WARPS = 16, 64, 4  # of a block


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    type: TernaryType,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    interpret: bool = False,
) -> jax.Array:
    """x [M, in] of 16 bits times the matrix -> [M, out] in dtype. codes of layout `tiles`, scales [rows, groups, N or 1]."""
    units, params = units_of(codes), unit(type.bases)[1]
    x_planes = jnp.pad(x, ((0, 0), (0, units * params - x.shape[1])))
    x_planes = x_planes.reshape(-1, units, params).swapaxes(1, 2).reshape(-1, params * units)
    step = max(ROWS, CHUNK_BYTES // (2 * params * units) // 128 * 128)
    starts = range(0, type.shape[0], step)
    parts = [min(step, type.shape[0] - start) for start in starts]
    exact = dtype == jnp.float32 and packed.can_be_exact(type)
    chunks = [
        decoded(codes, scales, type, x.dtype, start, rows, exact, interpret=interpret)
        for start, rows in zip(starts, parts, strict=True)
    ]
    y = jnp.concatenate([xla.tensor_cores(x_planes, chunk, dtype) for chunk in chunks], axis=1)
    return y * scales[:, 0, 0].astype(jnp.float32) if exact else y


def decoded(
    codes: jax.Array,
    scales: jax.Array,
    type: TernaryType,
    dtype: jax.typing.DTypeLike,
    start: int,
    rows: int,
    exact: bool,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Rows start to start + rows of the matrix, or, exact, of its integers -> [rows, planes x units]."""
    units, params = units_of(codes), unit(type.bases)[1]
    kernel = functools.partial(
        _kernel,
        type=type,
        start=start,
        rows=rows,
        steps=codes.shape[1],
        units=units,
        exact=exact,
        interpret=interpret,
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows * params * units,), dtype),
        grid=(-(-units // UNITS), -(-rows // ROWS)),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=f"ternary_decode_n{type.bases}",
    )(codes.reshape(-1), scales.reshape(-1)).reshape(rows, params * units)


def _kernel(
    codes_ref, scales_ref, out_ref, *, type: TernaryType, start: int, rows: int, steps: int, units: int, exact: bool,
    interpret: bool,
):  # fmt: skip
    words, params = unit(type.bases)
    row = pl.program_id(1) * ROWS + lax.iota(jnp.int32, ROWS)
    at = pl.program_id(0) * UNITS + lax.iota(jnp.int32, UNITS)
    inside = (row < rows)[:, None] & (at < units)[None, :]

    def word(v: int) -> jax.Array:
        place = word_at((start + row)[:, None], (at * words + v)[None, :], type.bases, steps)
        return plt.load(
            codes_ref.at[place], mask=inside, other=jnp.uint32(0), eviction_policy="evict_first"
        )

    integers = integers_of([word(v) for v in range(words)], type, out_ref.dtype, interpret)
    for p in range(params):
        found = integers(p)
        value = found[0] if exact else scaled(scales_ref, type, start + row, at * params + p, found)
        place = row[:, None] * (params * units) + (at + p * units)[None, :]
        plt.store(out_ref.at[place], value.astype(out_ref.dtype), mask=inside)
