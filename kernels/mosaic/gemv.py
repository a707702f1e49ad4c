"""Few tokens times a packed matrix with one scale per row: int8 tensor cores on prefixes, in Pallas
for Mosaic GPU, on Hopper.

    products[c, o] = sum_k X[c, k] prefix[o, k]          int32, exact; c a byte of a sum of a token

A block, one warpgroup, takes 64 rows and some of the steps of 64 words (256 bytes of each row),
which the TMA brings into shared memory ahead of time, with zeros beyond the matrix. It loads a step
into the registers in which `wgmma` wants int8 of its left operand, four times as wide: thread t of
a row has words 16 i + 4 t + e, and would have int8 16 i' + 4 t + b. Two multiplications make four
prefixes of a word, one byte permutation puts them where the word was, and so a word of registers
becomes int8 of a *plane* [64 rows, 256], i' = 4 i + e: nothing moves between threads, only the
activations are ordered accordingly. Blocks that share rows leave their sums apart, and XLA adds
them.

For N = 3 cells do not begin at words: which prefixes a byte needs has a period of three words, and
which word a register holds depends on the thread. So all multiplications that any word needs are
made of all words, with zeros for activations where they are not needed: 10 instead of 4 2/3 per
word with tied scales, no more than are needed with free ones.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector

from atd.kernels import prefixes
from atd.kernels.prefixes import Plan, multiplier

plgpu: Any = mosaic_gpu  # whose annotations deny what its documentation does
COLUMNS = (8, 16, 24, 32, 48)  # that a product may have: what wgmma has for int8
ROWS = 64  # of a block: those of a matrix instruction
WORDS = 64  # of a row in a step
GROUPS = (4, 4, 4)  # a word's i, t, e
LAYOUT = plgpu.Layout.WGMMA_8BIT  # of registers, whether they hold words or int8
SWIZZLE = 128  # bytes of a column of activations that lie apart from those of other columns
BLOCKS = 264  # at least, where rows and steps allow: two for each multiprocessor of an H200
STAGE_BYTES = 110 << 10  # of shared memory for steps under way: a multiprocessor has two blocks


@dataclass(frozen=True)
class Geometry:
    """One product: what is multiplied, and how the work is cut.

    Attributes:
        plan: of the weights.
        tokens: so few that they have at most 48 columns.
        out: rows of the matrix.
        row_words: 32-bit words of a row.
        interpret: whether jax's interpreter runs the kernel.
    """

    plan: Plan
    tokens: int
    out: int
    row_words: int
    interpret: bool = False

    @property
    def wanted(self) -> int:
        """Columns of int8 that the tokens have."""
        return prefixes.columns(self.plan, self.tokens)

    @property
    def columns(self) -> int:
        """Columns of the product."""
        return next(n for n in COLUMNS if n >= self.wanted)

    @property
    def depth(self) -> int:
        """int8 that the words of a row become in a step."""
        return len(multiplications(self.plan)) * 2 * WORDS

    @property
    def blocks(self) -> int:
        """Blocks of 64 rows."""
        return -(-self.out // ROWS)

    @property
    def steps(self) -> int:
        """Steps of a row."""
        return -(-self.row_words // WORDS)

    @property
    def steps_of_block(self) -> int:
        return -(-self.steps // min(self.steps, -(-BLOCKS // self.blocks)))

    @property
    def splits(self) -> int:
        """Blocks that share the steps of a row."""
        return -(-self.steps // self.steps_of_block)

    @property
    def stages(self) -> int:
        """Steps in shared memory at a time."""
        return max(2, min(4, STAGE_BYTES // (ROWS * WORDS * 4 + self.columns * self.depth)))

    @property
    def name(self) -> str:
        """The kernel's name in traces and dumps."""
        return f"ternary_mosaic_{self.plan}_c{self.columns}"


# --- activations ------------------------------------------------------------------------------


def multiplications(plan: Plan) -> list[tuple[int, int]]:
    """Returns (odd, digit) of the multiplications that make all prefixes that any word needs.

    Each makes S_digit of bytes odd and odd + 2. Their number is even.
    """
    return sorted({(byte % 2, half.digit) for half in plan.halves for byte in half.bytes})


def in_planes(g: Geometry, coefficients: jax.Array) -> jax.Array:
    """Returns coefficients of `prefixes.fold` in the order in which `plane` has the prefixes.

    int8 [columns, steps x planes x 4 WORDS], for all steps of all blocks. Columns (token, sum,
    byte) are those of `prefixes.join`; those beyond are 0, as is what is beyond the row.
    """
    plan, words = g.plan, g.splits * g.steps_of_block * WORDS
    tokens, sums = coefficients.shape[:2]
    made = multiplications(plan)
    places = [(byte, half.digit) for half in plan.halves for byte in half.bytes]  # of coefficients
    index = {place: i for i, place in enumerate(places)}
    none = 2 * len(plan.halves)  # of a piece
    table = np.full((plan.piece_words, len(made), 2), none)
    for word in range(plan.piece_words):
        for i, (odd, digit) in enumerate(made):
            for high in (0, 1):
                table[word, i, high] = index.get((4 * word + odd + 2 * high, digit), none)
    # [words, planes, high, first or second: 4 bytes]
    table = table.reshape(-1, len(made) // 2, 2, 2).swapaxes(2, 3)
    pieces = jnp.pad(coefficients.reshape(tokens, sums, -1, none), ((0, 0), (0, 0), (0, 0), (0, 1)))
    # [M, sums, pieces, words, 2 made]
    taken = jnp.take(pieces, table.reshape(plan.piece_words, -1), axis=-1)
    taken = taken.reshape(tokens, sums, -1, 2 * len(made))
    taken = taken[:, :, :words]  # beyond the row there are zeros alone
    split = prefixes.signed_bytes(taken).astype(jnp.int8)
    flat = split.reshape(tokens * sums * 3, -1, 2 * len(made))
    pad = ((0, g.columns - flat.shape[0]), (0, words - flat.shape[1]), (0, 0))
    # [columns, steps, i, t, e, planes, 4 bytes]
    steps = jnp.pad(flat, pad).reshape(g.columns, -1, *GROUPS, len(made) // 2, 4)
    return steps.transpose(0, 1, 5, 2, 4, 3, 6).reshape(g.columns, -1)


# --- the kernel -------------------------------------------------------------------------------


def products(
    plan: Plan, coefficients: jax.Array, codes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Multiplies each byte of each coefficient by the prefixes of all rows.

    Args:
        plan: of the weights.
        coefficients: of `prefixes.fold`, of so few tokens that they have at most 48 columns.
        codes: of the matrix in layout `words`, uint32 [out, row words].

    Returns:
        int32 [columns, out].
    """
    g = Geometry(plan, coefficients.shape[0], *codes.shape, interpret)

    def body(codes_ref, x_ref, out_ref, *interpreted):
        _kernel(codes_ref, x_ref, out_ref, *interpreted, g=g)

    found = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((g.splits, g.blocks * ROWS, g.columns), jnp.int32),
        grid=(g.blocks, g.splits),
        grid_names=("blocks", "splits"),
        scratch_types=[plgpu.SMEM((ROWS, 4 * WORDS), jnp.int8)] if interpret else [],
        # The other semantics would tile the codes in shared memory, and so want rows of whole 128
        # bytes.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name=g.name,
    )(codes, in_planes(g, coefficients))
    return found.sum(axis=0)[: g.out, : g.wanted].T


def _kernel(codes_ref, x_ref, out_ref, *interpreted, g: Geometry):
    block, split = lax.axis_index("blocks"), lax.axis_index("splits")
    made = multiplications(g.plan)

    def run(sums):
        def step(_, words_ref, x_ref):
            words = plgpu.load(words_ref, layout=LAYOUT, optimized=False)
            for i in range(0, len(made), 2):
                pair = [_prefixes(words, *which) for which in made[i : i + 2]]
                x = x_ref.at[:, pl.ds(i * 2 * WORDS, 4 * WORDS)].T
                if g.interpret:  # which multiplies what lies in memory alone
                    (plane_ref,) = interpreted
                    plane_ref[...] = plane_twin(*pair)
                    plgpu.wgmma(sums, plane_ref, x)
                else:
                    plgpu.wgmma(sums, plane(*pair), x)
            plgpu.wgmma_wait(0)  # before the next words come in the place of these

        tiling = plgpu.TilingTransform((8, SWIZZLE)), plgpu.SwizzleTransform(SWIZZLE)
        of_codes = plgpu.BlockSpec((ROWS, WORDS), lambda k: (block, split * g.steps_of_block + k))
        of_x = plgpu.BlockSpec(
            (g.columns, g.depth), lambda k: (0, split * g.steps_of_block + k), transforms=tiling
        )
        plgpu.emit_pipeline(
            step, grid=(g.steps_of_block,), in_specs=[of_codes, of_x], max_concurrent_steps=g.stages
        )(codes_ref, x_ref)
        return sums[...]

    found = pl.run_scoped(run, plgpu.ACC((ROWS, g.columns), jnp.int32))
    out_ref[split, pl.ds(block * ROWS, ROWS), :] = found


def _prefixes(words: jax.Array, odd: int, digit: int) -> jax.Array:
    """The prefixes S_digit of bytes odd and odd + 2 of words of codes, in bytes 1 and 3, uint32."""
    factor, addend = multiplier(digit)
    return ((words >> (8 * odd)) & jnp.uint32(0x00FF00FF)) * jnp.uint32(factor) + jnp.uint32(addend)


@plgpu.inline_mgpu(
    arg_types=(LAYOUT, LAYOUT),
    return_type=plgpu.ShapeDtypeStruct((ROWS, 4 * WORDS), jnp.int8, layout=LAYOUT),
)
def plane(_, first, second):
    """Joins bytes 1 and 3 of two uint32 [ROWS, WORDS] -> int8 [ROWS, 4 WORDS].

    In the order first's, second's, first's, second's, in the registers in which the words are, an
    instruction per register. Word 16 i + 4 t + e of a row is register (i, e) of thread t, and as
    such the int8 16 (4 i + e) + 4 t and the next three.
    """
    int8 = ir.IntegerType.get_signless(8)
    shape = first.registers.shape  # [1, i, 1, 1, half of the rows, 1, 1, 1, 1], of four words each
    result = np.empty((1, 4 * shape[1], *shape[2:]), object)
    for at in np.ndindex(shape):
        a, b = (
            vector.bitcast(ir.VectorType.get((16,), int8), held.registers[at])
            for held in (first, second)
        )
        for e in range(4):
            chosen = [4 * e + 1, 16 + 4 * e + 1, 4 * e + 3, 16 + 4 * e + 3]
            result[0, 4 * at[1] + e, *at[2:]] = vector.shuffle(a, b, chosen)
    return type(first)(_registers=result, _layout=first.layout, _is_signed=True)


def plane_twin(first: jax.Array, second: jax.Array) -> jax.Array:
    """Computes in jnp what `plane` does."""
    # [rows, words, 4 bytes]
    first, second = (lax.bitcast_convert_type(words, jnp.int8) for words in (first, second))
    four = jnp.stack([first[..., 1], second[..., 1], first[..., 3], second[..., 3]], axis=-1)
    swapped = four.reshape(-1, *GROUPS, 4).swapaxes(2, 3)  # [rows, i, e, t, 4 bytes]
    return swapped.reshape(four.shape[0], -1)
