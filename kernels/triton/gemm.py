"""Some tokens times a packed matrix: tiles of trits become small numbers in registers, and tensor
cores do the rest.

A *unit* is the fewest 32-bit words of a row that hold whole cells, with P = 20, 10, 20, 5
parameters for N = 1, 2, 3, 4 (`layouts.unit`). The parameters of a row fall apart into P *planes*:
plane p holds the p-th parameter of every unit. A tile of a plane comes out of a tile of words,
without moving anything between threads, and

    y[o, m] = sum_p sum_u W_p[o, u] x_p[u, m],            x_p[u] = x[P u + p],

so activations, which are few, are put in the order of the planes beforehand. With one scale per row
W_p holds integers, exact in 16 bits (one product per base where scales are free), and scales
multiply the sums; a trellis code's filter takes the products of the bases *apart*. With group
scales W_p is scaled in float32 and rounded to 16 bits. Results are summed in float32.
"""

import functools
import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels.settings import Tiles
from atd.kernels.triton.geometry import word_at
from atd.kernels.triton.ptx import plt
from atd.kernels.triton.trits import integers_of
from atd.weights import TernaryType
from atd.weights.layouts import LAYOUTS, unit

UNITS_OF_STEP = 16  # for any N: 64 bytes of a row are 16 units of a word, 192 of N = 3 of three


@dataclass(frozen=True)
class Units:
    """A matrix as the kernels of `gemm` and `decode` see it: units of its rows.

    Attributes:
        type: of the matrix [out, in].
    """

    type: TernaryType

    @property
    def words(self) -> int:
        """32-bit words of a unit."""
        return unit(self.type.bases)[0]

    @property
    def params(self) -> int:
        """Parameters of a unit, which is the number of planes."""
        return unit(self.type.bases)[1]

    @property
    def steps(self) -> int:
        """Steps of a row in layout `tiles`."""
        return LAYOUTS["tiles"].codes_shape(*self.type.shape, self.type.bases)[1]

    @property
    def count(self) -> int:
        """Units of a row, padding included."""
        return self.steps * UNITS_OF_STEP

    def word(self, codes_ref, rows: jax.Array, units: jax.Array, v: int, mask, **options):
        """Loads word v of units [units] of rows [rows] -> uint32 [rows, units]; 0 elsewhere."""
        place = word_at(
            rows[:, None], (units * self.words + v)[None, :], self.type.bases, self.steps
        )
        return plt.load(codes_ref.at[place], mask=mask, other=jnp.uint32(0), **options)


@dataclass(frozen=True)
class Geometry:
    """One product of some tokens.

    Attributes:
        of: the matrix.
        tiles: how the work is cut into blocks of threads.
        tokens: a multiple of tiles.tokens.
        apart: whether the products of the bases are results of their own, without scales. There is
            one scale per row.
        interpret: whether jax's interpreter runs the kernel, in which PTX is replaced by its twins
            in jnp.
    """

    of: Units
    tiles: Tiles
    tokens: int
    apart: bool = False
    interpret: bool = False

    @property
    def units(self) -> int:
        """Units of a row, a multiple of tiles.units."""
        return -(-self.of.count // self.tiles.units) * self.tiles.units


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    type: TernaryType,
    tiles: Tiles,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    apart: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies x [M, in], bfloat16 or float16, by the matrix, summed in float32.

    Args:
        codes: the matrix in layout `tiles`.
        scales: as they are stored, [rows or 1, groups, N or 1].
        type: of the matrix [out, in].
        tiles: how the work is cut into blocks of threads.
        apart: for the products of the bases, without scales, which is one per row.

    Returns:
        [M, out] in dtype; apart [M, N, out].
    """
    of, out = Units(type), type.shape[0]
    g = Geometry(of, tiles, -(-x.shape[0] // tiles.tokens) * tiles.tokens, apart, interpret)
    x_planes = jnp.pad(x, ((0, g.tokens - x.shape[0]), (0, g.units * of.params - x.shape[1])))
    x_planes = x_planes.reshape(g.tokens, g.units, of.params).transpose(2, 1, 0)  # [P, units, M]
    results = type.bases if apart else 1
    y = pl.pallas_call(
        functools.partial(_kernel, g=g),
        out_shape=jax.ShapeDtypeStruct((g.tokens, results * out), dtype),
        grid=(-(-out // tiles.rows), g.tokens // tiles.tokens),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"ternary_gemm_n{type.bases}",
    )(x_planes, codes.reshape(-1), scales.reshape(-1))[: x.shape[0]]
    return y.reshape(-1, results, out) if apart else y


def _kernel(x_ref, codes_ref, scales_ref, out_ref, *, g: Geometry):
    of, tiles, type = g.of, g.tiles, g.of.type
    rows = pl.program_id(0) * tiles.rows + lax.iota(jnp.int32, tiles.rows)
    first_token = pl.program_id(1) * tiles.tokens
    token = first_token + lax.iota(jnp.int32, tiles.tokens)
    real = rows < type.shape[0]
    groups, stored = type.scales_shape[1:]

    def step(i, sums):
        sums = list(sums)
        at = i * tiles.units + lax.iota(jnp.int32, tiles.units)  # units
        inside = real[:, None] & (at < of.count)[None, :]
        words = [of.word(codes_ref, rows, at, v, inside) for v in range(of.words)]
        integers = integers_of(words, type, x_ref.dtype, g.interpret)
        for p in range(of.params):
            x = x_ref[p, pl.ds(i * tiles.units, tiles.units), pl.ds(first_token, tiles.tokens)]
            factors = integers(p)
            if groups > 1:
                factors = [scaled(scales_ref, type, rows, at * of.params + p, factors)]
            for b, w in enumerate(factors):
                sums[b] = sums[b] + plt.dot(w.astype(x_ref.dtype), x)
        return tuple(sums)

    count = stored if groups == 1 else 1
    zero = tuple(jnp.zeros((tiles.rows, tiles.tokens), jnp.float32) for _ in range(count))
    sums = lax.fori_loop(0, g.units // tiles.units, step, zero)
    if groups == 1 and not g.apart:
        scales = (_scales_at(scales_ref, type, rows, b) for b in range(count))
        sums = [s * scale[:, None] for s, scale in zip(sums, scales, strict=True)]
    for b, y in enumerate(sums if g.apart else [functools.reduce(operator.add, sums)]):
        plt.store(
            out_ref.at[token[:, None], (b * type.shape[0] + rows)[None, :]],
            y.T.astype(out_ref.dtype),
            mask=real[None, :] & (token < g.tokens)[:, None],
        )


def scaled(
    scales_ref, type: TernaryType, rows: jax.Array, parameters: jax.Array, exact: list[jax.Array]
) -> jax.Array:
    """Returns weights float32 [rows, parameters]: integers times the scales of their groups."""
    group = lax.div(parameters, jnp.full(parameters.shape, type.group_size, jnp.int32))
    terms = [
        v.astype(jnp.float32) * _scales_at(scales_ref, type, rows, b, group)
        for b, v in enumerate(exact)
    ]
    return functools.reduce(operator.add, terms)


def _scales_at(
    scales_ref, type: TernaryType, rows: jax.Array, base: int, group: jax.Array | None = None
) -> jax.Array:
    """float32 [rows] of the only group, or [rows, units] of groups [units]; 0 beyond the matrix."""
    out, groups, stored = type.shape[0], *type.scales_shape[1:]
    at = (rows if type.scales_shape[0] > 1 else rows * 0) * (groups * stored) + base
    mask = rows < out
    if group is not None:
        at, mask = at[:, None] + group[None, :] * stored, mask[:, None] & (group < groups)[None, :]
    zero = jnp.zeros((), scales_ref.dtype)
    return plt.load(scales_ref.at[at], mask=mask, other=zero).astype(jnp.float32)
