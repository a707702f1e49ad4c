"""The kernel that searches trellis codes as machine code, compiled without a GPU: no spills, few
instructions a row, and in an emulator what the scan finds.

Skipped where the CUDA plugin is not installed (`make gpu-check` installs it). Counts are those of
ptxas 13.5.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.decomposition import trellis, trellis_feedback, trellis_kernel
from atd.decomposition.trellis_codes import TABLE, Known, known_code
from atd.kernels.tuning import aot
from tests.decomposition.test_trellis import column
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


@pytest.mark.parametrize(("first_visit", "most"), [(False, 10), (True, 15)])
def test_a_visit_of_a_column_is_few_kernels_and_waits_for_nothing(first_visit, most):
    inputs, rows, length = 128, 512, 128
    options = {"code": known_code(2), "length": length, "search": trellis_kernel.best_way}

    def sweep(target, quantized, seams, matrix, scale):
        known = None if first_visit else seams
        given = {"matrix": matrix, "scale": scale} | options
        return trellis_feedback.sweep(target, quantized, known, **given)

    shape = jax.ShapeDtypeStruct
    columns, seams = shape((inputs, rows), jnp.float32), shape((inputs, rows // length), jnp.int32)
    matrix, scale = shape((inputs, inputs), jnp.float32), shape((rows,), jnp.float32)
    program = aot.program_for("H200", sweep, columns, columns, seams, matrix, scale)
    text = program.as_text() or ""
    loops = [line for line in text.splitlines() if re.search(r" (while|conditional)\(", line)]
    assert len(loops) == 2  # over blocks of columns, over the columns of one
    assert all("known_trip_count" in line for line in loops)
    (visit,) = [part for part in text.split("\n\n") if '"__gpu$xla.gpu.triton"' in part]
    assert "trellis_search_81" in visit
    assert len(re.findall(r" (?:fusion|custom-call|copy)\(", visit)) <= most


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
