"""Many tokens times a packed matrix: decoded once into 16 bits, a chunk of rows at a time, and
multiplied by XLA.

A kernel writes the planes of `gemm` one after the other, W_0 | W_1 | ..., so that neighbouring
threads write neighbouring columns, and the activations are put in that order instead:

    y = sum_p W_p x_p = [W_0 | W_1 | ...] [x_0 | x_1 | ...]

For results in float32, with tied weights and one scale per row, W_p holds integers, exact in 16
bits, and the scale multiplies the sums. Otherwise it holds scaled weights rounded to 16 bits, as a
dense model has them. With a trellis code each row is made of the words of all rows of its segment
whose trits count in it.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels import packed, xla
from atd.kernels.trellis import planes_type
from atd.kernels.triton.floats import multiply_add, wide
from atd.kernels.triton.gemm import Units, scaled
from atd.kernels.triton.ptx import divided, plt
from atd.kernels.triton.trits import integers_of
from atd.weights import TernaryType, TrellisType

ROWS, UNITS, WARPS = 16, 64, 4  # of a block


@dataclass(frozen=True)
class Geometry:
    """Some rows to decode.

    Attributes:
        of: the matrix, or the planes of one with a trellis code.
        start, rows: the first row of `of`, and how many.
        coded: the matrix's own type, if it has a trellis code. P rows are decoded of each of `of`.
        exact: whether integers are written, without their scales.
        interpret: whether jax's interpreter runs the kernel, in which PTX is replaced by its twins
            in jnp.
    """

    of: Units
    start: int
    rows: int
    coded: TrellisType | None = None
    exact: bool = False
    interpret: bool = False

    @property
    def width(self) -> int:
        """Columns of a decoded row, the planes side by side."""
        return self.of.params * self.of.count


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    type: TernaryType | TrellisType,
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
    coded = type if isinstance(type, TrellisType) else None
    period = coded.code.period if coded else 1
    of = Units(planes_type(type) if isinstance(type, TrellisType) else type)
    units, params, rows = of.count, of.params, of.type.shape[0]
    x_planes = jnp.pad(x, ((0, 0), (0, units * params - x.shape[1])))
    x_planes = x_planes.reshape(-1, units, params).swapaxes(1, 2).reshape(-1, params * units)
    step = max(ROWS, packed.CHUNK_BYTES // (2 * params * units * period) // 128 * 128)
    exact = dtype == jnp.float32 and packed.can_be_exact(of.type)
    parts = [
        Geometry(of, start, min(step, rows - start), coded, exact, interpret)
        for start in range(0, rows, step)
    ]
    chunks = [decoded(g, codes, scales, x.dtype) for g in parts]
    y = jnp.concatenate([xla.tensor_cores(x_planes, chunk, dtype) for chunk in chunks], axis=1)
    return y * scales[:, 0, 0].astype(jnp.float32) if exact else y


def decoded(
    g: Geometry, codes: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns the rows in 16 bits [rows, planes x units]."""
    rows = g.rows * (g.coded.code.period if g.coded else 1)
    return pl.pallas_call(
        functools.partial(_kernel_of_code if g.coded else _kernel, g=g),
        out_shape=jax.ShapeDtypeStruct((rows * g.width,), dtype),
        grid=(-(-g.of.count // UNITS), -(-g.rows // ROWS)),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=g.interpret,
        name=f"ternary_decode_n{g.of.type.bases}",
    )(codes.reshape(-1), scales.reshape(-1)).reshape(rows, g.width)


def _kernel(codes_ref, scales_ref, out_ref, *, g: Geometry):
    of, type = g.of, g.of.type
    row, at, inside = _place(g)
    once = {"eviction_policy": "evict_first"}  # codes are read once
    words = [of.word(codes_ref, g.start + row, at, v, inside, **once) for v in range(of.words)]
    integers = integers_of(words, type, out_ref.dtype, g.interpret)
    for p in range(of.params):
        value, *_ = found = integers(p)
        if not g.exact:
            value = scaled(scales_ref, type, g.start + row, at * of.params + p, found)
        place = row[:, None] * g.width + (at + p * of.count)[None, :]
        plt.store(out_ref.at[place], value.astype(out_ref.dtype), mask=inside)


def _place(g: Geometry) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rows from g.start on, units, which [rows, units] there are) of a block."""
    row = pl.program_id(1) * ROWS + lax.iota(jnp.int32, ROWS)
    at = pl.program_id(0) * UNITS + lax.iota(jnp.int32, UNITS)
    return row, at, (row < g.rows)[:, None] & (at < g.of.count)[None, :]


def _kernel_of_code(codes_ref, scales_ref, out_ref, *, g: Geometry):
    """sum_(j, i) a[p, i, j] t_i[o - j]: a trit of phase p counts in row p + j of its period's P, or
    of a period below."""
    assert g.coded is not None
    of, code, period = g.of, g.coded.code, g.coded.code.period
    row, at, inside = _place(g)
    segment = g.coded.segment // period
    begin = divided(g.start + row, segment)[0] * segment
    length = jnp.minimum(of.type.shape[0] - begin, segment)

    def trits_above(down: int) -> Callable[[int], list[jax.Array]]:
        """Those of the row this far above, in the same segment: parameter -> by plane."""
        here = g.start + row - begin - down
        rows = begin + jnp.where(here < 0, here + length, here)
        words = [of.word(codes_ref, rows, at, v, inside) for v in range(of.words)]
        return integers_of(words, of.type, jnp.bfloat16, g.interpret)

    above = [trits_above(down) for down in range((period - 1 + code.memory) // period + 1)]
    scales = [
        plt.load(scales_ref.at[(g.start + row) * period + i], mask=row < g.rows, other=0)
        for i in range(period)
    ]
    for p in range(of.params):
        trits = [[wide(t, g.interpret) for t in integers(p)] for integers in above]
        values = [jnp.zeros(inside.shape, jnp.float32)] * period
        for (phase, taps), age in itertools.product(enumerate(code.taps), range(code.memory + 1)):
            down, into = divmod(phase + age, period)
            for i, tap in ((i, t[age]) for i, t in enumerate(taps) if age < len(t)):
                trit = trits[down][code.first[phase] + i]
                values[into] = multiply_add(trit, jnp.float32(tap), values[into], g.interpret)
        for i, (value, scale) in enumerate(zip(values, scales, strict=True)):
            scaled_value = value * scale.astype(jnp.float32)[:, None]
            place = ((row * period + i) * g.width)[:, None] + (at + p * of.count)[None, :]
            plt.store(out_ref.at[place], scaled_value.astype(out_ref.dtype), mask=inside)
