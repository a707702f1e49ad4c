"""Activations folded, rounded and cut into bytes for `gemv`, in one Pallas kernel.

`prefixes.fold` and `prefixes.fragments`, which define the result, are three kernels of XLA's, and
for one token a launch costs as much as the arithmetic of a layer. Every block looks for the largest
|x| of each token itself (some kB, out of the cache), then makes its share of the words. A norm in
front of the product is computed on the way: it would be two more launches. For more than SEARCHED
tokens that is more work than launches, and XLA does both first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels.packed import Norm
from atd.kernels.prefixes import THREADS_PER_ROW, Plan
from atd.kernels.triton.geometry import BYTES, Geometry
from atd.kernels.triton.ptx import divided, launch_next, plt

SEARCHED = 2  # tokens
SIZE = 128  # words of a block, one per thread: few, because there are multiprocessors enough
WARPS = 4
CHUNK = 16384  # elements a block looks at together for the largest; half as many of a normed token
LEAST = 2.0**-104  # largest |x| for which limit / |x| is finite; a token of less is zeros
ROUNDS = 1.5 * 2.0**23  # x + ROUNDS has the bits ROUNDS_BITS + round(x), |x| < 2^22
ROUNDS_BITS = 0x4B400000
SIGNED = 0x808080  # added to a coefficient, it makes its three bytes count from 0 on


def fold(g: Geometry, x: jax.Array, norm: Norm | None = None) -> tuple[jax.Array, jax.Array]:
    """Folds activations x [tokens, in] for `gemv.multiply`.

    Returns:
        (words, largest |x| float32 [tokens], which is NaN for a token with an infinity or a NaN).
        The words, uint32, are in the order: steps, prefix words / 4, sets of columns, columns kept
        of each, 4 threads, 4 prefix words.
    """
    known = []  # the largest of each token, where XLA looks for them
    if g.tokens > SEARCHED:
        x, norm = x.astype(jnp.float32) if norm is None else norm(x), None
        known = [jnp.max(jnp.abs(x), axis=1)]
    gain = [] if norm is None else [norm.gain.astype(jnp.float32)]
    sets, kept = g.columns.sets, g.columns.kept
    words = g.padded_steps * g.plan.words * sets * kept * THREADS_PER_ROW
    shapes = [
        jax.ShapeDtypeStruct((words,), jnp.uint32),
        jax.ShapeDtypeStruct((g.tokens,), jnp.float32),
    ]
    folded, *found = pl.pallas_call(
        functools.partial(_kernel, g=g, eps=0.0 if norm is None else norm.eps),
        out_shape=shapes[: 1 if known else 2],
        grid=(-(-words // SIZE),),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=g.interpret,
        name=f"ternary_fold_{g.plan}",
    )(x.reshape(-1), _table(g.plan), *gain, *known)
    return folded, found[0] if found else jnp.where(jnp.isfinite(known[0]), known[0], jnp.nan)


def _kernel(x_ref, table_ref, *rest_refs, g: Geometry, eps: float):
    searches = g.tokens <= SEARCHED
    *gain_ref, folded_ref, largest_ref = rest_refs if searches else (*rest_refs[1:], rest_refs[0])
    plan, columns = g.plan, g.columns
    index = pl.program_id(0) * SIZE + lax.iota(jnp.int32, SIZE)
    step_params = THREADS_PER_ROW * plan.piece_params

    rest, in_quad = divided(index, 4)
    rest, thread = divided(rest, THREADS_PER_ROW)
    rest, column = divided(rest, columns.kept)
    rest, set_ = divided(rest, columns.sets)
    step, quad = divided(rest, plan.words // 4)
    word = quad * 4 + in_quad
    octet, byte = divided(set_, BYTES)
    token, sum_, slot, byte_of_column = columns.of(octet, column)
    byte = byte if columns.apart else byte_of_column
    used = token < g.tokens

    def load(token, parameter, mask) -> tuple[jax.Array, ...]:
        """What is given of a parameter, float32: x, and the norm's gain."""

        def of(ref, at) -> jax.Array:
            zero = jnp.zeros((), ref.dtype)
            return plt.load(ref.at[at], mask=mask, other=zero).astype(jnp.float32)

        return of(x_ref, token * g.inputs + parameter), *(of(ref, parameter) for ref in gain_ref)

    def made(given: tuple[jax.Array, ...]) -> jax.Array:
        """The activations, but for a norm's factor for the token."""
        return given[0] * given[1] if len(given) > 1 else given[0]

    def byte_of(b: int) -> list[tuple[jax.Array, jax.Array]]:
        """(activation, factor), twice, of a byte of the words."""
        entry = plt.load(table_ref.at[(sum_ * plan.words + word) * 4 + b], mask=used, other=0)
        terms = []
        for i in range(2):
            piece = (step * THREADS_PER_ROW + thread) * plan.piece_params
            parameter = piece + ((entry >> (8 * i)) & 255)
            mine = used & (parameter < g.inputs)
            if g.group_size is not None:
                group, first = (
                    divided(k, g.group_size)[0] for k in (parameter, step * step_params)
                )
                mine &= group - first == slot
            terms.append((made(load(token, parameter, mine)), (entry >> (16 + 8 * i)) & 255))
        return terms

    bytes_ = [byte_of(b) for b in range(4)]  # on their way before anything waits
    if searches:
        of_token = jnp.ones((SIZE,), jnp.float32)
    else:
        of_token = plt.load(largest_ref.at[token], mask=used, other=1.0)
    for t in range(g.tokens if searches else 0):
        of_this = functools.partial(load, t)
        largest, mean_square = _largest(of_this, made, g.inputs, bool(gain_ref))
        of_token = jnp.where(token == t, largest, of_token)
        factor = 1.0 if mean_square is None else lax.rsqrt(mean_square + eps)
        largest_ref[t] = jnp.where(largest < jnp.inf, largest * factor, jnp.nan)

    scale = jnp.where((of_token > LEAST) & (of_token < jnp.inf), plan.limit / of_token, 0.0)

    def rounded(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x * scale + jnp.float32(ROUNDS), jnp.int32) - ROUNDS_BITS

    found = launch_next(bytes_[0][0][1], g.interpret).astype(jnp.uint32)  # zeros so far
    for b, ((first, times), (second, second_times)) in enumerate(bytes_):
        value = rounded(first) * times - rounded(second) * second_times
        chosen = (((value + SIGNED) >> (8 * byte)) & 255) ^ 128
        found |= chosen.astype(jnp.uint32) << (8 * b)
    plt.store(folded_ref.at[index], found, mask=index < folded_ref.shape[0])


def _table(plan: Plan) -> jax.Array:
    """Both parameters and both factors of each coefficient in bytes: int32 [sums x words x 4]."""
    (first, second), (times, second_times) = plan.param, plan.factor
    return jnp.asarray(first | second << 8 | times << 16 | second_times << 24).reshape(-1)


def _largest(load, made, count: int, normed: bool) -> tuple[jax.Array, jax.Array | None]:
    """(max |x|, infinity where one is NaN; mean square of the count elements, if normed)."""
    size = min(CHUNK // (1 + normed), pl.next_power_of_2(count))
    offsets = lax.iota(jnp.int32, size)

    def chunk(i, found):
        at = i * size + offsets
        given = load(at, at < count)
        value = made(given)
        finite = jnp.where(value == value, jnp.abs(value), jnp.inf)  # a NaN counts as infinite
        squares = (total + given[0] * given[0] for total in found[1:])
        return jnp.maximum(found[0], finite), *squares

    chunks = -(-count // size)
    zero = (jnp.zeros((size,), jnp.float32),) * (1 + normed)
    largest, *squares = lax.fori_loop(0, chunks, chunk, zero) if chunks > 1 else chunk(0, zero)
    return jnp.max(largest), jnp.sum(squares[0]) / count if normed else None
