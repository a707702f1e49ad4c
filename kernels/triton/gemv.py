"""Few tokens times a packed matrix: int8 tensor cores on prefixes, in Pallas for Triton.

    products[c, o] = sum_k X[c, k] prefix[o, k]                         int32, exact; c a column of `triton_fold.fold`
    y[token, o]    = sum_c 256^byte(c) scale[o, c] products[c, o] largest|x| / limit   (+ residual), c of the token

Gate and up in one matrix, rows 0 .. out/2 - 1 and those behind them, give silu(gate) * up: a warp has rows of both.

A warp computes 16 R rows. In a step it takes 64 bytes of each (192 for N = 3), which lie together (layout `tiles`): thread
4 g + t takes piece t of rows g and g + 8, decodes it (two operations a word, a multiply-add a `Half`, a byte permutation a
prefix word) and multiplies two prefix words at a time,

    mma.sync m16n8k32   A = prefix words of 16 rows, B = the same words of 8 columns of activations,

which is all that the main loop does where rows have one scale: no scale, no conversion, no offset. With group scales each
group that a step touches has columns of its own (a *slot*), and their results are scaled in float32 after each step. Warps
of a block share rows and take turns at their steps, or have rows of their own and share activations, which then come out
of the L1. What the warps found is added, scaled and written as rows of y: nothing is left to other kernels.

Tensors of a block are flat, and thread and register follow from the index: element 4 (32 w + l) + e is register e of lane l
of warp w. Triton keeps that as long as it can prove that loads are contiguous by 4, which `//`, `%` and `minimum` on
tensors would hide from it.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels.prefixes import Plan, slots_of
from atd.kernels.triton.ptx import bits, decode, divided, multiply_add, plt
from atd.weights.layouts import LOAD_WORDS, THREADS_A_ROW, period

ROWS, SET = 16, 8  # of one matrix instruction: rows, and columns
BYTES = 3  # of a coefficient
MOST_SETS = 6  # 4 sums a thread each, and so many activations
MOST_WARPS = 16


@dataclass(frozen=True)
class Columns:
    """Where activations lie: a token has `sums` x `slots` coefficients a parameter, of three bytes each, in sets of 8 columns.

    Column (token, sum, slot, byte) of one set where all fit, else column (token, sum, slot) of three sets, a byte each.
    """

    tokens: int
    sums: int
    slots: int = 1  # scale groups that a step can touch

    @property
    def coefficients(self) -> int:
        return self.tokens * self.sums * self.slots

    @property
    def apart(self) -> bool:
        """Whether each byte has sets of its own."""
        return BYTES * self.coefficients > SET

    @property
    def octets(self) -> int:
        return -(-self.coefficients // SET)

    @property
    def sets(self) -> int:
        return BYTES * self.octets if self.apart else 1

    @property
    def kept(self) -> int:
        """Columns of a set in memory, a power of two; those that are missing are read again."""
        return pl.next_power_of_2(
            min(SET, self.coefficients if self.apart else BYTES * self.coefficients)
        )

    def of(self, octet, column: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(token, sum, slot, byte) of a column of an octet's sets. Byte: where they are not `apart`. Tokens may be too many."""
        rest, byte = (column + octet * SET, column * 0) if self.apart else divided(column, BYTES)
        rest, slot = divided(rest, self.slots)
        token, sum_ = divided(rest, self.sums)
        return token, sum_, slot, byte


def columns(plan: Plan, tokens: int, steps: int, group_size: int | None) -> Columns:
    """Of so many tokens; group_size None: one scale a row."""
    return Columns(
        tokens, plan.sums, 1 if group_size is None else slots_of(plan, steps, group_size)[1]
    )


@dataclass(frozen=True)
class Shape:
    """How the work is cut: warps of a block; of these, how many have rows of their own, the others share them; groups of 16
    rows of a warp that share its activations; steps of a warp in a turn of the loop. Powers of two."""

    warps: int = 4
    row_warps: int = 1
    row_blocks: int = 1
    unroll: int = 1

    @property
    def splits(self) -> int:
        """Warps that take turns at the steps of a row."""
        return self.warps // self.row_warps

    @property
    def rows(self) -> int:
        """Of a block."""
        return ROWS * self.row_blocks * self.row_warps

    def paired(self) -> "Shape":
        """That a warp has rows of two halves of the matrix: twice the rows, so half as many steps in a turn of the loop, and as
        many more warps to share them."""
        if self.row_blocks > 1:
            return self
        warps = min(MOST_WARPS, 2 * self.warps)
        return replace(self, row_blocks=2, warps=warps, unroll=max(1, self.unroll // 2))

    def padded(self, steps: int) -> int:
        """Steps that the warps of a block take together, the last turn of its loop full."""
        return -(-steps // (self.splits * self.unroll)) * self.splits * self.unroll


def multiply(
    plan: Plan,
    folded: tuple[jax.Array, jax.Array],
    codes: jax.Array,
    scales: jax.Array,
    out: int,
    columns: Columns,
    group_size: int | None = None,
    residual: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    gated: bool = False,
    shape: Shape,
    interpret: bool = False,
) -> jax.Array:
    """y [M, out] in dtype, plus the residual [M, out]: the matrix times the tokens that were folded, in float32.

    gated: silu(gate) * up [M, out / 2] instead, out / 2 a multiple of 16, in a shape that is `paired`; no residual.

    folded: of `triton_fold.fold`, for `shape.padded(steps)` steps and these columns. codes: of layout `tiles`. scales [rows or
    1, groups, sums] as they are stored, of groups of group_size, None for one a row.
    """
    x, largest = folded
    tiles, steps = codes.shape[:2]
    results, rows = (out // 2, shape.rows // 2) if gated else (out, shape.rows)
    kernel = functools.partial(
        _kernel, plan=plan, shape=shape, columns=columns, out=out, tiles=tiles, steps=steps, groups=scales.shape[1],
        group_size=group_size, gated=gated, turns=shape.padded(steps) // (shape.splits * shape.unroll), interpret=interpret,
    )  # fmt: skip
    added = [] if residual is None else [residual.reshape(-1)]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((columns.tokens * results,), dtype),
        grid=(-(-results // rows),),
        compiler_params=plt.CompilerParams(num_warps=shape.warps, num_stages=1),
        interpret=interpret,
        name=name(plan, columns),
    )(x, codes.reshape(-1), largest, scales.reshape(-1), *added).reshape(columns.tokens, results)


def name(plan: Plan, columns: Columns) -> str:
    """The kernel's."""
    return f"ternary_gemv_n{plan.bases}{'tied' if plan.tied else 'free'}_c{columns.sets * columns.kept}"


def _kernel(
    x_ref, codes_ref, largest_ref, scales_ref, *rest, plan: Plan, shape: Shape, columns: Columns, out: int, tiles: int,
    steps: int, groups: int, group_size: int | None, gated: bool, turns: int, interpret: bool,
):  # fmt: skip
    *residual_ref, out_ref = rest
    splits, row_blocks, unroll, sets = shape.splits, shape.row_blocks, shape.unroll, columns.sets
    quads, lanes = plan.words // 4, columns.kept * THREADS_A_ROW  # of a set in memory
    index = lax.iota(jnp.int32, shape.warps * 128)
    split, row_warp = bits(index, 128, splits), divided(index, 128 * splits)[0]
    tile = ROWS * plan.step_words
    in_codes = (row_warp * steps + split) * tile + bits(index, 1, 128)
    in_x = split * (quads * sets * lanes * 4) + divided(index, 4 * lanes)[1]

    ends_of = (
        row_blocks // 2 if gated else row_blocks
    )  # groups of rows that make results, gates; up behind them
    results = out // 2 if gated else out
    block = pl.program_id(0) * (ends_of * shape.row_warps)
    here = Place.of(shape.row_warps, splits)

    def first_tile(r: int):
        half, r = divmod(r, ends_of)
        return block + r * shape.row_warps + half * (results // ROWS)

    def first_row(r: int):
        return first_tile(r) * ROWS

    def read(i, u: int) -> tuple[jax.Array, ...]:
        """Codes of step u of a turn: by groups of rows, 4 words of a piece, rows g and g + 8."""
        step = (i * unroll + u) * splits  # of the first warp
        return tuple(
            plt.load(
                codes_ref.at[in_codes + ((first_tile(r) * steps + step) * tile + 128 * load)],
                mask=(split < steps - step) & (row_warp < tiles - first_tile(r)),
                other=jnp.uint32(0),
                eviction_policy="evict_first",  # read once: the L1 is for the activations
            )
            for r in range(row_blocks)
            for load in range(plan.piece_words // 2)
        )

    def activations(step, set_: int) -> tuple[jax.Array, ...]:
        at = in_x + step * (splits * quads * sets * lanes * 4)
        return tuple(x_ref[at + (q * sets + set_) * lanes * 4] for q in range(quads))

    def scale_of(r: int, octet: int, step=0) -> jax.Array:
        """float32, of the results in the registers."""
        token, sum_, slot, _ = columns.of(octet, here.column)
        row = first_row(r) + here.row
        inside = (row < out) & (token < columns.tokens)
        if group_size is not None:
            slot += divided(
                (step * splits + split) * (THREADS_A_ROW * plan.piece_params), group_size
            )[0]
            inside &= slot < groups
        each_row = scales_ref.shape[0] > groups * plan.sums  # or one for all
        at = ((row * groups if each_row else 0) + slot) * plan.sums + sum_
        return plt.load(
            scales_ref.at[at], mask=inside, other=jnp.zeros((), scales_ref.dtype)
        ).astype(jnp.float32)

    def values(sums: Sequence[jax.Array]) -> list[jax.Array]:
        """float32 by octets of columns: of three sets of bytes, or of columns that are bytes."""
        wide = [s.astype(jnp.float32) for s in sums]
        if columns.apart:
            return [
                wide[3 * o + 2] * 65536.0 + (wide[3 * o + 1] * 256.0 + wide[3 * o])
                for o in range(columns.octets)
            ]
        byte = columns.of(0, here.column)[3]
        return [wide[0] * jnp.where(byte == 0, 1.0, jnp.where(byte == 1, 256.0, 65536.0))]

    nothing = jnp.zeros(index.shape, jnp.int32)

    def turn(i, carry):
        sums = list(carry)
        codes = [read(i, u) for u in range(unroll)]
        for u in range(unroll):
            step = i * unroll + u
            x = [activations(step, s) for s in range(sets)]
            for r in range(row_blocks):
                count = len(codes[u]) // row_blocks
                prefix_words = decode(plan, codes[u][r * count : (r + 1) * count], interpret)
                before = sums[r] if group_size is None else [nothing] * sets
                found = [
                    multiply_add(prefix_words, x[s], before[s], interpret) for s in range(sets)
                ]
                if group_size is not None:
                    scaled = [v * scale_of(r, o, step) for o, v in enumerate(values(found))]
                    found = list(map(operator.add, sums[r], scaled))
                sums[r] = tuple(found)
        return tuple(sums)

    # What the end needs is on its way before the loop.
    scales = [
        [scale_of(r, o) for o in range(columns.octets)]
        for r in range(row_blocks if group_size is None else 0)
    ]
    ends = [
        _ends(columns, shape, results, first_row(r), largest_ref, residual_ref)
        for r in range(ends_of)
    ]

    dtype, count = (jnp.int32, sets) if group_size is None else (jnp.float32, columns.octets)
    zero = ((jnp.zeros(index.shape, dtype),) * count,) * row_blocks
    sums = lax.fori_loop(0, turns, turn, zero) if turns > 1 else turn(0, zero)

    def finished(r: int) -> Sequence[jax.Array]:
        """float32, by octets of columns."""
        if group_size is not None:
            return sums[r]
        return [v * scale for v, scale in zip(values(sums[r]), scales[r], strict=True)]

    for r in range(ends_of):
        halves = [finished(h) for h in range(r, row_blocks, ends_of)]
        for end in ends[r]:
            # In this order: the largest may be tiny.
            y, *up = (end.result(found) * (1 / plan.limit) * end.unit for found in halves)
            if up:
                y = y / (1 + jnp.exp(-y)) * up[0]
            for residual in end.residual:
                y = y + residual
            plt.store(out_ref.at[end.at], y.astype(out_ref.dtype), mask=end.mask)


@dataclass(frozen=True)
class Place:
    """Of the results that a block's registers hold: row of a group of them, column of a set. int32 [warps x 128]."""

    row: jax.Array
    column: jax.Array

    @staticmethod
    def of(row_warps: int, splits: int) -> "Place":
        """Thread 4 g + t has in register 2 row half + parity row g + 8 row half, column 2 t + parity."""
        index = lax.iota(jnp.int32, row_warps * splits * 128)
        row = divided(index, 128 * splits)[0] * ROWS + bits(index, 16, 8) + 8 * bits(index, 2, 2)
        return Place(row, bits(index, 4, 4) * 2 + bits(index, 1, 2))


@dataclass(frozen=True)
class End:
    """Some rows of y: what makes them of the octets, where they go, and what they are multiplied by and added to."""

    result: Callable[[Sequence[jax.Array]], jax.Array]
    at: jax.Array
    mask: jax.Array
    unit: jax.Array
    residual: list[jax.Array]


def _ends(
    columns: Columns, shape: Shape, out: int, first_row, largest_ref, residual_ref
) -> list[End]:
    def end(result, token, row) -> End:
        at, mask = token * out + row, (row < out) & (token < columns.tokens)
        unit = (
            plt.load(largest_ref.at[token], mask=token < columns.tokens, other=0.0)
            if token.ndim
            else largest_ref[token]
        )
        added = [
            plt.load(ref.at[at], mask=mask, other=0.0).astype(jnp.float32) for ref in residual_ref
        ]
        return End(result, at, mask, unit, added)

    def of_rows(parts: jax.Array) -> jax.Array:
        """Adds what the warps that share rows have found: [warps x ...] -> [row warps, ...]."""
        return (
            parts.reshape(shape.row_warps, shape.splits, -1).sum(axis=1)
            if shape.splits > 1
            else parts
        )

    if columns.apart and columns.coefficients == columns.tokens:  # a column is a token: as they lie
        place = Place.of(shape.row_warps, 1)

        def of_octet(o: int, octets: Sequence[jax.Array]) -> jax.Array:
            return of_rows(octets[o]).reshape(-1)

        tokens = [columns.of(o, place.column)[0] for o in range(columns.octets)]
        return [
            end(functools.partial(of_octet, o), token, first_row + place.row)
            for o, token in enumerate(tokens)
        ]

    column = Place.of(shape.row_warps, shape.splits).column

    def of_token(t: int, octets: Sequence[jax.Array]) -> jax.Array:
        """The sum over its columns: first within a warp, where that takes no memory. [row warps, g, row half]"""
        mine = [jnp.where(columns.of(o, column)[0] == t, v, 0.0) for o, v in enumerate(octets)]
        of_warps = (
            functools.reduce(operator.add, mine).reshape(-1, 8, 4, 2, 2).sum(axis=4).sum(axis=2)
        )
        return of_rows(of_warps).reshape(rows)

    rows = (shape.row_warps, 8, 2)
    row_warp, g, half = (lax.broadcasted_iota(jnp.int32, rows, axis) for axis in range(3))
    row = first_row + row_warp * ROWS + g + 8 * half
    return [end(functools.partial(of_token, t), jnp.int32(t), row) for t in range(columns.tokens)]


def word_at(row: jax.Array, word: jax.Array, bases: int, steps: int) -> jax.Array:
    """Where a word of a row lies in the codes of layout `tiles`, for tensors that broadcast."""
    loads = period(bases)
    step, rest = divided(word, THREADS_A_ROW * loads * LOAD_WORDS)
    if loads > 1:  # of a thread, one after the other
        thread, rest = divided(rest, loads * LOAD_WORDS)
        load, e = divided(rest, LOAD_WORDS)
        rest = load * 256 + thread * LOAD_WORDS + e
    group, of_group = divided(row, ROWS)
    half, g = divided(of_group, ROWS // 2)
    return (group * (steps * loads * 256) + half * 128 + g * 16) + (step * (loads * 256) + rest)
