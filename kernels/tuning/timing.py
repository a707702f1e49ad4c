"""How long a multiplication takes on this device, its weights coming from memory.

jax has no clock on the device, a call from the host costs more than a small multiplication, and
weights that were just read still lie in the L2. So one jitted call runs a *chain*, `trips` rounds
over several different matrices:

    each multiplication waits for the one before: its activations hold a vanishing part of that
    one's result a round reads at least COLD_BYTES: different matrices, and where too many would be
    needed, a buffer between the rounds, whose time is measured alone and taken off a call lasts
    CALL_SECONDS, so that the host's part is below a hundredth

and the figure is the median over calls, divided by the multiplications of a call.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from atd.kernels.tuning.samples import random_weight
from atd.weights import DenseType, TernaryType, Weight

Multiply = Callable[[jax.Array, Weight], jax.Array]

COLD_BYTES = 128 << 20  # twice the L2 of an H200, more than that of any GPU but a B200
MOST_COPIES = 32  # different matrices in a round: each is compiled into it
CALL_SECONDS = 0.02
COPY_BYTES = 1 << 30
# For guesses of how long a call takes, which need be right within a factor of a few.
GUESSED_BYTES, GUESSED_FLOPS, GUESSED_LAUNCH = 2e12, 3e14, 3e-6


@dataclass(frozen=True)
class Effort:
    """How much to spend on a figure.

    Attributes:
        call_seconds: that one call lasts.
        repeats: calls, of which the median is taken.
        cold_bytes: read in a round, so that nothing is left in a cache.
        most_copies: different matrices in a round.
    """

    call_seconds: float = CALL_SECONDS
    repeats: int = 7
    cold_bytes: int = COLD_BYTES
    most_copies: int = MOST_COPIES


# Whether it runs, on any machine.
TINY = Effort(call_seconds=0, repeats=2, cold_bytes=1 << 16, most_copies=1)


@dataclass(frozen=True)
class Chain:
    """A call to be timed: how to lower it, and the rounds in it."""

    lower: Callable[[], Any]
    trips: int


@dataclass(frozen=True)
class Stack:
    """Different matrices of one type, and what else is read so that each is cold at its turn."""

    weights: tuple[Weight, ...]
    between: jax.Array  # float32, empty where the matrices are enough


def stack(type: TernaryType | DenseType, effort: Effort, layout: str = "tiles") -> Stack:
    """Returns as many matrices of a type as a round needs, at most effort.most_copies.

    Args:
        layout: in which a ternary one is packed.
    """
    first = random_weight(type, 0, layout)
    copies = min(effort.most_copies, max(2, math.ceil(effort.cold_bytes / first.type.nbytes)))
    cold = copies * first.type.nbytes >= effort.cold_bytes
    weights = (first, *(random_weight(type, seed, layout) for seed in range(1, copies)))
    return Stack(weights, _buffer(0 if cold else effort.cold_bytes // 4))


def chain(multiply: Multiply, x: jax.Array, matrices: Stack, effort: Effort) -> Chain:
    """Returns a call that sends x [M, in] through the matrices, neither traced nor compiled yet."""
    weight = matrices.weights[0].type
    copies, tokens = len(matrices.weights), x.shape[0]
    each = max(
        weight.nbytes / GUESSED_BYTES,
        2 * tokens * math.prod(weight.shape) / GUESSED_FLOPS,
        GUESSED_LAUNCH,
    )
    trips = min(1000, max(1, round(effort.call_seconds / (copies * each))))
    lower = jax.jit(_rounds(multiply, trips)).lower
    return Chain(partial(lower, x, matrices.weights, matrices.between), trips)


def compile_all(lowerings: Sequence[Callable[[], Any]]) -> list[Any]:
    """Lowers and compiles side by side; what does not compile gives its exception."""

    def attempt(lower: Callable[[], Any]):
        try:
            return lower().compile()
        except Exception as error:  # one that does not compile must not end the run
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(attempt, lowerings))


def seconds(compiled: Any, trips: int, x: jax.Array, matrices: Stack, effort: Effort) -> float:
    """Returns the seconds of one multiplication, of a compiled chain of this many trips."""
    call = median(_calls(lambda: compiled(x, matrices.weights, matrices.between), effort.repeats))
    if matrices.between.size:
        # On a busy machine the difference can be below zero; nothing may look infinitely fast.
        call = max(call - trips * _seconds_between(matrices.between.size, effort), call / 100)
    return call / (trips * len(matrices.weights))


def copy_bytes_per_second(nbytes: int = COPY_BYTES, calls: int = 8, repeats: int = 7) -> float:
    """Returns the rate of copying a large array on the device, bytes read and written."""
    copy = jax.jit(jnp.copy)
    source = jnp.zeros(nbytes // 4, jnp.uint32)

    def several():
        for _ in range(calls - 1):
            copy(source)
        return copy(source)  # calls run in order, so the last one ends last

    return 2 * nbytes * calls / median(_calls(several, repeats))


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a plain table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def _rounds(multiply: Multiply, trips: int):
    """What a chain runs: `trips` rounds over the matrices."""
    multiply = jax.jit(multiply)  # traced and lowered once for all copies

    def run(x: jax.Array, weights: tuple[Weight, ...], between: jax.Array):
        """x after all rounds, and the results of the last round: each is returned, so none is
        computed in part."""

        def after(x: jax.Array, y: jax.Array) -> jax.Array:
            if x.shape[0] <= 16:  # in the loop over x or y that is there anyway
                return x + (y[:1, :1] * 1e-30).astype(x.dtype)
            # many activations are not read once more
            return x.at[0, 0].add((y[0, 0] * 1e-30).astype(x.dtype))

        def once(_, carry):
            x, results = carry[0], []
            for weight in weights:
                # Behind a barrier nothing depends on the weights alone, which XLA would move out
                # of the loop.
                x, weight = lax.optimization_barrier((x, weight))
                y = multiply(x, weight)
                x = after(x, y)
                results.append(y)
            if between.size:
                x, read = lax.optimization_barrier((x, between))
                x = after(x, jnp.sum(read, keepdims=True)[None])
            return x, tuple(results)

        shapes = [jax.eval_shape(multiply, x, weight) for weight in weights]
        zeros = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)
        return lax.fori_loop(0, trips, once, (x, zeros))

    return run


def _calls(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of some calls, after one that is not counted."""
    jax.block_until_ready(call())
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        samples.append(time.perf_counter() - started)
    return samples


@cache
def _buffer(size: int) -> jax.Array:
    return jnp.ones(size, jnp.float32)


@cache
def _seconds_between(size: int, effort: Effort) -> float:
    """Seconds of reading the buffer once."""
    x = jnp.ones((1, 8), jnp.bfloat16)
    trips = max(1, round(effort.call_seconds / (4 * size / GUESSED_BYTES)))
    compiled = jax.jit(_rounds(lambda x, weight: x, trips)).lower(x, (), _buffer(size)).compile()
    return median(_calls(lambda: compiled(x, (), _buffer(size)), effort.repeats)) / trips
