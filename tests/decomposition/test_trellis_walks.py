"""Columns of a block walked with a trellis code in one kernel: in jax's interpreter what the loop
over columns finds, to the bit where sums are exact, and on a GPU, where there is one, as good."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.decomposition import error_feedback, trellis_feedback, trellis_walks
from atd.decomposition.trellis import best_way, phases
from atd.decomposition.trellis_codes import TABLE, known_code
from atd.kernels.triton.backend import Triton
from atd.weights.codes import Code, parse_code
from tests.decomposition.matrices import gaussian
from tests.decomposition.test_level_walks import columns
from tests.kernels.matrices import lowered_for

interpreted = partial(trellis_walks.in_one_kernel, interpret=True)
# Taps in eighths, so that all sums are exact.
EXACT = {
    "one phase": (parse_code("0.5,0.375,-0.5|1.25"), 12, 3),
    "two phases": (parse_code("0.5,0.25,-0.625|0.875,-0.5/1,0.75"), 8, 4),
    "no loose trits": (parse_code("0.5,-0.375"), 5, 5),
}


def walked(walks, code: Code, length: int, block: int, keep: bool, importance: bool):
    """What a walk finds of a small block: whole segments and a rest."""
    rows = 2 * length + code.period
    given = columns(block, rows)
    random = np.random.default_rng(2)
    scale = (2.0 ** random.integers(-1, 2, rows)).astype(np.float32)
    scale[3] = 0
    costs = (2.0 ** random.integers(-1, 3, rows)).astype(np.float32) if importance else None
    seams, trits = trellis_walks.empty(block, rows, code, length)
    if keep:
        seams += jnp.arange(seams.size).reshape(seams.shape) % 3
    walk = walks(jnp.asarray(scale), code, length, costs, keep)
    return jax.jit(walk)(*given, (seams, trits), 0)


@pytest.mark.slow
@pytest.mark.exact
@pytest.mark.parametrize(
    ("name", "keep", "importance"),
    [
        ("one phase", False, True),
        ("one phase", True, False),
        ("two phases", True, True),
        ("two phases", False, False),
        ("no loose trits", False, False),
    ],
)
def test_the_kernel_finds_what_the_loop_finds(name, keep, importance):
    given = *EXACT[name], keep, importance
    found, wanted = (walked(w, *given) for w in (interpreted, trellis_walks.column_by_column))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_error_feedback_takes_it(monkeypatch):
    weight, hessian = gaussian(40, 6), np.eye(6, dtype=np.float32) + 0.3
    factor, code = error_feedback.factor(hessian), known_code(2, "fast")
    options = {"code": code, "length": 16, "refits": 0}
    wanted = trellis_feedback.decompose(weight, factor, hessian, **options)
    monkeypatch.setattr(trellis_feedback, "fastest_walks", lambda code: interpreted)
    found = trellis_feedback.decompose(weight, factor, hessian, **options)
    assert np.mean(found[0] == wanted[0]) > 0.99  # sums in another order
    np.testing.assert_allclose(found[1], wanted[1], rtol=2e-3)


@pytest.mark.slow
def test_a_sweep_over_several_blocks_loses_what_the_loop_loses():
    assert abs(trellis_walks.excess_error(known_code(2, "fast"), interpreted)) < 1e-3


def test_it_lowers_for_gpus():
    code, shape = known_code(2, "fast"), jax.ShapeDtypeStruct

    def walk(rows, within, seams, scale):
        walk = trellis_walks.in_one_kernel(scale, code, 24, None, False)
        return walk(rows, within, rows, (seams, None), 0)[0]

    shapes = [shape(sizes, np.float32) for sizes in ((7, 48), (7, 7))]
    shapes += [shape((7, 2), np.int32), shape((48,), np.float32)]
    assert trellis_walks.name(phases(code)) in lowered_for("NVIDIA H200", walk, *shapes)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The choice is made as on an NVIDIA GPU."""
    monkeypatch.setattr(Triton, "device_refuses", lambda self: None)
    monkeypatch.setattr(trellis_walks, "fastest_search", lambda code: best_way)
    trellis_walks.fastest_walks.cache_clear()
    yield
    trellis_walks.fastest_walks.cache_clear()


@pytest.mark.parametrize("excess", [1e-5, 0.1, np.nan])
def test_it_is_taken_where_it_passes_its_test(as_on_a_gpu, monkeypatch, caplog, excess):
    monkeypatch.setattr(trellis_walks, "excess_error", lambda code, walks: excess)
    with caplog.at_level(logging.WARNING):
        walks = trellis_walks.fastest_walks(known_code(2))
    if excess == 1e-5:
        assert walks is trellis_walks.in_one_kernel
        assert not caplog.text
    else:
        assert isinstance(walks, partial)
        assert walks.func is trellis_walks.column_by_column
        assert "walks columns of trellis codes errs on" in caplog.text


def test_the_loop_is_taken_for_more_states_than_registers_hold(as_on_a_gpu):
    code = Code(((tuple([0.4] * 8),),))  # 3^7 states
    assert isinstance(trellis_walks.fastest_walks(code), partial)


@pytest.mark.skipif(bool(Triton().device_refuses()), reason=str(Triton().device_refuses()))
def test_a_gpu_loses_no_more():
    for known in TABLE:
        excess = trellis_walks.excess_error(known.code, trellis_walks.in_one_kernel)
        assert abs(excess) < 1e-2
        assert trellis_walks.fastest_walks(known.code) is trellis_walks.in_one_kernel
