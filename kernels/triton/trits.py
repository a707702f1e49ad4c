"""Words of codes -> weights as 16-bit numbers, for the ways of many tokens: integers that are
exact, two words at a time.

A unit's word of codes and its neighbour's, byte j of both as the 16-bit halves of a register: with
r what is left of q,

    r 3^n = 256 u + r'      u: the next n trits as a number in base 3, 0 to 3^n - 1; r' what is left

of both bytes in one multiplication, u in bytes 1 and 3. u below a constant byte is the number 128 +
u in bfloat16, 1024 + u in float16; what it has too much is taken off in the same format. A weight's
trits can end in the next byte: u = 3^m u_1 + u_2.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atd.kernels.triton.ptx import plt
from atd.weights import TernaryType, level_weights
from atd.weights.layouts import TRITS_PER_BYTE

# dtype -> the byte above u, the number that 0 becomes with it, one, and the name of the type in
# instructions.
FORMATS = {
    jnp.dtype(jnp.bfloat16): (0x43, 128, 0x3F80, "bf16x2"),
    jnp.dtype(jnp.float16): (0x64, 1024, 0x3C00, "f16x2"),
}


def integers_of(
    words: Sequence[jax.Array], type: TernaryType, dtype: jax.typing.DTypeLike, interpret: bool
) -> Callable[[int], list[jax.Array]]:
    """Returns what the scales of a parameter multiply, by the number of the parameter in its unit.

    Args:
        words: of units, uint32 [...] each.
        type: of the matrix.
        dtype: bfloat16 or float16.
        interpret: whether to compute without PTX.

    Returns:
        parameter -> [...] in dtype: one integer of tied weights, one per base of free ones.
    """
    digits = functools.cache(functools.partial(_digit, words))
    together = type.bases if type.tied else 1  # trits of a number

    def integers(parameter: int) -> list[jax.Array]:
        first = parameter * type.bases
        numbers = [first] if type.tied else range(first, first + type.bases)
        if not interpret:
            return [_number(words, n, together, type.bases, jnp.dtype(dtype)) for n in numbers]
        return [twin(digits, _trits(n, together, type.bases)).astype(dtype) for n in numbers]

    return integers


def _trits(first: int, count: int, bases: int) -> list[tuple[int, int]]:
    """(byte, digit from 0 on) of trits of a unit, which lie parameter by parameter in a cell."""
    cell, within = divmod(first, TRITS_PER_BYTE * bases)
    places = (divmod(i, TRITS_PER_BYTE) for i in range(within, within + count))
    return [(cell * bases + byte, digit) for byte, digit in places]


def _digit(words: Sequence[jax.Array], byte: int, digit: int) -> jax.Array:
    """A trit + 1, int32."""
    rest = ((words[byte // 4] >> (8 * (byte % 4))) & 255).astype(jnp.int32)
    return (((rest * 3**digit) & 255) * 3) >> 8


def twin(digits: Callable[[int, int], jax.Array], number: Sequence[tuple[int, int]]) -> jax.Array:
    """Computes in jnp, int32, what `assembly` does."""
    levels = (int(level) for level in level_weights(len(number)))
    terms = [(digits(*trit) - 1) * level for trit, level in zip(number, levels, strict=True)]
    return functools.reduce(operator.add, terms)


def _number(
    words: Sequence[jax.Array], first: int, count: int, bases: int, dtype: jnp.dtype
) -> jax.Array:
    """The integer of `count` trits from trit `first` on, by PTX."""
    text, constraints, read = assembly(first, count, bases, dtype)
    result = [jax.ShapeDtypeStruct(words[0].shape, dtype)]
    args = [words[word] for word in read]
    return plt.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=2, result_shape_dtypes=result
    )[0]


@functools.cache
def assembly(
    first: int, count: int, bases: int, dtype: jnp.dtype
) -> tuple[str, str, tuple[int, ...]]:
    """Returns (PTX, constraints, words read) of the integer of `count` trits of two units.

    Operands: the result, both units' words of each that is read. A byte is taken apart number by
    number, so that what numbers have in common is the same, which ptxas computes once.
    """
    above, zero, one, name = FORMATS[dtype]
    number = _trits(first, count, bases)
    read = tuple(sorted({byte // 4 for byte, _ in number}))
    lines = ["{", ".reg .b32 h, u, v;"]
    for byte in sorted({byte for byte, _ in number}):
        digits = [digit for b, digit in number if b == byte]
        word, j = 1 + 2 * read.index(byte // 4), byte % 4
        lines += [f"prmt.b32 h, ${word}, ${word + 1}, 0x0{4 + j}0{j};", "and.b32 h, h, 0x00FF00FF;"]
        starts = [
            d
            for d in range(digits[0] + 1)
            if d == 0 or (byte % bases * TRITS_PER_BYTE + d) % count == 0
        ]
        for start, end in itertools.pairwise(starts):
            lines += [f"mul.lo.u32 h, h, {3 ** (end - start)};", "and.b32 h, h, 0x00FF00FF;"]
        lines.append(f"mul.lo.u32 h, h, {3 ** len(digits)};")
        if len(digits) == count:
            lines.append(f"prmt.b32 u, h, 0x{4 * f'{above:02X}'}, 0x4341;")
        elif byte == number[0][0]:
            lines.append("prmt.b32 u, h, 0, 0x4341;")
        else:
            lines += ["prmt.b32 v, h, 0, 0x4341;", f"mad.lo.u32 u, u, {3 ** len(digits)}, v;"]
    if number[0][0] != number[-1][0]:
        lines.append(f"or.b32 u, u, 0x{2 * f'{above:02X}00'};")
    off = np.array(-(zero + (3**count - 1) // 2), dtype).view(np.uint16).item()
    lines += [
        f"mov.b32 v, 0x{2 * f'{off:04X}'};",
        f"mov.b32 h, 0x{2 * f'{one:04X}'};",
        f"fma.rn.{name} $0, u, h, v;",
        "}",
    ]
    return "\n".join(lines), ",".join(["=&r", *["r"] * (2 * len(read))]), read
