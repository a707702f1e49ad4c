"""Columns of a block walked in one kernel: in jax's interpreter what the loop over columns finds,
to the bit where sums are exact, and on a GPU, where there is one, as good."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.decomposition import error_feedback, level_walks
from atd.decomposition.second_moments import proxy_loss
from atd.kernels.triton.backend import Triton
from tests.decomposition.matrices import dequantize, gaussian, moment
from tests.kernels.matrices import lowered_for

interpreted = partial(level_walks.in_one_kernel, interpret=True)


def columns(block: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """corrected, within and old of a block, in whole quarters: all sums of theirs are exact."""
    random = np.random.default_rng(0)
    corrected, old = random.integers(-12, 13, (2, block, rows)) / 4
    within = random.integers(-2, 3, (block, block)) / 4
    np.fill_diagonal(within, 0)
    return corrected.astype(np.float32), within.astype(np.float32), old.astype(np.float32)


def exact_scales(rows: int, groups: int, bases: int) -> np.ndarray:
    """Powers of two, one group of which has none."""
    exponents = np.random.default_rng(1).integers(-2, 1, (rows, groups, bases))
    scales = np.sort(2.0**exponents, axis=-1)[..., ::-1].astype(np.float32)
    scales[rows // 2, 0] = 0
    return scales


CASES = [(2, True, 13), (3, False, 13), (1, True, 64), (4, False, 5), (2, False, 1)]


@pytest.mark.exact
@pytest.mark.parametrize(
    ("bases", "tied", "block"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
)
def test_the_kernel_finds_what_the_loop_finds(bases, tied, block):
    rows = 40  # a warp and a quarter
    given, scales = columns(block, rows), exact_scales(rows, 3, 1 if tied else bases)
    group = jnp.arange(block + 7) % 3

    def new(walks):
        options = level_walks.levels_of(jnp.asarray(scales), tied), group
        walk = walks(*options, level_walks.top(bases, tied))
        return jax.jit(walk)(*given, (), 7)[0]  # not the first block of its matrix

    np.testing.assert_array_equal(new(interpreted), new(level_walks.column_by_column))


@pytest.mark.slow
@pytest.mark.parametrize(("group", "tied"), [("row", True), (32, False)])
def test_error_feedback_takes_it(monkeypatch, group, tied):
    weight, hessian = gaussian(50, 72), moment(72)  # the last block reaches back
    factor = error_feedback.factor(hessian)

    def lost():
        options = {"bases": 2, "group": group, "tied": tied}
        found = error_feedback.decompose(weight, factor, hessian, **options)
        return float(
            np.asarray(proxy_loss(weight - dequantize(*found, group, tied), hessian)).sum()
        )

    wanted = lost()
    monkeypatch.setattr(error_feedback, "fastest_walks", lambda bases, tied: interpreted)
    assert lost() == pytest.approx(wanted, rel=1e-3)  # sums in another order


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA A10"])
def test_it_lowers_for_gpus(device):
    shape = jax.ShapeDtypeStruct
    group = np.zeros(9, np.int32)

    def walk(rows, within, levels):
        return level_walks.in_one_kernel(levels, group, None)(rows, within, rows, (), 2)[0]

    shapes = [shape(sizes, np.float32) for sizes in ((7, 40), (7, 7), (1, 5, 40))]
    assert level_walks.name(5, None) in lowered_for(device, walk, *shapes)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The choice is made as on an NVIDIA GPU, with the kernel in the interpreter."""
    monkeypatch.setattr(Triton, "device_refuses", lambda self: None)
    monkeypatch.setattr(level_walks, "in_one_kernel", interpreted)
    level_walks.fastest_walks.cache_clear()
    yield
    level_walks.fastest_walks.cache_clear()


def test_it_is_taken_where_it_passes_its_test(as_on_a_gpu):
    assert level_walks.fastest_walks(2, True) is interpreted


def test_the_loop_is_taken_where_the_kernel_errs(as_on_a_gpu, monkeypatch, caplog):
    def errs(levels, group, top):
        return level_walks.column_by_column(levels * 0, group, top)

    monkeypatch.setattr(level_walks, "in_one_kernel", errs)
    with caplog.at_level(logging.WARNING):
        assert level_walks.fastest_walks(2, True) is level_walks.column_by_column
    assert "2 tied bases errs on" in caplog.text


def test_on_a_cpu_the_loop_is_taken():
    if Triton().device_refuses():
        assert level_walks.fastest_walks(3, False) is level_walks.column_by_column


@pytest.mark.skipif(bool(Triton().device_refuses()), reason=str(Triton().device_refuses()))
def test_a_gpu_loses_no_more():
    for bases in range(1, 5):
        for tied in (True, False):
            excess = level_walks.excess_error(bases, tied, level_walks.in_one_kernel)
            assert abs(excess) < 1e-3
            assert level_walks.fastest_walks(bases, tied) is level_walks.in_one_kernel
