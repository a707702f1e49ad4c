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
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from atd.decomposition import trellis
from atd.decomposition.trellis import FAR, START, Phase, Search, Way, ended_trits, least_cost
from atd.kernels.triton.backend import Triton
from atd.kernels.triton.ptx import plt
from atd.weights.codes import Code

MOST_STATES = 1024  # of which a block's registers hold what it knows of each
THREADS = 256  # of a block, at most
TEST_ROWS = 48  # of a segment of the self-test, about
_log = logging.getLogger("atd.decomposition")


@functools.cache
def fastest_search(code: Code) -> Search:
    """Returns `best_way` where this process's device runs it, else the scan of
    `atd.decomposition.trellis`.

    On an NVIDIA GPU both search a small column first, once per process and code. Where the kernel
    finds worse trits, a warning says so, and the scan is taken.
    """
    steps = trellis.phases(code)
    if Triton().device_refuses() or max(step.behind for step in steps) > MOST_STATES:
        return trellis.best_way
    excess = excess_error(code, best_way)
    if not excess < 1e-3:  # NaN as well
        _log.warning(
            "the kernel that searches trellis codes errs on %s with jax %s: the error of its trits "
            "is %.1e of its size larger; a scan searches instead, which is slow on a GPU",
            jax.devices()[0].device_kind,
            jax.__version__,
            excess,
        )
        return trellis.best_way
    return best_way


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
    width = _width(steps)
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
        *(table for step in steps for table in _tables(step)),
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
    return max(1, min(_width(steps), THREADS) // 32)


def _width(steps: tuple[Phase, ...]) -> int:
    """States behind any row, up to a power of 2."""
    return max(pl.next_power_of_2(step.behind) for step in steps)


def _tables(step: Phase) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`front` and `head` [D, states], `new` [states] of a _Table, padded to a power of 2."""
    short = pl.next_power_of_2(step.behind) - step.behind
    front, head = (
        np.pad(np.repeat(a, len(step.new), axis=1), ((0, 0), (0, short)))
        for a in (step.state, step.head)
    )
    new = np.pad(np.tile(step.new, step.state.shape[1]), (0, short))
    return jnp.asarray(front), jnp.asarray(head), jnp.asarray(new)


class _Table(NamedTuple):
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


def _read(front_ref, head_ref, new_ref) -> _Table:
    """Reads what `_tables` made."""
    ended = range(front_ref.shape[0])
    state = lax.iota(jnp.int32, new_ref.shape[0])
    return _Table([front_ref[d] for d in ended], [head_ref[d] for d in ended], new_ref[...], state)


def _kernel(*refs, steps: tuple[Phase, ...], rows: int, width: int, interpret: bool):
    target_ref, weight_ref, *more_refs, way_ref, cost_ref, back_ref = refs
    seam_ref, table_refs = more_refs[: -3 * len(steps)], more_refs[-3 * len(steps) :]
    tables = [_read(*table_refs[3 * p : 3 * p + 3]) for p in range(len(steps))]
    segment, period, periods = pl.program_id(0), len(steps), rows // len(steps)
    first_cost, first_row = segment * 2 * width, segment * rows

    def barrier() -> None:
        """Lets each thread read what the others wrote."""
        if not interpret:
            plt.debug_barrier()

    def read(i) -> list[tuple[jax.Array, jax.Array]]:
        """What is wanted of the rows of a period, and the weights of their errors."""
        at = first_row + jnp.minimum(i, periods - 1) * period
        return [(target_ref[at + p], weight_ref[at + p]) for p in range(period)]

    def forward(i, given):
        ahead = read(i + 1)  # on its way while this period is worked on
        for p, (step, table, (y, w)) in enumerate(zip(steps, tables, given, strict=True)):
            row = i * period + p
            here, behind = (first_cost + ((row + n) & 1) * width for n in (0, 1))
            costs = [plt.load(cost_ref.at[here + front]) for front in table.front]
            best = least_cost(costs, table.head, y - table.new, w, step)
            plt.store(cost_ref.at[behind + table.state], best)
            barrier()
            came, ended = table.front[0], ended_trits(best, step)
            for d, front in enumerate(table.front[1:], start=1):
                came = jnp.where(ended == d, front, came)
            at = (first_row + row) * width + table.state
            plt.store(back_ref.at[at], came.astype(jnp.int16))
        return ahead

    state = lax.iota(jnp.int32, width)
    if seam_ref:
        cost = jnp.where(state == seam_ref[0][segment], np.float32(START), np.float32(FAR))
    else:
        cost = jnp.full((width,), START, jnp.float32)
    plt.store(cost_ref.at[first_cost + state], cost)
    barrier()
    lax.fori_loop(0, periods, forward, read(0))
    barrier()

    if seam_ref:
        last = seam_ref[0][segment]
    else:
        cost = plt.load(cost_ref.at[first_cost + (rows & 1) * width + state])
        last = jnp.argmin(jnp.where(state < steps[-1].behind, cost, FAR), axis=0).astype(jnp.int32)
    way_at = segment * (rows + 1)
    way_ref[way_at + rows] = last

    def back(i, behind):
        row = rows - 1 - i
        front = back_ref[(first_row + row) * width + behind].astype(jnp.int32)
        way_ref[way_at + row] = front
        return front

    lax.fori_loop(0, rows, back, last)
