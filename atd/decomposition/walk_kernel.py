"""What kernels that walk through the columns of a block have in common: errors that earlier columns
of the block have made, and the test at the first use.

The matrix products of error feedback are float32, and so are these: multiply-adds one after the
other, no tensor cores.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atd.decomposition.sweeps import BLOCK, Walk, sweep_columns
from atd.kernels.triton.floats import multiply_add
from atd.kernels.triton.ptx import plt

AT_A_TIME = 8  # errors of earlier columns whose reads are on their way together
MOST_EXCESS = 1e-3  # of the error that is left, in the test at the first use
TEST_INPUTS = BLOCK + 8  # the last block reaches back
_log = logging.getLogger("atd.decomposition")


@dataclass(frozen=True)
class Columns:
    """The columns of a block in the memory of a kernel, [block, rows] row by row.

    Attributes:
        within_ref: float32 [block, padded block], of `padded`.
        rows: of a column.
    """

    corrected_ref: Any
    within_ref: Any
    old_ref: Any
    new_ref: Any
    change_ref: Any
    block: int
    rows: int
    interpret: bool

    def read(self, j, row: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (what is wanted of rows of column j, corrected by errors of the earlier ones;
        what stands there).
        """
        here = j * self.rows + row
        wanted, old = (  # on their way while the errors are added up
            plt.load(ref.at[here], mask=mask, other=0.0)
            for ref in (self.corrected_ref, self.old_ref)
        )
        first = j * padded_width(self.block)

        def add(n, errors):
            for k in range(AT_A_TIME):
                i = n * AT_A_TIME + k
                at = self.change_ref.at[i * self.rows + row]
                change = plt.load(at, mask=mask & (i < j), other=0.0)
                errors = multiply_add(self.within_ref[first + i], change, errors, self.interpret)
            return errors

        zeros = jnp.zeros(row.shape, jnp.float32)
        errors = lax.fori_loop(0, (j + AT_A_TIME - 1) // AT_A_TIME, add, zeros)
        return wanted + errors, old

    def write(self, j, row: jax.Array, old: jax.Array, new: jax.Array, mask: jax.Array) -> None:
        """Writes new values of column j, and by how much its error changes."""
        here = j * self.rows + row
        plt.store(self.new_ref.at[here], new, mask=mask)
        plt.store(self.change_ref.at[here], old - new, mask=mask)


def padded_width(block: int) -> int:
    """Returns the columns that `padded` makes of a block's."""
    return -(-block // AT_A_TIME) * AT_A_TIME


def padded(within: jax.Array) -> jax.Array:
    """Pads [block, block] to whole AT_A_TIME columns, and lays it out flat."""
    block = len(within)
    return jnp.pad(within, ((0, 0), (0, padded_width(block) - block))).reshape(-1)


def barrier(interpret: bool) -> None:
    """Lets each thread of a block read what the others wrote."""
    if not interpret:
        plt.debug_barrier()


def errs(excess: Callable[[], float], task: str, instead: str) -> bool:
    """Returns whether a kernel leaves a larger error than what it stands for, and then says so.

    Args:
        excess: how much larger, in units of the latter.
        task: what the kernel does.
        instead: what does it in its place.
    """
    found = excess()
    if found < MOST_EXCESS:
        return False
    _log.warning(
        "the kernel that %s errs on %s with jax %s: the error of its trits is %.1e of its size "
        "larger; %s instead, which is slow on a GPU",
        task,
        jax.devices()[0].device_kind,
        jax.__version__,
        found,
        instead,
    )
    return True  # NaN as well


def excess_of_sweeps(walk: Walk, reference: Walk, rows: int, kept) -> float:
    """Returns how much more a sweep over a random matrix loses by `walk` than by `reference`, in
    units of what the latter loses.

    Args:
        rows: of the matrix, which has TEST_INPUTS columns.
        kept: as `sweep_columns` takes it.
    """
    random = np.random.default_rng(0)
    target = random.standard_normal((TEST_INPUTS, rows)).astype(np.float32)
    mixed = random.standard_normal((2 * TEST_INPUTS, TEST_INPUTS)).astype(np.float32)
    hessian = mixed.T @ mixed
    matrix = hessian / np.diagonal(hessian)[:, None] - np.eye(TEST_INPUTS, dtype=np.float32)

    def lost(walk: Walk) -> float:
        @jax.jit
        def sweep(target, matrix):
            return sweep_columns(target, target, kept, matrix=matrix, walk=walk)[0]

        error = target - np.asarray(sweep(target, matrix), np.float64)
        return float(np.sum(error * (hessian @ error)))

    return lost(walk) / lost(reference) - 1
