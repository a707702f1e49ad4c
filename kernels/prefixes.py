"""Prefixes: how to multiply by dense bytes of five trits without taking the trits apart.

A byte of the layout `interleaved` holds five trits t_1..t_5 as q (see `atd.weights.layouts`). With
16 bits to compute in, one multiply-add gives a *prefix*, a signed byte,

    S_j = (3^j q + 128 - 128 3^j) >> 8 = sum_(i<=j) 3^(j-i) t_i,        j = 1..5, |S_j| <= 121

and t_j = S_j - 3 S_(j-1). A sum over trits is a sum over prefixes,

    sum_j a_j t_j = sum_j (a_j - 3 a_(j+1)) S_j,        a_6 = 0

so the difference goes into the activations, once for all rows, and no trit is ever isolated: the
activations are *folded*, and the differences are called coefficients. Where a_j = 3 a_(j+1) prefix
j is not needed at all. That is so between the trits of one *tied* weight,
u (3^(N-1) t_0 + ... + t_(N-1)), which lie side by side: five tied weights need 5, 6, 7, 8 prefixes
for N = 1, 2, 3, 4, not 5 N. Several sums over the same prefixes, one per base for free scales, cost
decoding once.

Activations are integers: x_k = round(x / max|x| * limit), as many bits as keep each coefficient in
three signed bytes (22 for N = 1 and free scales, 20.7, 19.2 and 17.6 for tied N = 2, 3, 4). Each
byte multiplies apart, in int8 with int32 sums, which are exact: results do not depend on the order
of anything.

The *piece* is what one thread takes of a row in a step: 16 bytes (48 for N = 3, so that pieces hold
whole cells), and 4 threads take 4 pieces side by side. `Plan` lists a piece's prefixes, two bytes
at a time as the two 16-bit halves of a multiplication, and two of those make a word of four
prefixes. Two bytes are a 32-bit word's 0 and 2, or 1 and 3; of tied N = 3 and 4, where bytes N
apart need the same prefixes, those.
"""

import math
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from atd.weights.layouts import THREADS_PER_ROW, TRITS_PER_BYTE, unit

LARGEST = 127 * (1 + 256 + 65536)  # what three signed bytes hold
MAX_BASES = 4
MAX_PLANES = 7  # of a trellis code


def multiplier(digit: int) -> tuple[int, int]:
    """Returns (factor, addend) of both 16-bit halves of a word at once.

    Byte 1 of half * factor + addend is the signed prefix S_digit.
    """
    addend = 128 - 128 * 3**digit
    return 3**digit, (addend * 65536 + addend) & 0xFFFFFFFF


@dataclass(frozen=True)
class Half:
    """The prefixes S_digit of two bytes of a piece."""

    bytes: tuple[int, int]
    digit: int  # 1 to 5


@dataclass(frozen=True, eq=False)
class Plan:
    """How to multiply by a ternary matrix of N bases: see the module.

    The coefficient of byte b of prefix word w for sum f is, all at [f, w, b],

        factor[0] x[param[0]] - factor[1] x[param[1]].

    Attributes:
        bases, tied: N, and whether scales are tied.
        piece_words: 32-bit words of a piece.
        halves: two of them make a prefix word, their four bytes in order.
        limit: the largest integer activation.
        param: parameters of the piece, int32 [2, sums, words, 4].
        factor: int32 [2, sums, words, 4].
    """

    bases: int
    tied: bool
    piece_words: int
    halves: tuple[Half, ...]
    limit: int
    param: np.ndarray
    factor: np.ndarray

    def __str__(self) -> str:
        """Returns the part of a kernel's name that says what it multiplies: "n2tied"."""
        return f"n{self.bases}{'tied' if self.tied else 'free'}"

    @property
    def sums(self) -> int:
        """1 for tied scales, N for free ones, each a linear functional of the activations."""
        return self.param.shape[1]

    @property
    def words(self) -> int:
        """Prefix words of a piece, a multiple of 4."""
        return len(self.halves) // 2

    @property
    def piece_params(self) -> int:
        return self.piece_words * 4 // self.bases * TRITS_PER_BYTE

    @property
    def step_words(self) -> int:
        """32-bit words of a row in a step, which is four pieces."""
        return THREADS_PER_ROW * self.piece_words

    def steps(self, row_words: int) -> int:
        """Returns the steps of a row of this many words.

        The last one may reach beyond its end, where activations are zero.
        """
        return -(-row_words // self.step_words)


@cache
def plan(bases: int, tied: bool) -> Plan:
    """Returns the plan for N bases; for one base tied and free are the same."""
    piece_words = 4 * unit(bases)[0]

    def trit(byte: int, digit: int) -> tuple[int, int]:
        """(parameter of the piece, base) of a trit."""
        cell, position = divmod(byte, bases)
        parameter, base = divmod(position * TRITS_PER_BYTE + digit - 1, bases)
        return cell * TRITS_PER_BYTE + parameter, base

    def needed(byte: int) -> set[int]:
        """The digits of which the prefixes are needed."""
        every = range(1, TRITS_PER_BYTE + 1)
        return {
            j
            for j in every
            if not tied or j == TRITS_PER_BYTE or trit(byte, j)[0] != trit(byte, j + 1)[0]
        }

    halves = tuple(
        Half((low, high), digit)
        for low, high in _pairs(bases, tied, 4 * piece_words)
        for digit in sorted(needed(low) | needed(high))
    )
    sums = 1 if tied else bases
    param, factor = (np.zeros((2, sums, len(halves) // 2, 4), np.int32) for _ in range(2))
    for i, half in enumerate(halves):
        later = [h.digit for h in halves if h.bytes == half.bytes and h.digit > half.digit]
        for high, byte in enumerate(half.bytes):
            at = i // 2, 2 * (i % 2) + high
            for f in range(sums):
                for term, digit in enumerate([half.digit, *later[:1]]):
                    parameter, base = trit(byte, digit)
                    value = 3 ** (bases - 1 - base) if tied else int(base == f)
                    param[term, f][at] = parameter
                    factor[term, f][at] = value * (3 ** (digit - half.digit) if term else 1)
    limit = LARGEST // int(factor.sum(axis=0).max())
    return Plan(bases, tied, piece_words, halves, limit, param, factor)


def _pairs(bases: int, tied: bool, count: int) -> list[tuple[int, int]]:
    """The bytes of a piece, two and two."""
    if tied and bases == 3:  # of twelve bytes; in this order they take the fewest registers
        in_twelve = ((1, 10), (2, 5), (0, 3), (6, 9), (4, 7), (8, 11))
        return [(i + a, i + b) for i in range(0, count, 12) for a, b in in_twelve]
    if tied and bases == 4:
        return [(i + a, i + a + 4) for i in range(0, count, 8) for a in range(4)]
    return [(i + odd, i + odd + 2) for i in range(0, count, 4) for odd in (0, 1)]


# --- activations ------------------------------------------------------------------------------


def columns(plan: Plan, tokens: int) -> int:
    """Returns the columns of int8 that this many tokens take: three bytes per sum and token."""
    return 3 * plan.sums * tokens


def slots_of(plan: Plan, steps: int, group_size: int) -> tuple[np.ndarray, int]:
    """Returns the scale groups of steps.

    Returns:
        (the first that each step touches, int [steps]; how many any step of any row touches at
        most).
    """
    width = THREADS_PER_ROW * plan.piece_params
    period = group_size // math.gcd(group_size, width)
    start = np.arange(max(steps, period)) * width
    first, last = start // group_size, (start + width - 1) // group_size
    return first[:steps], int((last - first).max()) + 1


def integers(x: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
    """Rounds x [M, in] to integers: round(x / largest * limit).

    Returns:
        (int32 [M, in], largest |x| of each token float32 [M], as it is).
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=1)
    size = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return jnp.round(wide / size[:, None] * limit).astype(jnp.int32), largest


def fold(
    plan: Plan, x: jax.Array, steps: int, group_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Folds activations into the coefficients of prefixes.

    Args:
        x: activations [M, in].
        steps: of a row.
        group_size: inputs per scale. Then the sums are [sums x slots], sum f of slot s over the
            parameters of each step's s-th group alone.

    Returns:
        (coefficients int32 [M, sums, steps, 4 threads, words, 4] in units of largest / limit,
        largest |x| float32 [M]). A token with an infinity or a NaN has NaN for its largest, and so
        for its results.
    """
    tokens, inputs = x.shape
    rounded, largest = integers(x, plan.limit)
    padded = jnp.pad(rounded, ((0, 0), (0, steps * THREADS_PER_ROW * plan.piece_params - inputs)))
    pieces = padded.reshape(tokens, 1, steps, THREADS_PER_ROW, plan.piece_params)
    if group_size is not None:
        first, slots = slots_of(plan, steps, group_size)
        parameter = jnp.arange(padded.shape[1], dtype=jnp.int32).reshape(1, *pieces.shape[2:])
        # [1, steps, threads, params]
        slot = parameter // group_size - first.astype(np.int32)[:, None, None]
        each = jnp.arange(slots, dtype=jnp.int32)[:, None, None, None]
        pieces = jnp.where(slot == each, pieces, 0)

    def term(i: int) -> jax.Array:  # [M, sums, slots, steps, threads, words, 4]
        taken = [
            jnp.take(pieces, plan.param[i, f], axis=-1) * plan.factor[i, f]
            for f in range(plan.sums)
        ]
        return jnp.stack(taken, axis=1)

    coefficients = term(0) - term(1)
    coefficients = coefficients.reshape(tokens, -1, *coefficients.shape[3:])
    return coefficients, jnp.where(jnp.isfinite(largest), largest, jnp.nan)


def signed_bytes(coefficients: jax.Array) -> jax.Array:
    """Cuts int32 [M, sums, ...] into bytes b0, b1, b2 [M, sums, 3, ...], each -128 to 127.

    The value is b0 + 256 b1 + 65536 b2.
    """
    bytes_, rest = [], coefficients
    for _ in range(3):
        low = ((rest + 128) & 255) - 128
        bytes_.append(low)
        rest = (rest - low) >> 8
    return jnp.stack(bytes_, axis=2)


def fragments(coefficients: jax.Array, columns_kept: int) -> jax.Array:
    """Puts coefficients of `fold` into words of four signed bytes.

    This defines the words that the kernel of `atd.kernels.triton.fold` writes; its tests compare.

    Returns:
        uint32 [steps, words, columns_kept, 4 threads]. Column (token, sum, byte) holds byte 0, 1 or
        2 of the coefficient, as in `signed_bytes`; columns beyond are 0.
    """
    tokens, sums, steps, threads, words, _ = coefficients.shape
    # [M, sums, 3, steps, threads, words, 4]
    split = signed_bytes(coefficients).astype(jnp.uint32) & 255
    word = split[..., 0] | (split[..., 1] << 8) | (split[..., 2] << 16) | (split[..., 3] << 24)
    flat = word.reshape(tokens * sums * 3, steps, threads, words)
    padded = jnp.pad(flat, ((0, columns_kept - flat.shape[0]), (0, 0), (0, 0), (0, 0)))
    return padded.transpose(1, 3, 0, 2)  # [steps, words, columns, threads]


def join(plan: Plan, products: jax.Array, tokens: int, largest: jax.Array) -> jax.Array:
    """Joins products of the bytes to sums over the activations themselves.

    Args:
        products: int32 [columns, rows], columns as `fragments` has them.
        tokens: M.
        largest: of `fold`, [M].

    Returns:
        float32 [M, sums, rows].
    """
    parts = products.reshape(tokens, -1, 3, products.shape[1]).astype(jnp.float32)
    total = parts[:, :, 2] * 65536.0 + (parts[:, :, 1] * 256.0 + parts[:, :, 0])  # [M, sums, rows]
    return total * np.float32(1 / plan.limit) * largest[:, None, None]
