"""Many tokens times a packed matrix: tiles of trits become small integers or floats in registers, and tensor cores do the rest.

The parameters of a row fall apart into planes, plane p = parameters p, P + p, 2 P + p, ... with P the parameters of a
*unit*, the fewest words that hold whole cells: 20, 10, 20, 5 parameters in 1, 1, 3, 1 words for N = 1, 2, 3, 4. A tile of
a plane comes out of one tile of words, without moving anything between threads, and

    y[o, m] = sum_p sum_u W_p[o, u] x_p[u, m],            x_p[u] = x[P u + p],

so activations, which are few, are put in the order of the planes beforehand. With a scale a row W_p holds integers, exact
in 16 bits (one product a base where scales are free), and scales multiply the sums; with group scales W_p is scaled in
float32 and rounded to 16 bits. Results are summed in float32.
"""

import functools
import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels.triton.gemv import word_at
from atd.kernels.triton.ptx import plt
from atd.kernels.triton.trits import integers_of
from atd.weights import TernaryType
from atd.weights.layouts import TRITS_PER_BYTE, period

UNITS_OF_STEP = (
    16  # for any N: 64 bytes of a row are 16 units of a word, 192 of N = 3 as many of three
)


@dataclass(frozen=True)
class Tiles:
    """Rows of W, tokens, units (of a plane) of a tile, powers of two of at least 16; warps of a block, stages of loading."""

    rows: int = 64
    tokens: int = 32
    units: int = 32
    warps: int = 4
    stages: int = 2


def unit(bases: int) -> tuple[int, int]:
    """(32-bit words, parameters) of a unit of a row."""
    words = period(bases)
    return words, 4 * words // bases * TRITS_PER_BYTE


def units_of(codes: jax.Array) -> int:
    """Of a row, padding included."""
    return codes.shape[1] * UNITS_OF_STEP


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    type: TernaryType,
    tiles: Tiles,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    interpret: bool = False,
) -> jax.Array:
    """x [M, in] of 16 bits times the matrix -> [M, out] in dtype, summed in float32. codes of layout `tiles`, scales [rows, groups, N or 1]."""
    out, steps = type.shape[0], codes.shape[1]
    params = unit(type.bases)[1]
    units = -(-units_of(codes) // tiles.units) * tiles.units
    tokens = -(-x.shape[0] // tiles.tokens) * tiles.tokens
    x_planes = jnp.pad(x, ((0, tokens - x.shape[0]), (0, units * params - x.shape[1])))
    x_planes = x_planes.reshape(tokens, units, params).transpose(2, 1, 0)  # [P, units, M]
    kernel = functools.partial(
        _kernel,
        type=type,
        tiles=tiles,
        steps=steps,
        units=units,
        tokens=tokens,
        interpret=interpret,
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((tokens, out), dtype),
        grid=(-(-out // tiles.rows), tokens // tiles.tokens),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"ternary_gemm_n{type.bases}",
    )(x_planes, codes.reshape(-1), scales.reshape(-1))[: x.shape[0]]


def _kernel(
    x_ref, codes_ref, scales_ref, out_ref, *, type: TernaryType, tiles: Tiles, steps: int, units: int, tokens: int,
    interpret: bool,
):  # fmt: skip
    out = type.shape[0]
    words, params = unit(type.bases)
    rows = pl.program_id(0) * tiles.rows + lax.iota(jnp.int32, tiles.rows)
    first_token = pl.program_id(1) * tiles.tokens
    token = first_token + lax.iota(jnp.int32, tiles.tokens)
    real = rows < out
    groups, stored = type.scales_shape[1:]

    def step(i, sums):
        sums = list(sums)
        at = i * tiles.units + lax.iota(jnp.int32, tiles.units)  # units
        inside = real[:, None] & (at < steps * UNITS_OF_STEP)[None, :]
        tile = [
            plt.load(
                codes_ref.at[word_at(rows[:, None], (at * words + v)[None, :], type.bases, steps)],
                mask=inside,
                other=jnp.uint32(0),
            )
            for v in range(words)
        ]  # [rows, units] each
        integers = integers_of(tile, type, x_ref.dtype, interpret)
        for p in range(params):
            x = x_ref[p, pl.ds(i * tiles.units, tiles.units), pl.ds(first_token, tiles.tokens)]
            factors = integers(p)
            if groups > 1:
                factors = [scaled(scales_ref, type, rows, at * params + p, factors)]
            for b, w in enumerate(factors):
                sums[b] = sums[b] + plt.dot(w.astype(x_ref.dtype), x)
        return tuple(sums)

    count = stored if groups == 1 else 1
    zero = tuple(jnp.zeros((tiles.rows, tiles.tokens), jnp.float32) for _ in range(count))
    sums = lax.fori_loop(0, units // tiles.units, step, zero)
    parts = (
        sums
        if groups > 1
        else [s * scales_at(scales_ref, type, rows, b)[:, None] for b, s in enumerate(sums)]
    )
    y = functools.reduce(operator.add, parts)
    plt.store(
        out_ref.at[token[:, None], rows[None, :]],
        y.T.astype(out_ref.dtype),
        mask=real[None, :] & (token < tokens)[:, None],
    )


def scaled(
    scales_ref, type: TernaryType, rows: jax.Array, parameters: jax.Array, exact: list[jax.Array]
) -> jax.Array:
    """Weights float32 [rows, parameters] of their integers, each by the scale of its group."""
    group = lax.div(
        parameters, jnp.full(parameters.shape, type.group_size, jnp.int32)
    )  # 0 where there is one
    return functools.reduce(
        operator.add,
        [
            v.astype(jnp.float32) * scales_at(scales_ref, type, rows, b, group)
            for b, v in enumerate(exact)
        ],
    )


def scales_at(
    scales_ref, type: TernaryType, rows: jax.Array, base: int, group: jax.Array | None = None
) -> jax.Array:
    """float32 [rows] of the only group, or [rows, units] of the groups [units]; 0 beyond the matrix."""
    out, groups, stored = type.shape[0], *type.scales_shape[1:]
    at, mask = (
        (rows if type.scales_shape[0] > 1 else rows * 0) * (groups * stored) + base,
        rows < out,
    )
    if group is not None:
        at, mask = at[:, None] + group[None, :] * stored, mask[:, None] & (group < groups)[None, :]
    return plt.load(scales_ref.at[at], mask=mask, other=jnp.zeros((), scales_ref.dtype)).astype(
        jnp.float32
    )
