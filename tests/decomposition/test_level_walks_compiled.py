"""The kernel that walks through columns to the nearest levels as machine code, compiled without a
GPU: no spills, few launches, and in an emulator what the loop over columns finds.

Skipped where the CUDA plugin is not installed (`make gpu-check` installs it).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.decomposition import error_feedback, level_walks
from atd.kernels.tuning import aot
from tests.decomposition.test_level_walks import columns, exact_scales
from tests.kernels.ptx.pallas import emulated_pallas_call

if reason := aot.missing():
    pytest.skip(reason, allow_module_level=True)
KINDS = [(1, True), (2, True), (2, False), (4, False)]


def levels_shape(bases: int, tied: bool, rows: int) -> jax.ShapeDtypeStruct:
    scales = jax.ShapeDtypeStruct((rows, 1, 1 if tied else bases), jnp.float32)
    return jax.eval_shape(lambda scales: level_walks.levels_of(scales, tied), scales)


@pytest.mark.parametrize("device", ["H200", "A10"])
@pytest.mark.parametrize(("bases", "tied"), KINDS)
def test_it_does_not_spill_and_multiplies_in_float32(bases, tied, device):
    rows, top = 4096, level_walks.top(bases, tied)
    levels, shape = levels_shape(bases, tied, rows), jax.ShapeDtypeStruct
    block = shape((64, rows), jnp.float32)

    def walk(corrected, within, old, levels, group):
        return level_walks.in_one_kernel(levels, group, top)(corrected, within, old, (), 0)[0]

    shapes = block, shape((64, 64), jnp.float32), block, levels, shape((rows,), jnp.int32)
    name = level_walks.name(levels.shape[1], top)
    compiled = aot.compile_for(device, walk, *shapes, kernel=name)
    assert compiled.spill_bytes == 0
    assert compiled.registers <= 128
    assert compiled.grid == (rows // level_walks.ROWS, 1, 1)
    assert "FFMA" in compiled.sass
    assert "HMMA" not in compiled.sass


@pytest.mark.parametrize(
    ("walks", "loops"),
    [
        (level_walks.column_by_column, [(2, 11), (64, 5)]),  # over blocks, over columns of a block
        (level_walks.in_one_kernel, [(2, 10)]),
    ],
)
def test_a_block_of_columns_is_few_kernels_and_waits_for_nothing(walks, loops):
    shape, inputs, rows = jax.ShapeDtypeStruct, 128, 512
    given = {"bases": 2, "size": inputs, "tied": True, "walks": walks}

    def sweep(target, matrix, scales, order):
        given_too = {"matrix": matrix, "scales": scales, "order": order}
        return error_feedback._sweep(target, target, **given_too, **given)

    columns, matrix = shape((inputs, rows), jnp.float32), shape((inputs, inputs), jnp.float32)
    scales, order = shape((rows, 1, 1), jnp.float32), shape((inputs,), jnp.int32)
    program = aot.program_for("H200", sweep, columns, matrix, scales, order)
    assert aot.launches(program.as_text() or "") == loops


@pytest.mark.parametrize(("bases", "tied"), [(2, True), (3, False)])
def test_as_ptx(bases, tied, monkeypatch):
    block, rows = 13, 40
    given, group = columns(block, rows), jnp.arange(block) % 3
    levels = level_walks.levels_of(jnp.asarray(exact_scales(rows, 3, 1 if tied else bases)), tied)

    def new(walks):
        walk = walks(levels, group, level_walks.top(bases, tied))
        return jax.jit(walk)(*given, (), 0)[0]

    wanted = new(level_walks.column_by_column)
    monkeypatch.setattr(level_walks.pl, "pallas_call", emulated_pallas_call("H200"))
    np.testing.assert_array_equal(new(level_walks.in_one_kernel), wanted)
