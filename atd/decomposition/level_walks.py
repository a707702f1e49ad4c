"""How the columns of a block are walked when each weight goes to the nearest level of its group:
column by column, or all in one Pallas kernel for Triton.

In the kernel a warp has ROWS rows, one a thread, and goes through the columns with them.
"""

import functools
from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from atd.decomposition import sweeps
from atd.decomposition.levels import ascending_levels, nonzero, ranked_levels, top_level
from atd.decomposition.sweeps import Walk
from atd.decomposition.walk_kernel import (
    TEST_INPUTS,
    Columns,
    barrier,
    errs,
    excess_of_sweeps,
    padded,
)
from atd.kernels.triton import floats
from atd.kernels.triton.backend import Triton
from atd.kernels.triton.ptx import plt

ROWS = 32  # of a block of threads: one warp
TEST_ROWS = 40

Walks = Callable[..., Walk]  # (levels, group, top) -> a walk


def levels_of(scales, tied: bool) -> jax.Array:
    """Returns the levels of scales [rows, groups, N or 1]: the steps [groups, 1, rows] where tied,
    else the levels >= 0, ascending, [groups, L, rows].
    """
    rows, groups, bases = scales.shape
    if tied:
        return scales.transpose(1, 2, 0)
    level, _, rank = ranked_levels(scales.reshape(-1, bases).T)  # [L, rows * groups]
    return ascending_levels(level, rank).reshape(-1, rows, groups).transpose(2, 0, 1)


def column_by_column(levels, group, top: int | None) -> Walk:
    """Returns the walk that is a loop over columns.

    Args:
        levels: float32 [groups, L, rows], of `levels_of`.
        group: int32 [in], that of each column.
        top: levels are multiples of one step up to this; None: they are free.
    """

    def nearest(x, j, kept):
        mine = levels[group[j]]
        return (_nearest_free(x, mine) if top is None else _nearest_tied(x, mine[0], top)), kept

    return sweeps.column_by_column(nearest)


def _nearest_tied(x, step, top):
    """Rounds x [rows] to a multiple of step [rows]."""
    return jnp.clip(jnp.round(x / nonzero(step)), -top, top) * step


def _nearest_free(x, level):
    """Rounds x [rows] to the nearest of +-level [L, rows]; levels ascend from 0."""
    passed = jnp.abs(x) > (level[1:] + level[:-1]) / 2
    return jnp.where(x < 0, -1.0, 1.0) * jnp.max(jnp.where(passed, level[1:], 0.0), axis=0)


# --- the kernel -----------------------------------------------------------------------------------


@functools.cache
def fastest_walks(bases: int, tied: bool) -> Walks:
    """Returns `in_one_kernel` where this process's device runs it, else `column_by_column`.

    On an NVIDIA GPU both sweep over a small matrix first, once per process and kind of levels.
    Where the kernel loses more, a warning says so, and the loop is taken.
    """
    excess = functools.partial(excess_error, bases, tied, in_one_kernel)
    task = f"rounds columns to {bases} {'tied' if tied else 'free'} bases"
    if Triton().device_refuses() or errs(excess, task, "a loop over columns rounds them"):
        return column_by_column
    return in_one_kernel


def excess_error(bases: int, tied: bool, walks: Walks) -> float:
    """Returns how much more a sweep over a small matrix loses by `walks` than by
    `column_by_column`, in units of what the latter loses.
    """
    groups, random = 2, np.random.default_rng(0)
    scales = random.uniform(0.2, 1.0, (TEST_ROWS, groups, 1 if tied else bases))
    scales = np.sort(scales.astype(np.float32), axis=-1)[..., ::-1] / (top_level(bases) / 2)
    options = (
        levels_of(jnp.asarray(scales), tied),
        jnp.arange(TEST_INPUTS) % groups,
        top(bases, tied),
    )
    return excess_of_sweeps(walks(*options), column_by_column(*options), TEST_ROWS, ())


def top(bases: int, tied: bool) -> int | None:
    """Returns the `top` of walks."""
    return top_level(bases) if tied else None


def in_one_kernel(levels, group, top: int | None, *, interpret: bool = False) -> Walk:
    """Returns the walk that is one kernel; does what that of `column_by_column` does.

    Args:
        interpret: whether jax's interpreter runs the kernel, on a CPU.
    """
    count, rows = levels.shape[1:]

    def walk(corrected, within, old, kept, start):
        block = len(old)
        shape = jax.ShapeDtypeStruct((block * rows,), jnp.float32)
        options = {"block": block, "rows": rows, "count": count, "top": top, "interpret": interpret}
        new, _ = pl.pallas_call(
            functools.partial(_kernel, **options),
            out_shape=[shape, shape],
            grid=(-(-rows // ROWS),),
            compiler_params=plt.CompilerParams(num_warps=ROWS // 32, num_stages=1),
            interpret=interpret,
            name=name(count, top),
        )(
            corrected.reshape(-1),
            padded(within),
            old.reshape(-1),
            levels.reshape(-1),
            lax.dynamic_slice_in_dim(group, start, block),
        )
        return new.reshape(block, rows), kept

    return walk


def name(count: int, top: int | None) -> str:
    """Returns the kernel's name in traces and dumps."""
    return f"walk_{f'free_{count}' if top is None else f'tied_{top}'}"


def _kernel(
    corrected_ref,
    within_ref,
    old_ref,
    levels_ref,
    group_ref,
    new_ref,
    change_ref,
    *,
    block: int,
    rows: int,
    count: int,
    top: int | None,
    interpret: bool,
):
    columns = Columns(
        corrected_ref, within_ref, old_ref, new_ref, change_ref, block, rows, interpret
    )
    row = pl.program_id(0) * ROWS + lax.iota(jnp.int32, ROWS)
    mask = row < rows

    def visit(j, _):
        first = group_ref[j] * count
        levels = [
            plt.load(levels_ref.at[(first + n) * rows + row], mask=mask, other=0.0)
            for n in range(count)
        ]
        x, old = columns.read(j, row, mask)
        if top is None:
            value = _kernel_nearest_free(x, levels)
        else:
            value = _kernel_nearest_tied(x, levels[0], top, interpret)
        columns.write(j, row, old, value, mask)
        barrier(interpret)

    lax.fori_loop(0, block, visit, None)


def _kernel_nearest_tied(x, step, top: int, interpret: bool):
    """`_nearest_tied`, in what there is in Triton."""
    ratio = floats.quotient(x, nonzero(step), interpret)
    whole = floats.nearest(ratio, interpret)
    return jnp.minimum(jnp.maximum(whole, -float(top)), float(top)) * step


def _kernel_nearest_free(x, levels: list):
    """`_nearest_free` of levels apart."""
    size, value = jnp.abs(x), jnp.zeros_like(x)
    for below, level in pairwise(levels):
        value = jnp.where(size > (level + below) / 2, level, value)
    return jnp.where(x < 0, -value, value)
