"""Budgets over types of matrices: bytes with padding, the least there is, and the allocation
within.
"""

import numpy as np
import pytest

from atd.decomposition.budget import GAUSSIAN, Allocation, Problem, stand_in_loss
from atd.decomposition.options import ternary_types, trellis_type
from atd.decomposition.trellis_codes import known_code
from atd.weights import DenseType, PackedType, TernaryType
from atd.weights.layouts import DEFAULT_LAYOUT

TYPES = tuple(ternary_types((32, 64), (1, 2, 3), ("row",), ("tied",), "f16"))
BYTES = [PackedType(type, DEFAULT_LAYOUT).nbytes for type in TYPES]
CHOICES = [("q", "k"), ("o",)]


def problem(budget: int) -> Problem:
    candidates = {name: TYPES for names in CHOICES for name in names}
    return Problem(candidates, CHOICES, 100, budget, 3 * 32 * 64, DEFAULT_LAYOUT)


def test_bytes_are_summed_over_the_matrices_of_a_choice():
    assert problem(0).bytes_of(("q", "k")) == tuple(2 * bytes for bytes in BYTES)
    assert problem(0).least == 100 + 3 * BYTES[0]


@pytest.mark.parametrize("slack", [0, 1])
def test_the_choice_that_gains_most_gets_the_bytes(slack):
    """One step up for either choice costs at most 2 steps; o gains more per byte."""
    step = BYTES[1] - BYTES[0]
    asked = problem(100 + 3 * BYTES[0] + step + slack)
    decided = asked.solved([np.array([[4.0, 3.9, 3.8]] * 2), np.array([[4.0, 1.0, 0.5]])])
    assert decided.types == {"q": TYPES[0], "k": TYPES[0], "o": TYPES[1]}
    assert decided.losses == {"q": 4.0, "k": 4.0, "o": 1.0}
    assert decided.predicted_kl == 9.0
    assert decided.used == 100 + 3 * BYTES[0] + step
    assert decided.bits == 8 * decided.used / decided.weights
    assert "bits per weight" in str(decided)


def test_a_matrix_with_a_code_adds_more_to_the_kl_than_it_loses_alone():
    """1 + 4 D times, with D = 0.09753 for N = 1.25; what decides are the losses alone."""
    coded = trellis_type((64, 64), known_code(1.25), "f16")
    assert coded is not None
    decided = Allocation({"q": coded, "o": TYPES[1]}, {"q": 2.0, "o": 1.0}, 100, 100, 400)
    assert decided.predicted_kl == 3.0
    assert decided.shares == {"q": pytest.approx(2 * 1.39012), "o": 1.0}
    assert str(decided).endswith("predicted KL 3.7802")


def test_stand_in_losses_fall_with_bases_and_are_none_for_dense():
    losses = problem(0).stand_in_losses()
    assert [loss.shape for loss in losses] == [(2, 3), (1, 3)]
    assert (np.diff(losses[0], axis=1) < 0).all()
    assert stand_in_loss(DenseType((32, 64), "f32")) == 0.0


@pytest.mark.parametrize("bases", GAUSSIAN)
def test_errors_on_gaussian_weights_are_those_of_equally_spaced_levels(bases):
    x = np.linspace(-8, 8, 20001)
    density, top = np.exp(-(x**2) / 2) / np.exp(-(x**2) / 2).sum(), (3**bases - 1) // 2

    def error(step: float) -> float:
        return np.square(x - np.clip(np.round(x / step), -top, top) * step) @ density

    assert min(map(error, np.geomspace(0.05, 1.5, 400))) == pytest.approx(GAUSSIAN[bases], rel=0.01)


def test_a_code_stands_in_for_less_than_a_scalar_type_of_its_bytes():
    code = trellis_type((128, 64), known_code(2, "default"), "f16")
    assert code is not None
    assert stand_in_loss(code) < 0.6 * stand_in_loss(TernaryType((128, 64), 2, "row", True, "f16"))
