"""How the columns of a block are walked with a trellis code: column by column, or all in one Pallas
kernel for Triton.

In the kernel a block of threads has one segment. Of each column in turn it adds up what is wanted,
searches as `atd.decomposition.trellis_kernel` does, and writes the values of the best way, which
are errors to the next columns. Segments have nothing to do with each other until the block ends.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from atd.decomposition import sweeps, trellis
from atd.decomposition.sweeps import Walk
from atd.decomposition.trellis import Phase, Search, by_state, per_row, segments_of, snap_column
from atd.decomposition.trellis_kernel import (
    SegmentSearch,
    fastest_search,
    read_tables,
    refuses,
    tables,
    warps,
    width_of,
)
from atd.decomposition.walk_kernel import (
    TEST_INPUTS,
    Columns,
    barrier,
    errs,
    excess_of_sweeps,
    padded,
)
from atd.kernels.triton.ptx import plt
from atd.weights.codes import Code

TEST_ROWS = 24  # of a segment of the self-test, about

# (scale float32 [rows], code, length of a segment, importance float32 [rows] or None, whether seams
# are kept rather than found) -> a walk, which keeps (seams int32 [block, segments], trits int8
# [block, rows / P, M]).
Walks = Callable[..., Walk]


def column_by_column(
    scale, code: Code, length: int, importance, keep: bool, *, search: Search = trellis.best_way
) -> Walk:
    """Returns the walk that is a loop over columns, each of which `search` searches."""

    def nearest(x, j, column):
        known = column[0] if keep else None
        found, value, seam = snap_column(x, scale, code, length, known, search, importance)
        return value, (seam, found)

    return sweeps.column_by_column(nearest)


@functools.cache
def fastest_walks(code: Code) -> Walks:
    """Returns `in_one_kernel` where this process's device runs it, else `column_by_column` with the
    fastest search.

    On an NVIDIA GPU both sweep over a small matrix first, once per process and code. Where the
    kernel loses more, a warning says so, and the loop is taken.
    """
    excess = functools.partial(excess_error, code, in_one_kernel)
    task, instead = "walks columns of trellis codes", "a loop over columns walks"
    if refuses(code) or errs(excess, task, instead):
        return functools.partial(column_by_column, search=fastest_search(code))
    return in_one_kernel


def excess_error(code: Code, walks: Walks) -> float:
    """Returns how much more a sweep over a small matrix loses by `walks` than by
    `column_by_column`, in units of what the latter loses.
    """
    length = -(-TEST_ROWS // code.period) * code.period
    rows = 3 * length + code.period  # the last segment is shorter
    scale = np.random.default_rng(1).uniform(0.5, 1.5, rows).astype(np.float32)
    options = jnp.asarray(scale), code, length, None, False
    kept = empty(TEST_INPUTS, rows, code, length)
    return excess_of_sweeps(walks(*options), column_by_column(*options), rows, kept)


def empty(inputs: int, rows: int, code: Code, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns (seams int32 [in, segments], trits int8 [in, rows / P, M]) of zeros."""
    seams = jnp.zeros((inputs, -(-rows // length)), jnp.int32)
    return seams, jnp.zeros((inputs, rows // code.period, code.trits), jnp.int8)


# --- the kernel -----------------------------------------------------------------------------------


def in_one_kernel(
    scale, code: Code, length: int, importance, keep: bool, *, interpret: bool = False
) -> Walk:
    """Returns the walk that is one kernel; does what that of `column_by_column` does. The rows
    behind the whole segments are a launch of their own.

    Args:
        interpret: whether jax's interpreter runs the kernel, on a CPU.
    """

    parts = segments_of(len(scale), length)
    costs = [
        per_row(scale[first:stop], None if importance is None else importance[first:stop])
        for first, stop, _ in parts
    ]

    def walk(corrected, within, old, kept, start):
        found, within = [], padded(within)
        for (first, stop, rows), of_rows in zip(parts, costs, strict=True):
            segment = first // length
            seams = kept[0][:, segment : segment + (stop - first) // rows] if keep else None
            columns = corrected[:, first:stop], within, old[:, first:stop]
            of_rows = scale[first:stop], *of_rows
            found.append(_walk_segments(*columns, seams, of_rows, code, rows, interpret))
        new, *kept = (jnp.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
        return new, tuple(kept)

    return walk


def name(steps: tuple[Phase, ...]) -> str:
    """Returns the kernel's name in traces and dumps."""
    return f"trellis_walk_{'_'.join(str(step.behind) for step in steps)}"


def _walk_segments(
    corrected, within, old, seams, of_rows, code: Code, length: int, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The walk of segments of equal length: (new [block, rows], seams, trits). `of_rows`: scales,
    and what `per_row` makes of them.
    """
    steps = trellis.phases(code)
    (block, rows), width = old.shape, width_of(steps)
    segments = rows // length
    searched = max(length, 2 * trellis.rows_around_seam(length, len(steps)))
    shape = jax.ShapeDtypeStruct
    new, _, found, way, number, *_ = pl.pallas_call(
        functools.partial(
            _kernel, steps=steps, block=block, length=length, width=width, interpret=interpret
        ),
        out_shape=[
            shape((block * rows,), jnp.float32),  # new values
            shape((block * rows,), jnp.float32),  # by how much errors change
            shape((block * segments,), jnp.int32),  # states at the seams
            shape(
                (block * segments * (length + 1),), jnp.int16
            ),  # in front of each row, behind all
            shape((block * rows,), jnp.int8),  # numbers of the sums of loose trits
            shape((rows,), jnp.float32),  # of one column: what is wanted, in units of the scale
            shape((segments * 2 * width,), jnp.float32),  # costs, of two rows in turn
            shape(
                (segments * searched * width,), jnp.int16
            ),  # where the best way into a state began
        ],
        grid=(segments,),
        compiler_params=plt.CompilerParams(num_warps=warps(steps), num_stages=1),
        interpret=interpret,
        name=name(steps),
    )(
        corrected.reshape(-1),
        within,
        old.reshape(-1),
        *of_rows,
        *(jnp.asarray(by_state(step)) for step in steps),
        *tables(steps),
        *([] if seams is None else [seams.reshape(-1)]),
    )
    way = way.reshape(block, segments, length + 1).astype(jnp.int32)
    number = number.reshape(block, segments, length).astype(jnp.int32)
    period = len(steps)
    symbols = [way[..., p + 1 :: period] % len(step.new) for p, step in enumerate(steps)]
    numbers = [number[..., p::period] for p in range(period)]
    trits = trellis.trits_of(symbols, numbers, steps)  # [block, segments, periods, M]
    return (
        new.reshape(block, rows),
        found.reshape(block, segments),
        trits.reshape(block, -1, code.trits),
    )


def _kernel(*refs, steps: tuple[Phase, ...], block: int, length: int, width: int, interpret: bool):
    period, periods = len(steps), length // len(steps)
    corrected_ref, within_ref, old_ref, scale_ref, inverse_ref, weight_ref, *refs = refs
    of_state_refs, table_refs, refs = refs[:period], refs[period : 4 * period], refs[4 * period :]
    *seams_ref, new_ref, change_ref, found_ref, way_ref, number_ref = refs[:-3]
    wanted_ref, cost_ref, back_ref = refs[-3:]
    segment, segments = pl.program_id(0), scale_ref.shape[0] // length
    around = trellis.rows_around_seam(length, period)
    columns = Columns(
        corrected_ref, within_ref, old_ref, new_ref, change_ref, block, segments * length, interpret
    )
    search = SegmentSearch(
        steps,
        read_tables(table_refs),
        cost_ref,
        back_ref,
        segment * 2 * width,
        segment * max(length, 2 * around),
        width,
        interpret,
    )
    first_row = segment * length
    number = lax.iota(jnp.int32, pl.next_power_of_2(periods))
    mask = number < periods

    def read(i, first: int = 0) -> list[tuple[jax.Array, jax.Array]]:
        """What is wanted of the rows of period i behind row `first`, and the weights of errors."""
        row = i * period + first
        at = first_row + row - length * (row >= length)
        return [(wanted_ref[at + p], weight_ref[at + p]) for p in range(period)]

    def seam_of(j) -> jax.Array:
        """The state at the seam of column j: that which is known, or that on the best way through
        the rows around it."""
        if seams_ref:
            return seams_ref[0][j * segments + segment]
        rows = 2 * around
        last = search.forward(rows // period, functools.partial(read, first=length - around), None)
        return search.back(rows, around, last, lambda row, front: None)

    def visit(j, _):
        rows, olds = [first_row + number * period + p for p in range(period)], []
        for row in rows:
            x, old = columns.read(j, row, mask)
            inverse = plt.load(inverse_ref.at[row], mask=mask, other=0.0)
            plt.store(wanted_ref.at[row], x * inverse, mask=mask)
            olds.append(old)
        barrier(interpret)
        seam = seam_of(j)
        found_ref[j * segments + segment] = seam
        barrier(interpret)  # the way back is read before the search writes anew
        search.forward(periods, read, seam)
        first_way = (j * segments + segment) * (length + 1)
        way_ref[first_way + length] = seam.astype(jnp.int16)

        def write(row, front) -> None:
            way_ref[first_way + row] = front.astype(jnp.int16)

        search.back(length, 0, seam, write)
        barrier(interpret)
        for p, (row, old) in enumerate(zip(rows, olds, strict=True)):
            at = first_way + row - first_row
            front, behind = (
                plt.load(way_ref.at[at + n], mask=mask, other=0).astype(jnp.int32) for n in (0, 1)
            )
            value = plt.load(of_state_refs[p].at[front]) + plt.load(
                table_refs[3 * p + 2].at[behind]
            )
            wanted = plt.load(wanted_ref.at[row], mask=mask, other=0.0)
            loose, chosen = _nearest(wanted - value, steps[p].loose)
            plt.store(
                number_ref.at[j * segments * length + row], chosen.astype(jnp.int8), mask=mask
            )
            scale = plt.load(scale_ref.at[row], mask=mask, other=0.0)
            columns.write(j, row, old, (value + loose) * scale, mask)
        barrier(interpret)

    lax.fori_loop(0, block, visit, None)


def _nearest(rest, loose: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The sum of loose trits that is nearest, and its number."""
    nearest, number = jnp.full_like(rest, loose[0]), jnp.zeros(rest.shape, jnp.int32)
    least = jnp.abs(rest - loose[0])
    for n, value in enumerate(loose[1:].tolist(), start=1):
        distance = jnp.abs(rest - np.float32(value))
        closer = distance < least
        nearest = jnp.where(closer, np.float32(value), nearest)
        number = jnp.where(closer, n, number)
        least = jnp.minimum(least, distance)
    return nearest, number
