"""Few tokens times a packed matrix: int8 tensor cores on prefixes, in Pallas for Triton.

    products[c, o] = sum_k X[c, k] prefix[o, k]          int32, exact; c a column of `triton_fold.fold`
    y[token, o]    = sum_c 256^byte(c) scale[o, sum(c)] products[c, o] largest|x| / limit   (+ residual), c of the token

A block of threads computes 16 R rows. Its warps take turns at the steps of a row (64 bytes of each row, 192 for N = 3);
in a step, thread 4 g + t of a warp takes piece t of rows g and g + 8, decodes it (two operations a word, a multiply-add a
`Half`, a byte permutation a prefix word) and multiplies two prefix words at a time,

    mma.sync m16n8k32   A = prefix words of 16 rows, B = the same words of 8 columns of activations,

which is all that the main loop does where rows have one scale: no scale, no conversion, no offset. With group scales each
group that a step touches has columns of its own (a *slot*), and their results are scaled in float32 after each step, by
scales that were laid out before in the order of the results. What the warps found is added, scaled and written as rows of
y: nothing is left to other kernels. Codes are read as they are stored; beyond a row's end the
activations are zero, beyond the last row reads are masked, so any number of inputs and rows will do.

Tensors of a block are flat, and thread and register follow from the index: with 4 consecutive elements a thread, element
4 (32 w + l) + e is register e of lane l of warp w, and a second half of the tensor makes registers 4 to 7. Triton keeps
that as long as it can prove that loads are contiguous by 4, which `//`, `%` and `minimum` on tensors would hide from it.
"""

import functools
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels.prefixes import Plan, multiplier, period

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore", DeprecationWarning
    )  # of the Triton backend as a whole: `mosaic.py` is its successor
    from jax.experimental.pallas import triton as plt

ROWS = 16  # of one matrix instruction
MAX_COLUMNS = 16  # two of its results a thread


def multiply(
    plan: Plan,
    folded: tuple[jax.Array, jax.Array],
    codes: jax.Array,
    scales: jax.Array,
    columns: int,
    residual: jax.Array | None = None,
    *,
    warps: int,
    row_blocks: int = 1,
    unroll: int = 1,
    interpret: bool = False,
) -> jax.Array:
    """y float32 [M, out], plus the residual [M, out]: the matrix times the tokens that were folded.

    folded: of `triton_fold.fold`, for `padded(steps, warps, unroll)` steps and `kept(columns)` columns; columns: those that
    count, at most MAX_COLUMNS. codes uint32 [out, row words]: the rows as they are stored, whole 16 bytes each. scales: one a
    row and sum [rows or 1, sums], or of the groups that each step touches [rows or 1, steps, columns / 4]. warps: of a block;
    a power of two. row_blocks: R, groups of 16 rows that share a thread's activations; a power of two. unroll: steps of a
    warp in a turn of the loop.
    """
    x, largest = folded
    sets = max(1, kept(columns) // 8)  # of 8 columns: results of 4 registers each
    steps = plan.steps(codes.shape[1])
    turns = padded(steps, warps, unroll) // (warps * unroll)
    (out, row_words), tokens, grouped = codes.shape, largest.shape[0], scales.ndim == 3
    blocks = -(-out // (ROWS * row_blocks))
    if grouped:
        scales = _by_register(scales, out, blocks * row_blocks, padded(steps, warps, unroll), 2 * sets)
    kernel = functools.partial(
        _kernel, plan=plan, turns=turns, warps=warps, row_blocks=row_blocks, unroll=unroll, sets=sets,
        lanes_kept=min(kept(columns), 8) * 4, shape=(out, row_words), tokens=tokens, columns=columns, grouped=grouped,
        interpret=interpret,
    )  # fmt: skip
    added = [] if residual is None else [residual.reshape(-1)]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((tokens * out,), jnp.float32),
        grid=(blocks,),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name(plan, columns),
    )(x, codes.reshape(-1), largest, scales.reshape(-1), *added).reshape(tokens, out)


def padded(steps: int, warps: int, unroll: int) -> int:
    """Steps that the warps of a block take together, the last turn of its loop full."""
    return -(-steps // (warps * unroll)) * warps * unroll


def kept(columns: int) -> int:
    """Columns in memory: up to 4 are loaded once and multiplied twice."""
    return 4 if columns <= 4 else 8 if columns <= 8 else 16


def name(plan: Plan, columns: int) -> str:
    """The kernel's, for so many columns that are used."""
    return f"ternary_gemv_n{plan.bases}{'tied' if plan.tied else 'free'}_c{kept(columns)}"


def _by_register(scales: jax.Array, out: int, row_groups: int, steps: int, quads: int) -> jax.Array:
    """scales [rows or 1, steps, quads used] -> [groups of 16 rows, steps, quads, g, register], flat: a quad is 4 columns."""
    rows = jnp.broadcast_to(scales, (out, *scales.shape[1:]))
    rows = jnp.pad(rows, ((0, row_groups * ROWS - out), (0, steps - scales.shape[1]), (0, quads - scales.shape[2])))
    rows = rows.reshape(row_groups, 2, 8, -1, quads).transpose(0, 3, 4, 2, 1)  # [groups, steps, quads, g, row half]
    return jnp.repeat(rows, 2, axis=-1).reshape(-1)


def _kernel(
    x_ref, codes_ref, largest_ref, scales_ref, *rest, plan: Plan, turns: int, warps: int, row_blocks: int, unroll: int,
    sets: int, lanes_kept: int, shape: tuple[int, int], tokens: int, columns: int, grouped: bool,
    interpret: bool,
):  # fmt: skip
    *residual_ref, out_ref = rest
    out, row_words = shape
    size = warps * 128 * sets
    block = pl.program_id(0)
    index = lax.iota(jnp.int32, size)

    register, thread, group, warp = (bits(index, *where) for where in ((1, 4), (4, 4), (16, 8), (128, warps)))
    half = divided(index, 128 * warps)[0]
    step_words, load = plan.step_words, plan.piece_words // 4
    in_piece = thread * plan.piece_words + register + warp * step_words
    # with one set of columns rows g + 8 are a load of their own, with two they are the second half of the tensor
    row_of = [group, group + 8] if sets == 1 else [group + half * 8]
    x_words = plan.words // 4 * sets * lanes_kept * 4
    x_base = warp * x_words + divided(index, 4 * lanes_kept)[1] + half * (4 * lanes_kept)
    quad = (half * 2 + bits(index, 8, 2)) * 32 + group * 4 + register + warp * (64 * sets)  # in the scales

    def first_row(r: int):
        return (block * row_blocks + r) * ROWS

    def read(i, u: int) -> tuple[jax.Array, ...]:
        """Codes of step u of a turn, by groups of 16 rows and 4 words of a piece; nothing beyond the end of a row."""
        at = in_piece + (i * unroll + u) * (warps * step_words)
        return tuple(
            plt.load(
                codes_ref.at[row * row_words + (at + (first_row(r) * row_words + 4 * c))],
                mask=(at + 4 * c < row_words) & (row < out - first_row(r)),
                other=jnp.uint32(0),
            )
            for r in range(row_blocks)
            for c in range(load)
            for row in row_of
        )

    nothing = jnp.zeros((size,), jnp.int32)

    def turn(i, carry):
        sums, codes = list(carry[0]), list(carry[1])
        for u in range(unroll):
            step = (i * unroll + u) * warps  # of the first warp
            x = [x_ref[x_base + (step * x_words + w * sets * lanes_kept * 4)] for w in range(plan.words // 4)]
            now, codes[u] = (
                codes[u],
                read(i + 1, u),
            )  # those of a turn are on their way while the one before is computed
            for r in range(row_blocks):
                words = now[r * len(now) // row_blocks : (r + 1) * len(now) // row_blocks]
                if grouped:
                    found = _multiply(plan, sets, words, x, nothing, interpret).astype(jnp.float32)
                    at = ((block * row_blocks + r) * (turns * unroll * warps) + step) * (64 * sets)
                    sums[r] = sums[r] + found * scales_ref[quad + at].astype(jnp.float32)
                else:
                    sums[r] = _multiply(plan, sets, words, x, sums[r], interpret)
        return tuple(sums), tuple(codes)

    # What the end needs is on its way before the loop. Thread 4 g + t has in register 2 row half + parity of a set the results
    # of row g + 8 row half, column 2 t + parity.
    index, bytes_a_sum = lax.iota(jnp.int32, 128 * sets), 4 if grouped else 3
    column = bits(index, 128, sets) * 8 + bits(index, 4, 4) * 2 + bits(index, 1, 2)
    sum_, byte = divided(column, bytes_a_sum)
    token, sum_ = divided(sum_, columns // (tokens * bytes_a_sum))  # of columns that do not count: no token
    halves = (8, 2)  # g, row half
    row_of_half = lax.broadcasted_iota(jnp.int32, halves, 0) + 8 * lax.broadcasted_iota(jnp.int32, halves, 1)

    def scale_of(r: int) -> jax.Array:
        row = first_row(r) + bits(index, 16, 8) + 8 * bits(index, 2, 2)
        at = sum_ if scales_ref.shape[0] == plan.sums else row * plan.sums + sum_  # one for all rows, or each its own
        return plt.load(scales_ref.at[at], mask=row < out, other=jnp.zeros((), scales_ref.dtype)).astype(jnp.float32)

    def added(t: int, r: int) -> list[jax.Array]:
        rows = first_row(r) + row_of_half
        return [
            plt.load(ref.at[t * out + rows], mask=rows < out, other=0.0).astype(jnp.float32) for ref in residual_ref
        ]

    scales = None if grouped else [scale_of(r) for r in range(row_blocks)]
    residuals = [[added(t, r) for r in range(row_blocks)] for t in range(tokens)]
    units = [largest_ref[t] for t in range(tokens)]

    zero = tuple(jnp.zeros((size,), jnp.float32 if grouped else jnp.int32) for _ in range(row_blocks))
    carry = zero, tuple(read(0, u) for u in range(unroll))
    sums, _ = lax.fori_loop(0, turns, turn, carry) if turns > 1 else turn(0, carry)

    place = jnp.where(byte == 0, 1.0, jnp.where(byte == 1, 256.0, 65536.0))
    for r in range(row_blocks):
        found = jnp.sum(sums[r].reshape(sets, warps, 128), axis=1).reshape(-1).astype(jnp.float32) * place
        if scales is not None:
            found = found * scales[r]
        rows = first_row(r) + row_of_half
        for t in range(tokens):
            mine = jnp.where((token == t) & (byte < 3), found, 0.0)
            y = mine.reshape(sets, 8, 4, 2, 2).sum(axis=4).sum(axis=2).sum(axis=0)  # set, g, t, row half, parity
            y = y * (1 / plan.limit) * units[t]  # in this order: the largest may be tiny
            for residual in residuals[t][r]:
                y = y + residual
            plt.store(out_ref.at[t * out + rows], y, mask=rows < out)


def divided(value: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """(value // by, value % by) of what is not negative, in operations through which Triton sees what is contiguous."""
    divisor = jnp.full(value.shape, by, jnp.int32)
    return lax.div(value, divisor), lax.rem(value, divisor)


def bits(index: jax.Array, of: int, count: int) -> jax.Array:
    """index // of % count."""
    return divided(divided(index, of)[0], count)[1]


def _multiply(
    plan: Plan, sets: int, words: Sequence[jax.Array], x: Sequence[jax.Array], sums: jax.Array, interpret: bool
) -> jax.Array:
    """sums + prefixes of the words times x, in the registers of the module's text."""
    if interpret:
        return twin(plan, sets, words, x, sums)
    text, constraints = assembly(plan, sets)
    result = [jax.ShapeDtypeStruct(sums.shape, jnp.int32)]
    operands = [*words, *x, sums]
    return plt.elementwise_inline_asm(
        text, args=operands, constraints=constraints, pack=4 * sets, result_shape_dtypes=result
    )[0]


@functools.cache
def assembly(plan: Plan, sets: int) -> tuple[str, str]:
    """(PTX, constraints) of one step of one group of 16 rows. Operands: results, words of codes, words of x, sums so far."""
    results, codes = 4 * sets, 2 * plan.piece_words
    operands = results + codes + plan.words * sets + results

    def word(row_half: int, w: int) -> str:
        quad, e = divmod(w, 4)
        return f"${results + (2 * quad + row_half) * 4 + e}"

    def x(w: int, column_set: int) -> str:
        quad, e = divmod(w, 4)
        return f"${results + codes + (quad * sets + column_set) * 4 + e}"

    lines = ["{", ".reg .b32 half<2>, p, q, a<4>;"]
    lines += [f"mov.b32 ${e}, ${operands - results + e};" for e in range(results)]
    for w in range(0, plan.words, 2):
        for k, row_half in ((0, 0), (1, 1), (2, 0), (3, 1)):  # a0, a1 are the first prefix word of both rows
            first, second = plan.halves[2 * (w + k // 2) : 2 * (w + k // 2) + 2]
            for name, half in (("p", first), ("q", second)):
                factor, addend = multiplier(half.digit)
                selector = "0x4341" if half.odd else "0x4240"  # bytes 1 and 3, or 0 and 2, each below a zero
                lines.append(f"prmt.b32 {name}, {word(row_half, half.word)}, 0, {selector};")
                lines.append(f"mad.lo.u32 {name}, {name}, {factor}, {addend};")
            lines.append(f"prmt.b32 a{k}, p, q, 0x7531;")
        for s in range(sets):
            d = ", ".join(f"${4 * s + e}" for e in range(4))
            lines.append(
                f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{{d}}}, {{a0, a1, a2, a3}}, "
                f"{{{x(w, s)}, {x(w + 1, s)}}}, {{{d}}};"
            )
    lines.append("}")
    return "\n".join(lines), ",".join(["=&r"] * results + ["r"] * (operands - results))


def twin(plan: Plan, sets: int, words, x, sums):
    """What `assembly` computes, in jnp, for interpret mode."""
    threads = (-1, 8, 4)  # warp, g, t
    by_row = jnp.stack([w.reshape(sets, *threads, 4) for w in words])  # [loads, sets, warps, g, t, e]
    if sets == 1:  # loads alternate between the two halves of the rows
        piece = by_row.reshape(-1, 2, *by_row.shape[2:])
    else:
        piece = by_row
    piece = jnp.moveaxis(piece, 0, -2)  # [row half, warps, g, t, quads, e]
    piece = piece.reshape(*piece.shape[:4], plan.piece_words)
    words = period(plan.bases)  # after which the prefixes that are needed repeat
    piece = piece.reshape(*piece.shape[:4], -1, words)
    prefix = []
    for half in (h for h in plan.halves if h.word < words):
        factor, addend = multiplier(half.digit)
        pair = (piece[..., half.word] >> (8 * half.odd)) & jnp.uint32(0x00FF00FF)
        product = pair * jnp.uint32(factor) + jnp.uint32(addend)
        prefix += [(product >> 8) & 255, product >> 24]
    a = jnp.stack(prefix, axis=-1).astype(jnp.int32)  # [row half, warps, g, t, periods, 4 words of each]
    a = a.reshape(*a.shape[:4], -1)
    b = jnp.stack([v.reshape(sets, *threads, 4) for v in x], axis=-2)  # [sets, warps, column, t, quads, e]
    b = b.reshape(*b.shape[:4], plan.words)
    b = jnp.stack([(b >> (8 * i)) & 255 for i in range(4)], axis=-1).astype(jnp.int32)
    b = b.reshape(*b.shape[:4], -1)  # [sets, warps, column, t, 4 words]

    def signed(v):
        return (v ^ 128) - 128

    c = jnp.einsum("hwgtk,swctk->swghc", signed(a), signed(b))  # [sets, warps, g, row half, column]
    c = c.reshape(*c.shape[:4], 4, 2).transpose(
        0, 1, 2, 4, 3, 5
    )  # column = 2 t + parity -> [sets, warps, g, t, half, parity]
    return sums + c.reshape(-1)
