"""Many tokens times a packed matrix: tiles of trits become small integers or floats in registers, and tensor cores do the rest.

The parameters of a row fall apart into planes, plane p = parameters p, P + p, 2 P + p, ... with P the parameters of a
*unit*, the fewest words that hold whole cells: 20, 10, 20, 5 parameters in 1, 1, 3, 1 words for N = 1, 2, 3, 4. A tile of
a plane comes out of one tile of words, without moving anything between threads, and

    y[o, m] = sum_p sum_u W_p[o, u] x_p[u, m],            x_p[u] = x[P u + p],

so activations, which are few, are put in the order of the planes beforehand. With a scale a row W_p holds integers, exact
in 16 bits (one product a base where scales are free), and scales multiply the sums; with group scales W_p is scaled in
float32 and split in two 16-bit parts. Activations in float32 are split likewise; results are summed in float32.
"""

import functools
import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels.packed import split
from atd.kernels.prefixes import period
from atd.kernels.triton_gemv import plt
from atd.layout import TRITS_PER_BYTE
from atd.weights import TernaryType, level_weights


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


def matmul(
    x: jax.Array, codes: jax.Array, scales: jax.Array, type: TernaryType, tiles: Tiles, *, interpret: bool = False
) -> jax.Array:
    """x [M, in] times the matrix -> float32 [M, out]. codes uint32 [out, row words], scales [rows, groups, N or 1]."""
    out, row_words = codes.shape
    words, params = unit(type.bases)
    units = -(-(row_words // words) // tiles.units) * tiles.units
    tokens = -(-x.shape[0] // tiles.tokens) * tiles.tokens
    factors = jnp.stack(split(x) if x.dtype == jnp.float32 else [x])  # [parts, M, in]
    x_planes = jnp.pad(factors, ((0, 0), (0, tokens - x.shape[0]), (0, units * params - x.shape[1])))
    x_planes = x_planes.reshape(-1, tokens, units, params).transpose(0, 3, 2, 1)  # [parts, P, units, M]
    kernel = functools.partial(
        _kernel, type=type, tiles=tiles, parts=x_planes.shape[0], row_words=row_words, units=units, tokens=tokens
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((tokens, out), jnp.float32),
        grid=(-(-out // tiles.rows), tokens // tiles.tokens),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"ternary_gemm_n{type.bases}",
    )(x_planes, codes.reshape(-1), scales.reshape(-1))[: x.shape[0]]


def _kernel(x_ref, codes_ref, scales_ref, out_ref, *, type: TernaryType, tiles: Tiles, parts, row_words, units, tokens):
    out = type.shape[0]
    words, params = unit(type.bases)
    rows = pl.program_id(0) * tiles.rows + lax.iota(jnp.int32, tiles.rows)
    first_token = pl.program_id(1) * tiles.tokens
    token = first_token + lax.iota(jnp.int32, tiles.tokens)
    real = rows < out
    dtype = x_ref.dtype
    groups, stored = type.scales_shape[1:]
    scale_row = (rows if type.scales_shape[0] > 1 else rows * 0) * (groups * stored)

    def scales(base: int, group: jax.Array | None = None) -> jax.Array:
        """float32 [rows] of the only group, or [rows, units] of the groups [units]."""
        at, mask = scale_row + base, real
        if group is not None:
            at, mask = at[:, None] + group[None, :] * stored, real[:, None] & (group < groups)[None, :]
        return plt.load(scales_ref.at[at], mask=mask, other=jnp.zeros((), scales_ref.dtype)).astype(jnp.float32)

    def step(i, sums):
        sums = list(sums)
        at = i * tiles.units + lax.iota(jnp.int32, tiles.units)  # units
        inside = real[:, None] & ((at * words) < row_words)[None, :]
        tile = [
            plt.load(
                codes_ref.at[rows[:, None] * row_words + (at * words + v)[None, :]], mask=inside, other=jnp.uint32(0)
            )
            for v in range(words)
        ]  # [rows, units] each
        trits = _trits(tile, type.bases)
        for p in range(params):
            x = [
                x_ref[part, p, pl.ds(i * tiles.units, tiles.units), pl.ds(first_token, tiles.tokens)]
                for part in range(parts)
            ]
            if groups == 1:
                factors = [[v.astype(dtype)] for v in _exact(trits, p, type)]
            else:
                group = lax.div(at * params + p, jnp.full(at.shape, type.group_size, jnp.int32))
                value = sum(v.astype(jnp.float32) * scales(b, group) for b, v in enumerate(_exact(trits, p, type)))
                factors = [split(jnp.asarray(value), dtype)]
            for b, w in enumerate(factors):
                for k, w_part in enumerate(w):
                    for n, x_part in enumerate(x):
                        if k + n < 2:  # the product of both low parts is below what is kept
                            sums[b] = sums[b] + plt.dot(w_part, x_part)
        return tuple(sums)

    count = stored if groups == 1 else 1
    zero = tuple(jnp.zeros((tiles.rows, tiles.tokens), jnp.float32) for _ in range(count))
    sums = lax.fori_loop(0, units // tiles.units, step, zero)
    scaled = sums if groups > 1 else [s * scales(b)[:, None] for b, s in enumerate(sums)]
    y = functools.reduce(operator.add, scaled)
    plt.store(out_ref.at[token[:, None], rows[None, :]], y.T, mask=real[None, :] & (token < tokens)[:, None])


def _trits(tile: list[jax.Array], bases: int):
    """Words of a unit [...] -> trit(parameter, base), int32 [...]."""
    digits: dict[tuple[int, int], jax.Array] = {}
    for byte in range(4 * len(tile)):
        rest = ((tile[byte // 4] >> (8 * (byte % 4))) & 255).astype(jnp.int32)
        for j in range(TRITS_PER_BYTE):
            rest = rest * 3
            digits[byte, j] = (rest >> 8) - 1
            rest = rest & 255

    def trit(parameter: int, base: int) -> jax.Array:
        cell, within = divmod(parameter, TRITS_PER_BYTE)
        byte, j = divmod(within * bases + base, TRITS_PER_BYTE)
        return digits[cell * bases + byte, j]

    return trit


def _exact(trit, parameter: int, type: TernaryType) -> list[jax.Array]:
    """The integers that scales multiply: one for tied weights, one a base for free ones."""
    trits = [trit(parameter, base) for base in range(type.bases)]
    if not type.tied:
        return trits
    return [functools.reduce(operator.add, [t * int(n) for t, n in zip(trits, level_weights(type.bases), strict=True)])]
