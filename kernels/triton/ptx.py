"""What the kernels need and jax has no operation for: PTX, each piece with its *twin* in jnp for
interpret mode, and index arithmetic that Triton sees through.

Registers are those of `gemv`: four consecutive elements of a tensor are a thread's.
"""

import functools
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from atd.kernels.prefixes import Half, Plan, multiplier

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the Triton backend as a whole
    from jax.experimental.pallas import triton as plt


def divided(value: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Returns (value // by, value % by) for int32 that is not negative.

    Triton sees through these operations what is contiguous.
    """
    divisor = jnp.full(value.shape, by, jnp.int32)
    return lax.div(value, divisor), lax.rem(value, divisor)


def bits(index: jax.Array, of: int, count: int) -> jax.Array:
    """Returns index // of % count."""
    return divided(divided(index, of)[0], count)[1]


def _launches_early() -> bool:
    """Whether kernels of the GPU that is compiled for may begin before the one they wait for ends.

    XLA lets those that Triton compiles wait for it in their first instruction.
    """
    try:
        return plt.get_gpu_info().compute_capability >= 90
    except ValueError:  # no GPU, or an abstract one that jax does not know
        return False


def launch_next(value: jax.Array, interpret: bool) -> jax.Array:
    """Lets the next kernel's blocks take their places, where the GPU can: they wait there for all
    that this one writes.

    Only where this kernel's results are for kernels of Triton alone: others of XLA may read before
    they wait.

    Args:
        value: int32 [...] out of memory, so that this does not come before what this kernel itself
            waits for.

    Returns:
        int32 zeros [...], which must be used.
    """
    if interpret or not _launches_early():
        return jnp.zeros_like(value)
    return plt.elementwise_inline_asm(
        "{ griddepcontrol.launch_dependents; mov.b32 $0, 0; }",
        args=[value],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(value.shape, jnp.int32)],
    )[0]


def decode(plan: Plan, words: Sequence[jax.Array], interpret: bool) -> Sequence[jax.Array]:
    """Returns the prefix words of a piece of rows g and g + 8, of its words of codes.

    Two at a time: registers (w, g), (w, g + 8), (w + 1, g), (w + 1, g + 8), which one matrix
    instruction takes.
    """
    if interpret:
        return decode_twin(plan, words)

    def pair(w: int) -> jax.Array:
        """An assembly each, since jax takes one result of one alone; what two have in common is
        computed once."""
        text, constraints = decode_assembly(plan, w)
        # Triton's assembly has no unsigned results.
        result = [jax.ShapeDtypeStruct(words[0].shape, jnp.int32)]
        operands = [words[k] for k in _read_by(plan, w)]
        return plt.elementwise_inline_asm(
            text, args=operands, constraints=constraints, pack=4, result_shape_dtypes=result
        )[0]

    return [pair(w) for w in range(0, plan.words, 2)]


def _read_by(plan: Plan, w: int) -> list[int]:
    """The words of codes that prefix words w and w + 1 are made of.

    Four at a time, of rows g and g + 8 in turn.
    """
    quads = sorted({byte // 16 for half in plan.halves[2 * w : 2 * w + 4] for byte in half.bytes})
    return [2 * quad + row_half for quad in quads for row_half in (0, 1)]


@functools.cache
def decode_assembly(plan: Plan, w: int) -> tuple[str, str]:
    """Returns (PTX, constraints) of prefix words w and w + 1.

    Operands: the result, words of codes.
    """
    read = _read_by(plan, w)
    lines = ["{", ".reg .b32 p, q;"]
    for result, (word, row_half) in enumerate(
        (word, row_half) for word in (w, w + 1) for row_half in (0, 1)
    ):
        for name, half in zip("pq", plan.halves[2 * word : 2 * word + 2], strict=True):
            low, high = (
                f"${4 + 4 * read.index(2 * (byte // 16) + row_half) + byte // 4 % 4}"
                for byte in half.bytes
            )
            first, second = (byte % 4 for byte in half.bytes)
            if low != high:  # first both into one register
                lines.append(f"prmt.b32 {name}, {low}, {high}, 0x00{4 + second}{first};")
                low, first, second = name, 0, 1
            factor, addend = multiplier(half.digit)
            lines.append(f"prmt.b32 {name}, {low}, 0, 0x4{second}4{first};")  # each below a zero
            lines.append(f"mad.lo.u32 {name}, {name}, {factor}, {addend};")
        lines.append(f"prmt.b32 ${result}, p, q, 0x7531;")
    lines.append("}")
    return "\n".join(lines), ",".join(["=&r"] * 4 + ["r"] * (4 * len(read)))


def decode_twin(plan: Plan, words: Sequence[jax.Array]) -> list[jax.Array]:
    """Computes in jnp what `decode_assembly` does, for all pairs."""
    codes = jnp.stack(words).reshape(-1, 2, words[0].size // 4, 4)  # [quads, row half, threads, e]
    codes = codes.transpose(1, 0, 3, 2)
    codes = codes.reshape(2, plan.piece_words, -1)  # [row half, words, threads]

    def prefixes_of(half: Half) -> jax.Array:
        low, high = ((codes[:, byte // 4] >> (8 * (byte % 4))) & 255 for byte in half.bytes)
        factor, addend = multiplier(half.digit)
        product = (low | high << 16) * jnp.uint32(factor) + jnp.uint32(addend)
        return ((product >> 8) & 255) | (product >> 24 << 8)

    halves = [prefixes_of(half) for half in plan.halves]  # [row half, threads] each
    prefix_words = [low | (high << 16) for low, high in zip(halves[::2], halves[1::2], strict=True)]
    pairs = jnp.stack(prefix_words).reshape(-1, 2, 2, words[0].size // 4)
    pairs = pairs.transpose(0, 3, 1, 2)  # [.., threads, word, row half]
    return list(lax.bitcast_convert_type(pairs, jnp.int32).reshape(plan.words // 2, -1))


# Operands: sums, two pairs of prefix words, four words of activations, sums so far.
MULTIPLY = "\n".join(
    ["{"]
    + [f"mov.b32 ${e}, ${16 + e};" for e in range(4)]
    + [
        f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{$0, $1, $2, $3}}, "
        f"{{${4 + 4 * k}, ${5 + 4 * k}, ${6 + 4 * k}, ${7 + 4 * k}}}, "
        f"{{${12 + 2 * k}, ${13 + 2 * k}}}, {{$0, $1, $2, $3}};"
        for k in range(2)
    ]
    + ["}"]
)


def multiply_add(
    prefix_words: Sequence[jax.Array], x: Sequence[jax.Array], sums: jax.Array, interpret: bool
) -> jax.Array:
    """Adds to sums the prefix words of a piece times words of activations.

    Prefix words are pairs of `decode`; two pairs take four words of activations.
    """
    if interpret:
        return multiply_twin(prefix_words, x, sums)
    result = [jax.ShapeDtypeStruct(sums.shape, jnp.int32)]
    constraints = ",".join(["=&r"] * 4 + ["r"] * 16)
    for first, second, four in zip(prefix_words[::2], prefix_words[1::2], x, strict=True):
        operands = [first, second, four, sums]
        (sums,) = plt.elementwise_inline_asm(
            MULTIPLY, args=operands, constraints=constraints, pack=4, result_shape_dtypes=result
        )
    return sums


def multiply_twin(
    prefix_words: Sequence[jax.Array], x: Sequence[jax.Array], sums: jax.Array
) -> jax.Array:
    """Computes in jnp what MULTIPLY does, for all words together."""

    def signed(words: jax.Array) -> jax.Array:  # [...] -> [..., 4 bytes]
        bytes_ = jnp.stack([(words >> (8 * i)) & 255 for i in range(4)], axis=-1).astype(jnp.int32)
        return (bytes_ ^ 128) - 128

    # [quad, pair, warps, g, t, word of the pair, row half]
    pairs = jnp.stack(prefix_words).reshape(len(x), 2, -1, 8, 4, 2, 2)
    # [quad, warps, column, t, pair, word of the pair, byte]
    b = signed(jnp.stack(x).reshape(len(x), -1, 8, 4, 2, 2))
    c = jnp.einsum("qpwgtkhb,qwctpkb->wghc", signed(pairs), b).reshape(-1, 8, 2, 4, 2)
    c = c.transpose(0, 1, 3, 2, 4)  # column = 2 t + parity: [warps, g, t, row half, parity]
    return sums + c.reshape(-1)
