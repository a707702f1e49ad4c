"""The search for the trits of a column on NVIDIA GPUs: `atd.decomposition.trellis.best_way` in one
Pallas kernel for Triton.

A scan over rows launches several kernels per row; this is one launch for all rows of all segments.
A block of threads has one segment, and a thread one or a few states. Costs go from row to row
through memory that only the block's own multiprocessor uses, and which its L1 therefore holds:
each thread reads the costs of the states from which its own can be reached, and writes that of the
best way. The state from which that way came is written too, and at the end one read per row
follows the best way back.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from atd.decomposition import trellis
from atd.decomposition.trellis import FAR, START, Phase, Search, Way, ended_trits, least_cost
from atd.decomposition.walk_kernel import barrier, errs
from atd.kernels.triton.backend import Triton
from atd.kernels.triton.ptx import plt
from atd.weights.codes import Code

MOST_STATES = 1024  # of which a block's registers hold what it knows of each
THREADS = 256  # of a block, at most
TEST_ROWS = 48  # of a segment of the self-test, about


@functools.cache
def fastest_search(code: Code) -> Search:
    """Returns `best_way` where this process's device runs it, else the scan of
    `atd.decomposition.trellis`.

    On an NVIDIA GPU both search a small column first, once per process and code. Where the kernel
    finds worse trits, a warning says so, and the scan is taken.
    """
    if refuses(code) or errs(
        functools.partial(excess_error, code, best_way),
        task="searches trellis codes",
        instead="a scan searches",
    ):
        return trellis.best_way
    return best_way


def refuses(code: Code) -> str | None:
    """Returns why no kernel searches this code on this process's device, or None."""
    if reason := Triton().device_refuses():
        return reason
    states = max(step.behind for step in trellis.phases(code))
    return f"{states} states, more than {MOST_STATES}" if states > MOST_STATES else None


def excess_error(code: Code, search: Search) -> float:
    """Returns how much larger the error of random columns is that `search` leaves than the one that
    the scan leaves, in units of the latter.
    """
    length = -(-TEST_ROWS // code.period) * code.period
    random = np.random.default_rng(0)
    x = random.standard_normal(4 * length).astype(np.float32)
    scale = random.uniform(0.5, 1.5, len(x)).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="search")
    def error(search: Search):
        values = trellis.snap(x, scale, code, length, search=search)[1]
        return jnp.sum(jnp.square(values - x))

    return float(error(search) / error(trellis.best_way)) - 1


def best_way(target, weight, seam, steps: tuple[Phase, ...], *, interpret: bool = False) -> Way:
    """Does what `atd.decomposition.trellis.best_way` does.

    Args:
        interpret: whether jax's interpreter runs the kernel, on a CPU.
    """
    rows, segments = target.shape
    width = width_of(steps)
    shape = jax.ShapeDtypeStruct
    states, *_ = pl.pallas_call(
        functools.partial(_kernel, steps=steps, rows=rows, width=width, interpret=interpret),
        out_shape=[
            shape((segments * (rows + 1),), jnp.int32),  # in front of each row, behind the last
            shape((segments * 2 * width,), jnp.float32),  # costs, of two rows in turn
            shape((segments * rows * width,), jnp.int16),  # where the best way into a state began
        ],
        grid=(segments,),
        compiler_params=plt.CompilerParams(num_warps=warps(steps), num_stages=1),
        interpret=interpret,
        name=name(steps),
    )(
        target.T.reshape(-1),
        weight.T.reshape(-1),
        *([] if seam is None else [seam]),
        *tables(steps),
    )
    states, period = states.reshape(segments, rows + 1).T, len(steps)
    before = [states[p:rows:period] for p in range(period)]
    symbols = [states[p + 1 :: period] % len(step.new) for p, step in enumerate(steps)]
    return before, symbols


def name(steps: tuple[Phase, ...]) -> str:
    """Returns the kernel's name in traces and dumps."""
    return f"trellis_search_{'_'.join(str(step.behind) for step in steps)}"


def warps(steps: tuple[Phase, ...]) -> int:
    """Returns the warps of a block: a thread per state, up to THREADS."""
    return max(1, min(width_of(steps), THREADS) // 32)


def width_of(steps: tuple[Phase, ...]) -> int:
    """Returns the states behind any row, up to a power of 2."""
    return max(pl.next_power_of_2(step.behind) for step in steps)


def tables(steps: tuple[Phase, ...]) -> list[jax.Array]:
    """Returns what `read_tables` reads, three arrays for each phase."""
    return [table for step in steps for table in _tables(step)]


def _tables(step: Phase) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`front` and `head` [D, states], `new` [states] of a Table, padded to a power of 2."""
    short = pl.next_power_of_2(step.behind) - step.behind
    front, head = (
        np.pad(np.repeat(a, len(step.new), axis=1), ((0, 0), (0, short)))
        for a in (step.state, step.head)
    )
    new = np.pad(np.tile(step.new, step.state.shape[1]), (0, short))
    return jnp.asarray(front), jnp.asarray(head), jnp.asarray(new)


class Table(NamedTuple):
    """What a row knows of each state behind it, in registers: arrays [states].

    Attributes:
        front, head: for each d, the state in front of the row and its `Phase.head`.
        new: what the state's new coded trits add to the row's value.
        state: its number.
    """

    front: list[jax.Array]
    head: list[jax.Array]
    new: jax.Array
    state: jax.Array


def read_tables(refs) -> list[Table]:
    """Reads what `tables` made."""
    return [_read(*refs[p : p + 3]) for p in range(0, len(refs), 3)]


def _read(front_ref, head_ref, new_ref) -> Table:
    ended = range(front_ref.shape[0])
    state = lax.iota(jnp.int32, new_ref.shape[0])
    return Table([front_ref[d] for d in ended], [head_ref[d] for d in ended], new_ref[...], state)


@dataclass(frozen=True)
class SegmentSearch:
    """The search in one segment, by a block of threads.

    Attributes:
        tables: of the phases in `steps`.
        cost_ref: costs of two rows in turn, float32, this segment's from `first_cost` on.
        back_ref: where the best way into a state began, int16, rows of `width` from `first_row` on.
        width: states behind any row, up to a power of 2.
    """

    steps: tuple[Phase, ...]
    tables: list[Table]
    cost_ref: Any
    back_ref: Any
    first_cost: jax.Array
    first_row: jax.Array
    width: int
    interpret: bool

    def forward(self, periods: int, read: Callable, seam: jax.Array | None) -> jax.Array:
        """Goes through rows, and returns the state behind the last, int32.

        Args:
            read: number of a period -> [(what is wanted of a row, the weight of its error)].
            seam: the state in front of the first row and behind the last; None: any two.
        """
        state = lax.iota(jnp.int32, self.width)
        if seam is None:
            cost = jnp.full((self.width,), START, jnp.float32)
        else:
            cost = jnp.where(state == seam, np.float32(START), np.float32(FAR))
        plt.store(self.cost_ref.at[self.first_cost + state], cost)
        barrier(self.interpret)

        def period(i, given):
            ahead = read(jnp.minimum(i + 1, periods - 1))  # on its way while this one is worked on
            for p, (y, w) in enumerate(given):
                self._row(i * len(self.steps) + p, p, y, w)
            return ahead

        lax.fori_loop(0, periods, period, read(0))
        barrier(self.interpret)
        if seam is not None:
            return seam
        rows = periods * len(self.steps)
        cost = plt.load(self.cost_ref.at[self._costs_in_front(rows) + state])
        reached = jnp.where(state < self.steps[-1].behind, cost, FAR)
        return jnp.argmin(reached, axis=0).astype(jnp.int32)

    def _costs_in_front(self, row):
        return self.first_cost + (row & 1) * self.width

    def _row(self, row, p: int, y, w) -> None:
        """Row `row`, of phase p."""
        step, table = self.steps[p], self.tables[p]
        here, behind = self._costs_in_front(row), self._costs_in_front(row + 1)
        costs = [plt.load(self.cost_ref.at[here + front]) for front in table.front]
        best = least_cost(costs, table.head, y - table.new, w, step)
        plt.store(self.cost_ref.at[behind + table.state], best)
        barrier(self.interpret)
        came, ended = table.front[0], ended_trits(best, step)
        for d, front in enumerate(table.front[1:], start=1):
            came = jnp.where(ended == d, front, came)
        at = (self.first_row + row) * self.width + table.state
        plt.store(self.back_ref.at[at], came.astype(jnp.int16))

    def back(self, rows: int, stop: int, last: jax.Array, visit: Callable) -> jax.Array:
        """Follows the best way from the state behind row rows - 1 to that in front of row `stop`.

        Args:
            visit: (row, state in front of it) -> None.

        Returns:
            The state in front of row `stop`.
        """

        def row_before(i, behind):
            row = rows - 1 - i
            at = (self.first_row + row) * self.width + behind
            front = self.back_ref[at].astype(jnp.int32)
            visit(row, front)
            return front

        return lax.fori_loop(0, rows - stop, row_before, last)


def _kernel(*refs, steps: tuple[Phase, ...], rows: int, width: int, interpret: bool):
    target_ref, weight_ref, *more_refs, way_ref, cost_ref, back_ref = refs
    seam_ref, table_refs = more_refs[: -3 * len(steps)], more_refs[-3 * len(steps) :]
    segment, period = pl.program_id(0), len(steps)
    search = SegmentSearch(
        steps,
        read_tables(table_refs),
        cost_ref,
        back_ref,
        segment * 2 * width,
        segment * rows,
        width,
        interpret,
    )

    def read(i) -> list[tuple[jax.Array, jax.Array]]:
        at = segment * rows + i * period
        return [(target_ref[at + p], weight_ref[at + p]) for p in range(period)]

    last = search.forward(rows // period, read, seam_ref[0][segment] if seam_ref else None)
    way_at = segment * (rows + 1)
    way_ref[way_at + rows] = last

    def write(row, front) -> None:
        way_ref[way_at + row] = front

    search.back(rows, 0, last, write)
