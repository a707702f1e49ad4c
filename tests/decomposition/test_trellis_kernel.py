"""The search of trellis codes as one kernel: in jax's interpreter equal to the scan to the bit, and
on a GPU, where there is one, as good."""

import logging
from functools import partial

import jax
import numpy as np
import pytest

from atd.decomposition import (
    error_feedback,
    trellis,
    trellis_feedback,
    trellis_kernel,
    trellis_walks,
)
from atd.decomposition.trellis_codes import TABLE, known_code
from atd.kernels.triton.backend import Triton
from atd.weights.codes import Code
from tests.decomposition.test_trellis import column
from tests.kernels.matrices import lowered_for

LENGTH, SEGMENTS, RAGGED = 24, 3, 12
interpreted = partial(trellis_kernel.best_way, interpret=True)
CODES = [
    pytest.param(
        known.code,
        id=f"{known.bases:g}-{known.kind}",
        marks=() if (known.bases, known.kind) == (1.5, "fast") else pytest.mark.slow,
    )
    for known in TABLE
]


def assert_same(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.exact
@pytest.mark.parametrize("code", CODES)
def test_it_finds_what_the_scan_finds(code):
    x, scale = column(LENGTH * SEGMENTS + RAGGED)
    x[5] = 30  # far from all values
    scan, kernel = (
        jax.jit(partial(trellis.snap_column, code=code, length=LENGTH, search=search))
        for search in (trellis.best_way, interpreted)
    )
    assert_same(kernel(x, scale), scan(x, scale))


@pytest.mark.exact
def test_a_known_seam_is_kept():
    x, scale = column(LENGTH * SEGMENTS)
    seam = np.array([0, 4, 8], np.int32)
    options = {"code": known_code(2, "fast"), "length": LENGTH, "seam": seam}
    found = jax.jit(partial(trellis.snap, **options, search=interpreted))(x, scale)
    assert_same(found, jax.jit(partial(trellis.snap, **options))(x, scale))
    np.testing.assert_array_equal(found[2], seam)


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA A10"])
def test_it_lowers_for_gpus(device):
    steps = trellis.phases(known_code(1.75))

    def search(target, weight):
        return trellis_kernel.best_way(target, weight, None, steps)

    rows = jax.ShapeDtypeStruct((24, 3), np.float32)
    assert trellis_kernel.name(steps) in lowered_for(device, search, rows, rows)


@pytest.mark.slow
@pytest.mark.exact
def test_error_feedback_takes_it(monkeypatch):
    weight = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    hessian = np.eye(6, dtype=np.float32) + 0.3
    factor = error_feedback.factor(hessian)
    options = {"code": known_code(2, "fast"), "length": 16, "sweeps": 0, "refits": 0}
    wanted = trellis_feedback.decompose(weight, factor, hessian, **options)
    walks = partial(trellis_walks.column_by_column, search=interpreted)
    monkeypatch.setattr(trellis_feedback, "fastest_walks", lambda code: walks)
    assert_same(trellis_feedback.decompose(weight, factor, hessian, **options), wanted)


@pytest.mark.slow
@pytest.mark.exact
def test_columns_are_searched_together(monkeypatch):
    weight = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    options = {"code": known_code(2, "fast"), "length": 16, "refits": 0}
    wanted = trellis_feedback.nearest(weight, **options)
    monkeypatch.setattr(trellis_feedback, "fastest_search", lambda code: interpreted)
    assert_same(trellis_feedback.nearest(weight, **options), wanted)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The choice is made as on an NVIDIA GPU, with the kernel in the interpreter."""
    monkeypatch.setattr(Triton, "device_refuses", lambda self: None)
    monkeypatch.setattr(trellis_kernel, "best_way", interpreted)
    trellis_kernel.fastest_search.cache_clear()
    yield
    trellis_kernel.fastest_search.cache_clear()


def test_it_is_taken_where_it_passes_its_test(as_on_a_gpu):
    assert trellis_kernel.fastest_search(known_code(2, "fast")) is interpreted


def test_on_a_cpu_the_scan_is_taken():
    if Triton().device_refuses():
        assert trellis_kernel.fastest_search(known_code(2)) is trellis.best_way


def test_the_scan_is_taken_where_the_kernel_errs(as_on_a_gpu, monkeypatch, caplog):
    def errs(target, weight, seam, steps):
        return interpreted(target + 0.5, weight, seam, steps)

    monkeypatch.setattr(trellis_kernel, "best_way", errs)
    with caplog.at_level(logging.WARNING):
        assert trellis_kernel.fastest_search(known_code(2, "fast")) is trellis.best_way
    assert "the error of its trits is" in caplog.text


def test_the_scan_is_taken_for_more_states_than_registers_hold(as_on_a_gpu):
    code = Code(((tuple([0.4] * 8),),))  # 3^7 states
    assert trellis_kernel.fastest_search(code) is trellis.best_way


@pytest.mark.skipif(bool(Triton().device_refuses()), reason=str(Triton().device_refuses()))
def test_a_gpu_finds_trits_as_good():
    for known in TABLE:
        assert abs(trellis_kernel.excess_error(known.code, trellis_kernel.best_way)) < 1e-3
        assert trellis_kernel.fastest_search(known.code) is trellis_kernel.best_way
