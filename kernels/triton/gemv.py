"""Few tokens times a packed matrix: int8 tensor cores on prefixes, in Pallas for Triton.

    products[c, o] = sum_k X[c, k] prefix[o, k]              int32, exact; c a column of `fold.fold`
    y[token, o]    = sum_c 256^byte(c) scale[o, c] products[c, o] largest|x| / limit   (+ residual)

the second sum over the columns c of the token. A gate above an up matrix, rows 0 .. out/2 - 1 and
those behind them, gives silu(gate) * up: a warp has rows of both.

A warp computes 16 R rows. In a step it takes 64 bytes of each (192 for N = 3), which lie together
(layout `tiles`): thread 4 g + t takes piece t of rows g and g + 8, decodes it (two operations per
word, a multiply-add per `Half` and a byte permutation per prefix word) and multiplies two prefix
words at a time,

    mma.sync m16n8k32   A = prefix words of 16 rows, B = the same words of 8 columns of activations,

which is all that the main loop does where rows have one scale: no scale, no conversion, no offset.
With group scales each group that a step touches has columns of its own (a *slot*), and their
results are scaled in float32 after each step. Warps of a block share rows and take turns at their
steps, or have rows of their own and share activations, which then come out of the L1 cache. What
the warps found is added, scaled and written as rows of y: nothing is left to other kernels.

Tensors of a block are flat, and thread and register follow from the index: element 4 (32 w + l) + e
is register e of lane l of warp w. Triton keeps that as long as it can prove that loads are
contiguous by 4, which `//`, `%` and `minimum` on tensors would hide from it.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels.packed import Norm
from atd.kernels.prefixes import THREADS_PER_ROW
from atd.kernels.settings import Shape
from atd.kernels.triton.fold import fold
from atd.kernels.triton.geometry import ROWS, Geometry, most_tokens
from atd.kernels.triton.ptx import bits, decode, divided, multiply_add, plt
from atd.weights import TernaryType


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    type: TernaryType,
    shape: Shape,
    *,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    planes: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies as many tokens at a time as have columns.

    Args:
        x: activations [M, in].
        codes: the matrix in layout `tiles`.
        scales: as they are stored, [rows or 1, groups, N or 1].
        type: of the matrix [out, in].
        shape: how the work is cut into blocks of threads.
        norm: applied to x first.
        residual: [M, out], added to the result.
        gated: for a gate above an up matrix, silu(gate) * up; out is a multiple of 32 and there is
            no residual.
        planes: for the products of the bases, without scales.

    Returns:
        [M, out], or [M, out / 2] where it is gated, in x's dtype; of planes float32 [M, N, out].
    """
    shape = shape.paired() if gated else shape
    most = most_tokens(type, x.shape[0])
    results = []
    for start in range(0, x.shape[0], most):
        part = x[start : start + most]
        g = Geometry(type, part.shape[0], shape, gated, planes, interpret)
        folded = fold(g, part, norm)
        added = None if residual is None else residual[start : start + most]
        dtype = jnp.float32 if planes else x.dtype
        results.append(multiply(g, *folded, codes, scales, added, dtype))
    found = jnp.concatenate(results) if len(results) > 1 else results[0]
    return found.reshape(x.shape[0], -1, type.shape[0]) if planes else found


def multiply(
    g: Geometry,
    x: jax.Array,
    largest: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    residual: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Multiplies the matrix by tokens that were folded.

    Args:
        x, largest: what `fold.fold` returns for the same geometry.
        codes, scales, residual: as in `matmul`.

    Returns:
        [vectors, results] in dtype, computed in float32.
    """
    rows = g.shape.rows // 2 if g.gated else g.shape.rows
    added = [] if residual is None else [residual.reshape(-1)]
    return pl.pallas_call(
        functools.partial(_kernel, g=g),
        out_shape=jax.ShapeDtypeStruct((g.vectors * g.results,), dtype),
        grid=(-(-g.results // rows),),
        compiler_params=plt.CompilerParams(num_warps=g.shape.warps, num_stages=1),
        interpret=g.interpret,
        name=g.name,
    )(x, codes.reshape(-1), largest, scales.reshape(-1), *added).reshape(g.vectors, g.results)


def _kernel(x_ref, codes_ref, largest_ref, scales_ref, *rest, g: Geometry):
    *residual_ref, out_ref = rest
    block = _Block.of(g, x_ref, codes_ref, scales_ref)
    row_blocks, sets, grouped = g.shape.row_blocks, g.columns.sets, g.group_size is not None
    nothing = jnp.zeros((g.shape.warps * 128,), jnp.int32)

    def turn(i, carry):
        sums = list(carry)
        codes = [block.codes(i, u) for u in range(g.shape.unroll)]
        for u in range(g.shape.unroll):
            step = i * g.shape.unroll + u
            x = [block.activations(step, s) for s in range(sets)]
            for r in range(row_blocks):
                count = len(codes[u]) // row_blocks
                words = decode(g.plan, codes[u][r * count : (r + 1) * count], g.interpret)
                before = [nothing] * sets if grouped else sums[r]
                found = [multiply_add(words, x[s], before[s], g.interpret) for s in range(sets)]
                if grouped:
                    values = enumerate(block.values(found))
                    scaled = [v * block.scale(r, octet, step) for octet, v in values]
                    found = list(map(operator.add, sums[r], scaled))
                sums[r] = tuple(found)
        return tuple(sums)

    # What the end needs is on its way before the loop.
    octets = range(g.columns.octets)
    scaled_at_end = 0 if grouped or g.planes else row_blocks
    scales = [[block.scale(r, o) for o in octets] for r in range(scaled_at_end)]
    groups = range(block.result_blocks)
    ends = [_ends(g, block.first_row(r), largest_ref, residual_ref) for r in groups]

    dtype, count = (jnp.float32, g.columns.octets) if grouped else (jnp.int32, sets)
    zero = ((jnp.zeros(nothing.shape, dtype),) * count,) * row_blocks
    sums = lax.fori_loop(0, g.turns, turn, zero) if g.turns > 1 else turn(0, zero)

    def finished(r: int) -> Sequence[jax.Array]:
        """float32, by octets of columns."""
        if grouped:
            return sums[r]
        if g.planes:
            return block.values(sums[r])
        return [v * scale for v, scale in zip(block.values(sums[r]), scales[r], strict=True)]

    for r in groups:
        halves = [finished(h) for h in range(r, row_blocks, block.result_blocks)]
        for end in ends[r]:
            # In this order: the largest may be tiny.
            y, *up = (end.result(found) * (1 / g.plan.limit) * end.unit for found in halves)
            if up:
                y = y / (1 + jnp.exp(-y)) * up[0]
            for residual in end.residual:
                y = y + residual
            plt.store(out_ref.at[end.at], y.astype(out_ref.dtype), mask=end.mask)


@dataclass(frozen=True)
class _Place:
    """Row in a group and column in a set of the results in registers, int32 [warps x 128]."""

    row: jax.Array
    column: jax.Array

    @staticmethod
    def of(row_warps: int, splits: int) -> "_Place":
        """Thread 4 g + t has in register 2 row half + parity row g + 8 row half, column 2 t +
        parity."""
        index = lax.iota(jnp.int32, row_warps * splits * 128)
        row = divided(index, 128 * splits)[0] * ROWS + bits(index, 16, 8) + 8 * bits(index, 2, 2)
        return _Place(row, bits(index, 4, 4) * 2 + bits(index, 1, 2))


@dataclass(frozen=True)
class _Block:
    """What one block of threads reads, for the elements [warps x 128] of its tensors."""

    g: Geometry
    refs: tuple  # activations, codes, scales
    split: jax.Array  # which of the warps that share rows
    row_warp: jax.Array  # which of the warps with rows of their own
    in_codes: jax.Array  # of the element, in the first step's codes
    in_x: jax.Array  # in the first step's activations
    first_group: jax.Array  # of 16 rows
    place: _Place

    @staticmethod
    def of(g: Geometry, *refs) -> "_Block":
        shape, columns = g.shape, g.columns
        quads, lanes = g.plan.words // 4, columns.kept * THREADS_PER_ROW  # of a set in memory
        index = lax.iota(jnp.int32, shape.warps * 128)
        split, row_warp = bits(index, 128, shape.splits), divided(index, 128 * shape.splits)[0]
        tile = ROWS * g.plan.step_words
        in_codes = (row_warp * g.steps + split) * tile + bits(index, 1, 128)
        in_x = split * (quads * columns.sets * lanes * 4) + divided(index, 4 * lanes)[1]
        result_blocks = shape.row_blocks // 2 if g.gated else shape.row_blocks
        first_group = pl.program_id(0) * (result_blocks * shape.row_warps)
        place = _Place.of(shape.row_warps, shape.splits)
        return _Block(g, refs, split, row_warp, in_codes, in_x, first_group, place)

    @property
    def result_blocks(self) -> int:
        """Groups of rows of a warp that make results: gates, with as many up rows behind them."""
        return self.g.shape.row_blocks // 2 if self.g.gated else self.g.shape.row_blocks

    def first_tile(self, r: int):
        half, r = divmod(r, self.result_blocks)
        return self.first_group + r * self.g.shape.row_warps + half * (self.g.results // ROWS)

    def first_row(self, r: int):
        return self.first_tile(r) * ROWS

    def codes(self, i, u: int) -> tuple[jax.Array, ...]:
        """Codes of step u of turn i: by groups of rows, 4 words of a piece, rows g and g + 8."""
        g, codes_ref = self.g, self.refs[1]
        tile = ROWS * g.plan.step_words
        step = (i * g.shape.unroll + u) * g.shape.splits  # of the first warp
        return tuple(
            plt.load(
                codes_ref.at[
                    self.in_codes + ((self.first_tile(r) * g.steps + step) * tile + 128 * load)
                ],
                mask=(self.split < g.steps - step) & (self.row_warp < g.tiles - self.first_tile(r)),
                other=jnp.uint32(0),
                eviction_policy="evict_first",  # read once: the L1 is for the activations
            )
            for r in range(g.shape.row_blocks)
            for load in range(g.plan.piece_words // 2)
        )

    def activations(self, step, set_: int) -> tuple[jax.Array, ...]:
        """Activations of a step of a set of columns, four prefix words at a time."""
        columns, x_ref = self.g.columns, self.refs[0]
        quads, lanes = self.g.plan.words // 4, columns.kept * THREADS_PER_ROW
        at = self.in_x + step * (self.g.shape.splits * quads * columns.sets * lanes * 4)
        return tuple(x_ref[at + (q * columns.sets + set_) * lanes * 4] for q in range(quads))

    def scale(self, r: int, octet: int, step=0) -> jax.Array:
        """Scales float32 of the results in the registers."""
        g, scales_ref = self.g, self.refs[2]
        token, sum_, slot, _ = g.columns.of(octet, self.place.column)
        row = self.first_row(r) + self.place.row
        inside = (row < g.out) & (token < g.tokens)
        if g.group_size is not None:
            first = (step * g.shape.splits + self.split) * (THREADS_PER_ROW * g.plan.piece_params)
            slot += divided(first, g.group_size)[0]
            inside &= slot < g.groups
        per_row = g.type.scales_shape[0] > 1  # or one for all
        at = ((row * g.groups if per_row else 0) + slot) * g.plan.sums + sum_
        zero = jnp.zeros((), scales_ref.dtype)
        return plt.load(scales_ref.at[at], mask=inside, other=zero).astype(jnp.float32)

    def values(self, sums: Sequence[jax.Array]) -> list[jax.Array]:
        """Results float32 by octets of columns: of three sets of bytes, or of columns that are
        bytes."""
        columns, wide = self.g.columns, [s.astype(jnp.float32) for s in sums]
        if columns.apart:
            return [
                wide[3 * o + 2] * 65536.0 + (wide[3 * o + 1] * 256.0 + wide[3 * o])
                for o in range(columns.octets)
            ]
        byte = columns.of(0, self.place.column)[3]
        return [wide[0] * jnp.where(byte == 0, 1.0, jnp.where(byte == 1, 256.0, 65536.0))]


@dataclass(frozen=True)
class _End:
    """Some rows of y: what makes them, where they go, what multiplies them and is added."""

    result: Callable[[Sequence[jax.Array]], jax.Array]
    at: jax.Array
    mask: jax.Array
    unit: jax.Array
    residual: list[jax.Array]


def _ends(g: Geometry, first_row, largest_ref, residual_ref) -> list[_End]:
    columns, shape = g.result_columns, g.shape

    def end(result, vector, row) -> _End:
        at, mask = vector * g.results + row, (row < g.results) & (vector < g.vectors)
        if g.interpret:  # it writes back what it found where the mask is not set, and may come last
            at = jnp.where(mask, at, g.vectors * g.results)
        token = divided(vector, g.plan.sums)[0] if g.planes else vector
        if token.ndim:
            unit = plt.load(largest_ref.at[token], mask=vector < g.vectors, other=0.0)
        else:
            unit = largest_ref[token]
        read = (plt.load(ref.at[at], mask=mask, other=0.0) for ref in residual_ref)
        return _End(result, at, mask, unit, [added.astype(jnp.float32) for added in read])

    def of_rows(parts: jax.Array) -> jax.Array:
        """Adds what the warps that share rows have found: [warps x ...] -> [row warps, ...]."""
        if shape.splits == 1:
            return parts
        return parts.reshape(shape.row_warps, shape.splits, -1).sum(axis=1)

    if columns.apart and columns.coefficients == g.vectors:  # a column is a vector: as they lie
        place = _Place.of(shape.row_warps, 1)

        def of_octet(o: int, octets: Sequence[jax.Array]) -> jax.Array:
            return of_rows(octets[o]).reshape(-1)

        vectors = [columns.of(o, place.column)[0] for o in range(columns.octets)]
        return [
            end(functools.partial(of_octet, o), vector, first_row + place.row)
            for o, vector in enumerate(vectors)
        ]

    column = _Place.of(shape.row_warps, shape.splits).column

    def of_vector(vector: int, octets: Sequence[jax.Array]) -> jax.Array:
        """The sum over the vector's columns [row warps, g, row half]: within a warp first, which
        takes no memory."""
        mine = [jnp.where(columns.of(o, column)[0] == vector, v, 0.0) for o, v in enumerate(octets)]
        parts = functools.reduce(operator.add, mine).reshape(-1, 8, 4, 2, 2)
        return of_rows(parts.sum(axis=4).sum(axis=2)).reshape(rows)

    rows = (shape.row_warps, 8, 2)
    row_warp, eighth, half = (lax.broadcasted_iota(jnp.int32, rows, axis) for axis in range(3))
    row = first_row + row_warp * ROWS + eighth + 8 * half
    return [end(functools.partial(of_vector, v), jnp.int32(v), row) for v in range(g.vectors)]
