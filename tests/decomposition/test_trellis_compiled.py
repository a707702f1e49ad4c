"""Kernels for trellis codes as machine code, compiled without a GPU: no spills, few instructions a
row, few launches, and in an emulator what the scan finds.

Skipped where the CUDA plugin is not installed (`make gpu-check` installs it). Counts are those of
ptxas 13.5.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.decomposition import trellis, trellis_feedback, trellis_kernel, trellis_walks
from atd.decomposition.trellis_codes import TABLE, Known, known_code
from atd.kernels.tuning import aot
from tests.decomposition.test_trellis import column
from tests.decomposition.test_trellis_walks import EXACT, walked
from tests.kernels.ptx.pallas import emulated_pallas_call

if reason := aot.missing():
    pytest.skip(reason, allow_module_level=True)
ROWS, SEGMENTS = 96, 32
BARRIER = "BAR.SYNC.DEFER_BLOCKING"


def id_of(known: Known) -> str:
    return f"{known.bases:g}-{known.kind}"


SMALLER_GPU = [known for known in TABLE if id_of(known) in ("1.75-default", "2-default", "2-best")]


@pytest.mark.parametrize(
    ("known", "device", "known_seam"),
    [(known, "H200", True) for known in TABLE] + [(known, "A10", False) for known in SMALLER_GPU],
    ids=lambda value: id_of(value) if isinstance(value, Known) else str(value),
)
def test_it_does_not_spill_and_takes_few_instructions_a_row(known, device, known_seam):
    steps = trellis.phases(known.code)
    rows = jax.ShapeDtypeStruct((ROWS, SEGMENTS), jnp.float32)
    seam = [jax.ShapeDtypeStruct((SEGMENTS,), jnp.int32)] * known_seam
    compiled = aot.compile_for(
        device,
        lambda target, weight, seam=None: trellis_kernel.best_way(target, weight, seam, steps),
        *(rows, rows, *seam),
        kernel=trellis_kernel.name(steps),
    )
    loop = aot.main_loop_instructions(compiled.sass)
    assert compiled.spill_bytes == 0
    assert loop[BARRIER] % len(steps) == 0  # one per row, of which the loop has some
    assert loop.total() / loop[BARRIER] < (210 if max(step.behind for step in steps) > 256 else 95)


@pytest.mark.parametrize("first_visit", [False, True])
@pytest.mark.parametrize("in_one_kernel", [False, True])
def test_a_sweep_is_few_kernels_and_waits_for_nothing(first_visit, in_one_kernel):
    inputs, rows, length = 128, 512, 128
    columns = partial(trellis_walks.column_by_column, search=trellis_kernel.best_way)
    walks = trellis_walks.in_one_kernel if in_one_kernel else columns

    def sweep(target, quantized, seams, matrix, scale):
        given = {"matrix": matrix, "scale": scale, "code": known_code(2), "length": length}
        known = None if first_visit else seams
        return trellis_feedback.sweep(target, quantized, known, walks=walks, **given)

    shape = jax.ShapeDtypeStruct
    columns, seams = shape((inputs, rows), jnp.float32), shape((inputs, rows // length), jnp.int32)
    matrix, scale = shape((inputs, inputs), jnp.float32), shape((rows,), jnp.float32)
    program = aot.program_for("H200", sweep, columns, columns, seams, matrix, scale)
    loops = aot.launches(program.as_text() or "")
    if in_one_kernel:
        assert loops == [(2, 11 if first_visit else 12)]  # over blocks of columns
    else:
        assert loops == [(2, 15), (64, 15 if first_visit else 10)]  # and over the columns of one


@pytest.mark.parametrize(("bases", "kind"), [(2, "default"), (1.5, "fast")])
def test_as_ptx(bases, kind, monkeypatch):
    code = known_code(bases, kind)
    x, scale = column(64)
    wanted = jax.jit(partial(trellis.snap, code=code, length=32))(x, scale)
    monkeypatch.setattr(trellis_kernel.pl, "pallas_call", emulated_pallas_call("H200"))
    search = trellis_kernel.best_way
    found = jax.jit(partial(trellis.snap, code=code, length=32, search=search))(x, scale)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def walk_of(known: Known, keep: bool, segments: int = 32):
    """(the walk of a block of columns, shapes of its arguments)."""
    length, shape = 128 // known.code.period * known.code.period, jax.ShapeDtypeStruct
    columns, row = (
        shape((64, segments * length), jnp.float32),
        shape((segments * length,), jnp.float32),
    )

    def walk(corrected, within, old, seams, scale):
        walk = trellis_walks.in_one_kernel(scale, known.code, length, None, keep)
        return walk(corrected, within, old, (seams, None), 0)[0]

    within, seams = shape((64, 64), jnp.float32), shape((64, segments), jnp.int32)
    return walk, (columns, within, columns, seams, row)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("known", SMALLER_GPU, ids=id_of)
def test_the_walk_of_a_block_hardly_spills(known, keep):
    walk, shapes = walk_of(known, keep)
    name = trellis_walks.name(trellis.phases(known.code))
    compiled = aot.compile_for("H200", walk, *shapes, kernel=name)
    assert compiled.spill_bytes <= (24 if (id_of(known), keep) == ("2-best", False) else 0)
    assert compiled.shared_bytes < 1024
    assert compiled.grid == (32, 1, 1)
    assert not re.search(r"\.tf32", compiled.ptx)


@pytest.mark.parametrize(("name", "keep"), [("one phase", False), ("two phases", True)])
def test_the_walk_of_a_block_as_ptx(name, keep, monkeypatch):
    given = *EXACT[name], keep, True
    wanted = walked(trellis_walks.column_by_column, *given)
    monkeypatch.setattr(trellis_walks.pl, "pallas_call", emulated_pallas_call("H200"))
    found = walked(trellis_walks.in_one_kernel, *given)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
