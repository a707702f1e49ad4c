"""A sweep: the columns of a matrix are visited one after the other, and each takes over the errors
of the others as far as it can stand in for them.

Matrices lie transposed, [in, rows]: a column is contiguous, and rows are the vector. Columns go in
blocks, whose targets take in all errors outside by one matrix product; a *walk* goes through the
columns of a block and looks at errors inside of it alone. On a CPU it is a loop
(`column_by_column`); on a GPU, where a loop launches some kernels per column, it is one kernel for
the block (`atd.decomposition.level_walks`, `trellis_walks`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from atd.decomposition.second_moments import matmul

BLOCK = 64  # columns

# (corrected, within, old, kept, start) -> (new, kept anew): float32 [block, rows] of what is wanted
# but for errors inside the block, the block of the matrix [block, block], what stands there now;
# arrays [block, ...] of what else belongs to a column; the number of the first column.
Walk = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array | int], tuple[jax.Array, Any]]


def sweep_columns(target, quantized, kept, *, matrix, walk: Walk):
    """Rounds the columns of [in, rows] one after the other, column j to what is nearest to

        target_j + sum_i matrix[j, i] (target_i - quantized_i)

    where quantized_i is new for the columns before it.

    Args:
        target, quantized: float32 [in, rows] in the order of visits.
        kept: arrays [in, ...] of what else belongs to a column, or ().
        matrix: float32 [in, in] with a diagonal of zeros.
        walk: rounds the columns of a block.

    Returns:
        `quantized` and `kept` after the sweep.
    """
    inputs = len(target)
    block = min(BLOCK, inputs)

    def cut(arrays, start):
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, block), arrays)

    def put(arrays, parts, start):
        def put_one(array, part):
            return lax.dynamic_update_slice_in_dim(array, part, start, axis=0)

        return jax.tree.map(put_one, arrays, parts)

    def sweep_block(number, carry):
        quantized, error, kept = carry
        # The last block reaches back into the one before it: error feedback finds there what it
        # found, descent descends once more.
        start = jnp.minimum(number * block, inputs - block)
        matrix_rows, old, block_target, columns = cut((matrix, quantized, target, kept), start)
        within = lax.dynamic_slice_in_dim(matrix_rows, start, block, axis=1)
        corrected = block_target + matmul(matrix_rows, error)  # by errors before this block's sweep
        new, columns = walk(corrected, within, old, columns, start)
        return put((quantized, error, kept), (new, block_target - new, columns), start)

    carry = (quantized, target - quantized, kept)
    quantized, _, kept = lax.fori_loop(0, -(-inputs // block), sweep_block, carry)
    return quantized, kept


def column_by_column(nearest: Callable) -> Walk:
    """Returns the walk that is a loop over columns.

    Args:
        nearest: (x float32 [rows], number of the column, a column of `kept`) -> (its value float32
            [rows], `kept` anew).
    """

    def walk(corrected, within, old, kept, start):
        def visit(j, carry):
            new, change, columns = carry  # change of the error: old - new
            x = corrected[j] + matmul(within[j], change)
            value, column = nearest(x, start + j, jax.tree.map(lambda a: a[j], columns))
            columns = jax.tree.map(lambda a, b: a.at[j].set(b), columns, column)
            return new.at[j].set(value), change.at[j].set(old[j] - value), columns

        first = (old, jnp.zeros_like(old), kept)
        new, _, columns = lax.fori_loop(0, len(old), visit, first)
        return new, columns

    return walk
