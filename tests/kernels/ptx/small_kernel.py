"""A small Pallas kernel of its own on which the tools that check GPU kernels without a GPU are
proven.

Trits packed five to a byte, as signed prefixes, times int8 activations on the tensor cores, summed
over warps through shared memory.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas import triton as plt

DIGITS = 5  # trits per byte
WARPS, LANES = 4, 32
ROWS, INPUTS, COLUMNS = 16, 160, 8  # what a warp multiplies in a step
WORDS = 4  # of codes, a lane and step
X_WORDS = 12  # of activations: 2 a digit, the rest is padding
WEIGHTS = ROWS * INPUTS // LANES


def assembly() -> tuple[str, str]:
    """Returns (instructions, constraints) of a step: codes, activations, sums -> sums."""
    sums = [f"${i}" for i in range(4)]
    codes, x, sums_before = (
        [f"${start + i}" for i in range(count)] for start, count in ((4, 4), (8, 12), (20, 4))
    )
    lines = ["{ .reg .b32 even<4>, odd<4>, a<4>, p, q;"]
    lines += [
        f"mov.b32 {after}, {before};" for after, before in zip(sums, sums_before, strict=True)
    ]
    for i, code in enumerate(codes):
        lines.append(f"and.b32 even{i}, {code}, 0x00ff00ff; prmt.b32 odd{i}, {code}, 0, 0x4341;")
    for digit in range(DIGITS):
        factor = 3 ** (digit + 1)
        addend = np.int32(np.uint32((128 - 128 * factor) * 0x10001 & 0xFFFFFFFF))
        for i in range(4):
            lines.append(f"mad.lo.s32 p, even{i}, {factor}, {addend};")
            lines.append(f"mad.lo.s32 q, odd{i}, {factor}, {addend};")
            lines.append(f"prmt.b32 a{i}, p, q, 0x7351;")
        lines.append(
            f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{{', '.join(sums)}}}, "
            f"{{a0, a1, a2, a3}}, {{{x[2 * digit]}, {x[2 * digit + 1]}}}, {{{', '.join(sums)}}};"
        )
    return "\n".join([*lines, "}"]), ",".join(["=&r"] * 4 + ["r"] * 20)


def multiply(codes: jax.Array, x: jax.Array) -> jax.Array:
    """Multiplies codes uint32 [blocks, steps, lanes, words] by x uint32 [steps, x words / 4, lanes,
    4].

    Returns int32 [blocks, lanes, 4].
    """
    blocks, steps = codes.shape[:2]
    instructions, constraints = assembly()

    def kernel(codes_ref, x_ref, sums_ref):
        block = pl.program_id(0)
        index = lax.iota(jnp.int32, WARPS * LANES * WORDS)
        warp, word = (f(index, jnp.full_like(index, LANES * WORDS)) for f in (lax.div, lax.rem))

        def turn(i, sums):
            step = i * WARPS + warp

            def load(ref, row):
                return plt.load(
                    ref.at[row * LANES * WORDS + word], mask=step < steps, other=jnp.uint32(0)
                )

            return plt.elementwise_inline_asm(
                instructions,
                args=[
                    load(codes_ref, block * steps + step),
                    *(load(x_ref, step * 3 + i) for i in range(3)),
                    sums,
                ],
                constraints=constraints,
                pack=4,
                result_shape_dtypes=[jax.ShapeDtypeStruct(index.shape, jnp.int32)],
            )[0]

        sums = lax.fori_loop(0, -(-steps // WARPS), turn, jnp.zeros_like(index))
        words = LANES * WORDS
        sums_ref[pl.ds(block * words, words)] = jnp.sum(sums.reshape(WARPS, words), axis=0)

    sums = pl.pallas_call(
        kernel,
        name="ternary",
        grid=(blocks,),
        out_shape=jax.ShapeDtypeStruct((blocks * LANES * WORDS,), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
    )(codes.reshape(-1), x.reshape(-1))
    return sums.reshape(blocks, LANES, WORDS)


# Its arguments and results in the order of the matrix instruction: lane 4 g + t, word (k half, row
# half), byte b of it is row g + 8 (row half), byte column 16 (k half) + 4 t + b; weight 32 digit +
# byte column of a step.


def pack(trits: np.ndarray) -> np.ndarray:
    """Packs trits int8 [blocks * 16, steps * 160] into codes."""
    digits = trits.reshape(len(trits), -1, DIGITS, 32).astype(np.int64) + 1
    value = digits.swapaxes(2, 3) @ 3 ** np.arange(5)[::-1]
    code = np.maximum((256 * value + 242) // 243, 1)  # 1 for 0: else the lower half borrows
    code = code.astype(np.uint8)
    code = code.reshape(-1, 2, 8, code.shape[1], 2, 4, 4)  # block, row half, g, step, k half, t, b
    code = np.ascontiguousarray(code.transpose(0, 3, 2, 5, 4, 1, 6))
    return code.view(np.uint32).reshape(*code.shape[:2], LANES, WORDS)


def fragments(x: np.ndarray) -> np.ndarray:
    """Returns integers up to 31 [8, steps * 160] as x. Of prefix j: x_j - 3 x_(j+1), so that
    prefixes need not be told apart."""
    x = x.reshape(COLUMNS, -1, DIGITS, 32).astype(np.int64)
    x = x - 3 * np.pad(x[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
    x = x.astype(np.int8).reshape(COLUMNS, -1, DIGITS, 2, 4, 4)
    x = x.transpose(1, 0, 4, 2, 3, 5)  # step, g, t, digit, half, b
    words = np.ascontiguousarray(x).view(np.uint32).reshape(-1, LANES, 2 * DIGITS)
    words = np.pad(words, ((0, 0), (0, 0), (0, X_WORDS - 2 * DIGITS)))
    return np.ascontiguousarray(words.reshape(-1, LANES, 3, 4).swapaxes(1, 2))


def unpack(sums: np.ndarray) -> np.ndarray:
    """Returns sums int32 [blocks, lanes, 4] as [blocks * 16, 8]."""
    sums = sums.reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4)  # block, row half, g, t, column
    return sums.reshape(-1, COLUMNS)


def shapes(blocks: int, steps: int) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct((blocks, steps, LANES, WORDS), jnp.uint32),
        jax.ShapeDtypeStruct((steps, X_WORDS // 4, LANES, 4), jnp.uint32),
    ]
