"""Trellis codes of ternary sums: each trit also counts in the rows below it, and is chosen for all
of them.

A code repeats after P rows. Row o of a segment of L rows holds the trits of phase p = o mod P, and
trit i of phase p has taps a[p, i, 0..J]: it adds a[p, i, j] to the value of the row j below,
cyclically within the segment (*tail-biting*):

    w[o, k] = s[o] sum_(j, i) a[p, i, j] t_i[q, k],    q = (o - j) mod L,  p = q mod P

A trit with one tap is *loose*: it counts in its own row alone. One with more is *coded*: it is in
the *state* of the rows below it, of which there are at most 3^(coded trits alive). `snap` finds the
trits of a column that come nearest to what is wanted, by Viterbi over the states, rows one after
the other: exact for a segment whose first state is known. Loose trits need no state: what is left
for them is rounded.

Why it gains: at N trits per weight any quantizer of independent Gaussians of variance 1 has a mean
square error of at least 3^(-2N) (rate-distortion bound). Trits that are chosen row by row stay 3.7
dB (N = 2) and 4.5 dB (N = 3) above that bound; the codes below 1.0 to 2.0 dB, at the same bytes and
the same ternary products: the taps are a short filter over the outputs of T_i x.

Sources: trellis-coded quantization, Marcellin & Fischer 1990; tail-biting, Ma & Wolf 1986; why sums
of shifted symbols are good codes (marginals that are nearly Gaussian, a white spectrum), Eriksson
et al. 1008.2008; trellis codes of weights with a nonlinear lookup, QTIP 2406.11235."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atd.weights.codes import Code

SEAM_ROWS = 32  # rows on either side of the seam that a free run looks at to find the state there
FAR = 1e20  # cost of a state that is excluded
START = 1.0  # cost at the start: not 0, or numbers in the low bits of a cost would be denormal

Way = tuple[list[jax.Array], list[jax.Array]]
Search = Callable[..., Way]


# --- the trellis of a code ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Phase:
    """What happens in a row of one phase.

    A state is a number in base 3 whose digits 0, 1, 2 are the coded trits -1, 0, 1 that are alive,
    in the order of their birth. In front of the row it is state[d, k], with d the trits that count
    here for the last time and k the others. The row's value is head[d, k] + new[u] + a sum of its
    loose trits, with u its new coded trits; the state behind the row is k U + u.
    """

    alive: int  # coded trits in front of the row
    ending: tuple[int, ...]  # which of them count here for the last time
    state: np.ndarray  # int32 [D, K]
    head: np.ndarray  # float32 [D, K]
    new: np.ndarray  # float32 [U]
    loose: np.ndarray  # float32 [F]: sums of loose trits
    coded_trits: np.ndarray  # int8 [U, coded]
    loose_trits: np.ndarray  # int8 [F, loose]
    coded: tuple[int, ...]  # which trits of the phase
    loose_at: tuple[int, ...]

    @property
    def behind(self) -> int:
        """States behind the row."""
        return self.state.shape[1] * len(self.new)

    @property
    def mask(self) -> int:
        """The lowest bits of a cost, in which the number d of the ended trits has room."""
        return (1 << (len(self.head) - 1).bit_length()) - 1


@lru_cache
def phases(code: Code) -> tuple[Phase, ...]:
    """The phases of a code's trellis, row after row."""
    return tuple(_phase(code, row) for row in range(code.period))


def _phase(code: Code, row: int) -> Phase:
    mine = code.taps[row % code.period]
    coded = tuple(i for i, taps in enumerate(mine) if len(taps) > 1)
    loose = tuple(i for i, taps in enumerate(mine) if len(taps) == 1)
    coded_trits, loose_trits = _words(len(coded)), _words(len(loose))
    older = [
        taps[age:]  # of the trits that are alive in front of the row: what they add from here on
        for age in range(code.memory, 0, -1)
        for taps in code.taps[(row - age) % code.period]
        if len(taps) > age
    ]
    ending = tuple(n for n, taps in enumerate(older) if len(taps) == 1)
    staying = tuple(n for n in range(len(older)) if n not in ending)
    numbers = np.arange(3 ** len(older)).reshape([3] * len(older))
    state = numbers.transpose(*ending, *staying).reshape(3 ** len(ending), -1)
    head = _words(len(older)) @ np.array([taps[0] for taps in older])
    return Phase(
        len(older),
        ending,
        state.astype(np.int32),
        head[state].astype(np.float32),
        (coded_trits @ np.array([mine[i][0] for i in coded])).astype(np.float32),
        (loose_trits @ np.array([mine[i][0] for i in loose])).astype(np.float32),
        coded_trits,
        loose_trits,
        coded,
        loose,
    )


def _words(trits: int) -> np.ndarray:
    """int8 [3^trits, trits]: every combination, in the order of their numbers in base 3."""
    return np.array(list(product((-1, 0, 1), repeat=trits)), np.int8).reshape(3**trits, trits)


# --- the search -----------------------------------------------------------------------------------


def best_way(target, weight, seam, steps: tuple[Phase, ...]) -> Way:
    """Finds the way through the states that costs least: min sum_o weight[o] (target[o] - v[o])^2
    over the values v that a code can make, in units of the scale.

    Args:
        target, weight: float32 [rows, segments], whole periods of rows.
        seam: int32 [segments], the state in which a way begins and ends. None: any two.
        steps: the phases of the code.

    Returns:
        (states in front of the rows, numbers of their new coded trits): for each phase int32
        [periods, segments].
    """
    shape = 3 ** steps[0].alive, target.shape[1]
    if seam is None:
        cost = jnp.full(shape, START, jnp.float32)
    else:
        cost = jnp.where(jnp.arange(shape[0])[:, None] == seam, np.float32(START), np.float32(FAR))
    cost, back = _forward(cost, target, weight, steps)
    last = jnp.argmin(cost, axis=0).astype(jnp.int32) if seam is None else seam
    return _trace(last, back, steps)


def snap(
    x, scale, code: Code, length: int, seam=None, search: Search = best_way, importance=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the trits of a column whose values come nearest to x: min sum_o c[o] (x[o] - w[o])^2.

    Args:
        x: float32 [rows], rows a multiple of `length`: whole segments.
        scale: float32 [rows], s[o] >= 0. A row of scale 0 has the value 0 whatever its trits.
        code: the code; its period divides `length`, and its memory is below `length`.
        length: L, rows per segment.
        seam: int32 [segments], the state in front of the first row of each segment, which is also
            the one behind its last. None: a free run over the last and first SEAM_ROWS rows finds
            it.
        search: `best_way`, or what does the same.
        importance: c float32 [rows], what an error of each row costs; None: the same in all rows.

    Returns:
        (trits int8 [rows / period, code.trits], those of a period's rows side by side;
        values float32 [rows]; seam int32 [segments]).
    """
    steps = phases(code)
    inverse, weight = per_row(scale, importance)
    target, weight = (a.reshape(-1, length).T for a in (x * inverse, weight))  # [L, segments]
    segments = target.shape[1]
    if seam is None:
        seam = _seam(target, weight, steps, search)
    before, symbols = search(target, weight, seam, steps)
    numbers, values = [], []
    for p, step in enumerate(steps):  # rows of one phase: [periods, segments]
        value = jnp.asarray(by_state(step))[before[p]] + jnp.asarray(step.new)[symbols[p]]
        number = _nearest(target[p :: len(steps)] - value, step.loose)
        numbers.append(number)
        values.append(value + jnp.asarray(step.loose)[number])
    trits = trits_of(symbols, numbers, steps).swapaxes(0, 1)  # [segments, periods, trits]
    value = (
        jnp.stack(values, axis=1).reshape(length, segments).T
    )  # [periods, P, segments] -> [segments, L]
    return trits.reshape(-1, trits.shape[-1]), value.reshape(-1) * scale, seam


def per_row(scale, importance=None) -> tuple[jax.Array, jax.Array]:
    """Returns 1 / s, or 0 for a scale of 0, and the weights c s^2 of errors in units of the scale,
    relative to their mean: float32 [rows] each.
    """
    weight = scale * scale if importance is None else importance * scale * scale
    weight /= jnp.maximum(jnp.mean(weight), 1e-30)
    return jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1.0), 0.0), weight


def trits_of(symbols, numbers, steps: tuple[Phase, ...]) -> jax.Array:
    """Returns the trits of periods, int8 [..., trits].

    Args:
        symbols, numbers: for each phase, the numbers of the new coded trits and of the sum of loose
            ones, int [...].
    """
    parts = []
    for step, symbol, number in zip(steps, symbols, numbers, strict=True):
        mine = jnp.zeros((*symbol.shape, len(step.coded) + len(step.loose_at)), jnp.int8)
        mine = mine.at[..., step.coded].set(jnp.asarray(step.coded_trits)[symbol])
        parts.append(mine.at[..., step.loose_at].set(jnp.asarray(step.loose_trits)[number]))
    return jnp.concatenate(parts, axis=-1)


def segments_of(rows: int, length: int) -> list[tuple[int, int, int]]:
    """Returns (first row, row behind the last, rows of a segment): of the whole segments of a
    column, and of the rest behind them, which is a segment of its own.
    """
    whole = rows // length * length
    parts = [(0, whole, length), (whole, rows, rows - whole)]
    return [(start, stop, length) for start, stop, length in parts if stop > start]


def snap_column(
    x, scale, code: Code, length: int, seam=None, search: Search = best_way, importance=None
):
    """`snap` of a column of any number of rows: behind the whole segments, the rest of the rows is
    a segment of its own.
    """
    found = []
    for start, stop, rows in segments_of(len(x), length):
        first = start // length
        known = None if seam is None else seam[first : first + (stop - start) // rows]
        costs = None if importance is None else importance[start:stop]
        found.append(snap(x[start:stop], scale[start:stop], code, rows, known, search, costs))
    trits, values, seams = (jnp.concatenate(arrays) for arrays in zip(*found, strict=True))
    return trits, values, seams


def _seam(target, weight, steps: tuple[Phase, ...], search: Search) -> jax.Array:
    """The state in front of the first row of each segment, on the best way through the rows around
    the seam.
    """
    period, around = len(steps), rows_around_seam(len(target), len(steps))
    target, weight = (jnp.concatenate([a[-around:], a[:around]]) for a in (target, weight))
    before, _ = search(target, weight, None, steps)
    return before[0][around // period]


def rows_around_seam(length: int, period: int) -> int:
    """Returns how many rows on either side of the seam of a segment a free run looks at."""
    return max(period, min(SEAM_ROWS, length // 2) // period * period)


def _forward(cost, target, weight, steps: tuple[Phase, ...]) -> tuple[jax.Array, list[jax.Array]]:
    """Runs through rows: cost [states, segments] in front, target and weight [rows, segments] ->
    (cost behind, the ended trits of the best way into each state: uint8 [periods, states, segments]
    by phase)."""
    period = len(steps)
    # Tables behind a barrier: folded into the program, they keep LLVM from making vectors of its
    # loops.
    tables = lax.optimization_barrier([(jnp.asarray(s.head), jnp.asarray(s.new)) for s in steps])

    def rows(cost, given):
        back = []
        for p, (step, table) in enumerate(zip(steps, tables, strict=True)):
            cost, ended = _row(cost, given[0][p], given[1][p], step, *table)
            back.append(ended)
        return cost, back

    shape = (-1, period, target.shape[1])
    return lax.scan(rows, cost, (target.reshape(shape), weight.reshape(shape)))


def _row(cost, y, w, step: Phase, head, new) -> tuple[jax.Array, jax.Array]:
    """One row: cost [states before, segments] -> (cost [states behind, segments], ended trits uint8
    of the best way)."""
    segments = cost.shape[-1]
    cost = cost.reshape(*[3] * step.alive, segments)
    costs = []  # [K, 1, segments], of the states with the same ended trits
    for ended in product(range(3), repeat=len(step.ending)):
        at = dict(zip(step.ending, ended, strict=True))
        of_these = cost[tuple(at.get(n, slice(None)) for n in range(step.alive))]
        costs.append(of_these.reshape(-1, 1, segments))
    heads = [head[d][:, None, None] for d in range(len(costs))]
    best = least_cost(costs, heads, y - new[:, None], w, step).reshape(-1, segments)
    # Without the barrier XLA computes a row anew for each of the next row's readers.
    best = lax.optimization_barrier(best)
    return best, ended_trits(best, step).astype(jnp.uint8)


def least_cost(costs: list, heads: list, rest, w, step: Phase):
    """Returns the cost behind a row of the best way into each state: min_d costs[d] + w (rest -
    heads[d] - loose trits)^2.

    The number d of the ended trits rides in the lowest bits of a cost: a minimum then carries it
    along, at a third of the price of comparing and selecting. Costs are off by 2^-18 of themselves
    at most.

    Args:
        costs, heads: for each d, the cost in front of the row, and what the older trits add to its
            value.
        rest: what is wanted of the row, without its new coded trits.
        w: the weight of the row's error.
    """
    ways = []
    for d, (cost, head) in enumerate(zip(costs, heads, strict=True)):
        way = cost + w * _square(rest - head, step.loose)
        if step.mask:
            bits = lax.bitcast_convert_type(way, jnp.int32)
            way = lax.bitcast_convert_type((bits & ~step.mask) | d, jnp.float32)
        ways.append(way)
    return reduce(jnp.minimum, ways)


def ended_trits(best, step: Phase):
    """Returns the number of the ended trits of the ways whose costs `least_cost` found, int32."""
    return lax.bitcast_convert_type(best, jnp.int32) & step.mask


def _square(error, loose: np.ndarray):
    """What the nearest sum of loose trits leaves of an error, squared."""
    size = rest = jnp.abs(error)
    for level in np.unique(np.abs(loose)).tolist()[1:]:
        rest = jnp.minimum(rest, jnp.abs(size - np.float32(level)))
    return rest * rest


def _nearest(rest, loose: np.ndarray):
    """The number of the sum of loose trits that is nearest."""
    return jnp.argmin(jnp.stack([jnp.abs(rest - value) for value in loose]), axis=0)


def _trace(last, back: list[jax.Array], steps: tuple[Phase, ...]) -> Way:
    """Goes back along the best way: state behind the last row int32 [segments] -> (states in front
    of each row, its new coded trits), int32 [periods, segments] each, by phase."""

    def rows(state, ended):
        before, symbols = [], []
        for step, d in reversed(list(zip(steps, ended, strict=True))):
            d = jnp.take_along_axis(d, state[None], axis=0)[0].astype(jnp.int32)
            kept, symbol = state // len(step.new), state % len(step.new)
            state = jnp.asarray(step.state).reshape(-1)[d * step.state.shape[1] + kept]
            before.append(state)
            symbols.append(symbol)
        return state, (before[::-1], symbols[::-1])

    _, (before, symbols) = lax.scan(rows, last, back, reverse=True)
    return before, symbols


def by_state(step: Phase) -> np.ndarray:
    """Returns what the trits in front of a row add to its value, float32 [states]."""
    table = np.empty(step.head.size, np.float32)
    table[step.state] = step.head
    return table
