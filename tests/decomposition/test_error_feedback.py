"""Error feedback and descent on real second moments, against GPTQ as it is written and brute force.

Each combination of input width, group size, bases and tied compiles for a second or two.
"""

from itertools import product

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer

from atd.decomposition import error_feedback
from atd.decomposition.error_feedback import decompose, factor
from atd.decomposition.least_squares import als
from atd.decomposition.second_moments import DAMPING
from atd.errors import BadInput
from atd.models import execute, frontend
from tests.decomposition.matrices import damped, dequantize, gaussian, moment

WINDOWS, CONTEXT = 16, 256  # 4096 tokens to calibrate on, and as many held out


def cost(weight, quantized, hessian) -> np.ndarray:
    """float64 [out]: diag(dW H dW')."""
    error = np.asarray(weight, np.float64) - np.asarray(quantized, np.float64)
    return np.einsum("oi,oi->o", error @ np.asarray(hessian, np.float64), error)


def relative(weight, quantized, hessian) -> float:
    return cost(weight, quantized, hessian).sum() / cost(weight, 0 * weight, hessian).sum()


def fit(weight, hessian, bases, group, tied, **options) -> np.ndarray:
    trits, scales = decompose(
        weight, factor(hessian), hessian, bases=bases, group=group, tied=tied, **options
    )
    return dequantize(trits, scales, group, tied)


@pytest.fixture(scope="module")
def linears(trained) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Linears of block 1: weight, second moment of its inputs, that on other text."""
    text = trained.calibration.read_text()[:40_000]
    ids = (
        Tokenizer.from_file(str(trained.folder / "tokenizer.json"))
        .encode(text, add_special_tokens=False)
        .ids
    )
    tokens = jnp.array(ids[: 2 * WINDOWS * CONTEXT]).reshape(-1, CONTEXT)
    graph = frontend.open(trained.folder)

    def value(block, x, name):
        weights = {
            node.name: {slot: ref.load() for slot, ref in node.weights.items()}
            for node in block.nodes
        }
        return execute.run(block, weights, {"x": x}, [name])[0][name]

    stream = value(graph.prologue, tokens, graph.prologue.output)
    stream = value(graph.blocks[0], stream, graph.blocks[0].output)
    found = {}
    for name in ("q_proj", "down_proj"):
        node = next(node for node in graph.blocks[1].nodes if node.name.endswith(name))
        x = np.asarray(value(graph.blocks[1], stream, node.inputs[0]), np.float32)
        moments = [
            np.einsum("bti,btj->ij", half, half) / half.shape[0] / CONTEXT
            for half in (x[:WINDOWS], x[WINDOWS:])
        ]
        found[name] = np.asarray(node.weights["weight"].load().dequantize(), np.float32), *moments
    return found


# --- what it gains --------------------------------------------------------------------------------

# model, linear, bases, group, tied, sweeps, refits: cost over that of als under the diagonal of H,
# on the same and on other text, at most. Measured: 6 to 8 % less.
GAINS = [
    ("packaged", "q_proj", 2, "row", True, 2, 0, 0.63, 0.655),
    ("packaged", "down_proj", 4, 64, False, 1, 0, 0.515, 0.575),  # a ragged last group
]
MORE_GAINS = [
    ("packaged", "q_proj", 2, 32, False, 0, 2, 0.64, 0.665),
    ("packaged", "down_proj", 2, "row", True, 2, 0, 0.405, 0.46),
    ("packaged", "q_proj", 1, 32, False, 0, 2, 0.585, 0.61),
    ("packaged", "q_proj", 2, 32, True, 2, 1, 0.61, 0.635),
    ("packaged", "q_proj", 3, "row", True, 2, 0, 0.655, 0.675),
    ("packaged", "down_proj", 2, 64, False, 0, 2, 0.455, 0.51),
    ("stories15M", "q_proj", 2, "row", True, 2, 0, 0.51, 0.61),
    ("stories15M", "q_proj", 2, "row", False, 0, 2, 0.52, 0.62),
    ("stories15M", "q_proj", 2, 96, True, 2, 1, 0.53, 0.63),
    ("stories15M", "q_proj", 2, 96, False, 0, 2, 0.54, 0.65),
    ("stories15M", "q_proj", 1, 96, False, 0, 2, 0.52, 0.62),
    ("stories15M", "q_proj", 3, "row", True, 2, 0, 0.52, 0.62),
    ("stories15M", "q_proj", 4, 64, False, 1, 0, 0.65, 0.75),  # a ragged last group
    ("stories15M", "down_proj", 2, "row", True, 2, 0, 0.49, 0.81),
    ("stories15M", "down_proj", 2, 96, False, 0, 2, 0.52, 0.85),
]


@pytest.mark.parametrize(
    ("trained", "name", "bases", "group", "tied", "sweeps", "refits", "bound", "bound_held_out"),
    [*GAINS, *(pytest.param(*gain, marks=pytest.mark.slow) for gain in MORE_GAINS)],
    indirect=["trained"],
)
def test_feedback_beats_nearest_assignment(
    linears, name, bases, group, tied, sweeps, refits, bound, bound_held_out
):
    weight, hessian, held_out = linears[name]
    nearest = dequantize(
        *als(weight, bases, group, tied, feature_weights=np.diagonal(hessian)), group, tied
    )
    found = fit(weight, hessian, bases, group, tied, sweeps=sweeps, refits=refits)
    assert relative(weight, found, hessian) < bound * relative(weight, nearest, hessian)
    assert relative(weight, found, held_out) < bound_held_out * relative(weight, nearest, held_out)


@pytest.mark.parametrize("tied", [True, False])
def test_sweeps_and_refits_never_raise_the_cost_of_any_row(linears, tied):
    weight, hessian, _ = linears["q_proj"]
    hessian = damped(hessian)
    steps = [(0, 0), (1, 0), (2, 0), (4, 0), (4, 1), (4, 2), (4, 3)]
    costs = []
    for sweeps, refits in steps:
        shared = factor(hessian, damping=0.0)
        found = decompose(
            weight, shared, hessian, bases=2, group=96, tied=tied, sweeps=sweeps, refits=refits
        )
        costs.append(cost(weight, dequantize(*found, 96, tied), hessian))
    for step, before, after in zip(steps[1:], costs, costs[1:], strict=False):
        assert (after <= before * (1 + 1e-5)).all(), step
        assert after.sum() < before.sum() * 0.9995, step  # and each does something


def test_a_descent_that_has_ended_leaves_nothing_to_gain_in_any_single_weight():
    hessian = moment(12)
    weight = gaussian(40, 12)
    trits, scales = decompose(
        weight, factor(hessian), hessian, bases=2, group="row", tied=True, sweeps=30
    )
    quantized, wanted = dequantize(trits, scales, "row", True), damped(hessian)
    least = cost(weight, quantized, wanted)
    for j, integer in product(range(12), range(-4, 5)):
        other = quantized.copy()
        other[:, j] = integer * scales[:, 0, 0].astype(np.float32)
        assert (cost(weight, other, wanted) >= least * (1 - 1e-5)).all()


def test_close_to_the_best_of_all_assignments():
    hessian = moment(6, decay=0.5)
    weight = gaussian(64, 6)
    trits, scales = decompose(weight, factor(hessian), hessian, bases=1, group="row", tied=False)
    scale = scales[:, :, 0].astype(np.float64)
    found = cost(weight, dequantize(trits, scales, "row", False), damped(hessian))
    all_of_them = [
        cost(weight, scale * np.array(codes), damped(hessian))
        for codes in product((-1, 0, 1), repeat=6)
    ]
    best = np.min(all_of_them, axis=0)
    nearest = cost(weight, scale * np.clip(np.round(weight / scale), -1, 1), damped(hessian))
    assert (found >= best * (1 - 1e-5)).all()
    assert found.sum() - best.sum() < 0.55 * (
        nearest.sum() - best.sum()
    )  # measured 0.48: no single change helps, a pair may


# --- against GPTQ as it is written ----------------------------------------------------------------


def gptq(weight, scale, hessian, top) -> np.ndarray:
    """The integers that GPTQ (2210.17323, act-order) assigns, in float64.

    Errors over U_jj go to later columns along U_j, H^-1 = U'U.
    """
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    upper = np.linalg.cholesky(
        np.linalg.inv(damped(hessian.astype(np.float64))[np.ix_(order, order)])
    ).T
    weight = weight.astype(np.float64)[:, order]
    codes = np.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j] = np.clip(np.round(weight[:, j] / scale), -top, top)
        error = (weight[:, j] - codes[:, j] * scale) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
    return codes[:, np.argsort(order)]


def test_feedback_alone_is_gptq():
    hessian, weight = moment(150), gaussian(30, 150)  # several blocks, the last of which overlaps
    trits, scales = decompose(
        weight, factor(hessian), hessian, bases=2, group="row", tied=True, sweeps=0
    )
    expected = gptq(weight, scales[:, 0, 0].astype(np.float64), hessian, 4)
    assert (
        trits @ np.array([3, 1]) == expected
    ).mean() > 0.999  # float32 may take the other side of a tie


@pytest.mark.parametrize("name", ["q_proj", "down_proj"])
def test_as_good_as_gptq_on_real_moments(linears, name):
    weight, hessian, _ = linears[name]
    trits, scales = decompose(
        weight, factor(hessian), hessian, bases=2, group="row", tied=True, sweeps=0
    )
    scale = scales[:, 0].astype(np.float64)
    expected = relative(weight, gptq(weight, scale[:, 0], hessian, 4) * scale, hessian)
    assert relative(weight, dequantize(trits, scales, "row", True), hessian) == pytest.approx(
        expected, rel=0.01
    )


# --- conventions ----------------------------------------------------------------------------------


@pytest.mark.exact
@pytest.mark.parametrize(
    ("bases", "group", "tied"), [(1, "row", True), (2, 32, False), (2, 32, True)]
)
def test_without_correlations_it_is_als(bases, group, tied):
    weight = gaussian(300, 72)  # two chunks of rows, a ragged group
    hessian = np.eye(72, dtype=np.float32)
    found = decompose(weight, factor(hessian), hessian, bases=bases, group=group, tied=tied)
    expected = als(weight, bases, group, tied, feature_weights=np.ones(72))
    np.testing.assert_array_equal(
        dequantize(*found, group, tied), dequantize(*expected, group, tied)
    )


@pytest.mark.exact
@pytest.mark.parametrize(
    ("dtype", "bases", "group", "tied"),
    [
        pytest.param(np.float16, 3, 32, False, marks=pytest.mark.slow),
        (np.float32, 2, 32, False),
        (ml_dtypes.bfloat16, 2, 32, True),
        (np.float16, 4, "row", True),
    ],
)
def test_trits_and_scales_rebuild_what_was_judged(monkeypatch, dtype, bases, group, tied):
    judged = []

    def spy(quantized, scales, order, **options):
        judged.append(np.asarray(error_feedback.stored_order(quantized, order)))
        return trits_of(quantized, scales, order, **options)

    trits_of = error_feedback.trits_on_levels
    monkeypatch.setattr(error_feedback, "trits_on_levels", spy)
    weight, hessian = gaussian(50, 72), moment(72)
    weight[3] = 0  # zero scales
    weight[4, :32] = 0
    shared = factor(hessian)
    trits, scales = decompose(
        weight,
        shared,
        hessian,
        bases=bases,
        group=group,
        tied=tied,
        dtype=dtype,
        sweeps=1,
        refits=2,
    )
    assert scales.dtype == dtype
    assert (scales >= 0).all()
    assert (np.diff(scales, axis=-1) <= 0).all()
    np.testing.assert_array_equal(dequantize(trits, scales, group, tied), judged[0][:50])
    assert not trits[3].any()


@pytest.mark.exact
def test_rows_do_not_depend_on_each_other_and_runs_repeat():
    weight, hessian = gaussian(error_feedback.ROWS + 40, 72), moment(72)
    options = {"bases": 2, "group": 32, "tied": False, "refits": 1}
    shared = factor(hessian)
    whole, again, part = (
        decompose(rows, shared, hessian, **options) for rows in (weight, weight, weight[-60:])
    )
    for one, two, tail in zip(whole, again, part, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one[-60:], tail)


def test_inputs_are_visited_by_size_or_as_they_stand():
    hessian = moment(40)
    np.testing.assert_array_equal(
        factor(hessian).order, np.argsort(-np.diagonal(hessian), kind="stable")
    )
    np.testing.assert_array_equal(factor(hessian, order=False).order, np.arange(40))


# --- moments that are hard, and bad ones ----------------------------------------------------------


@pytest.mark.exact
def test_inputs_that_calibration_never_saw():
    hessian = moment(72)
    dead = [0, 7, 71]
    hessian[dead], hessian[:, dead] = 0, 0
    weight = gaussian(50, 72)
    shared = factor(hessian)
    assert shared.damping == DAMPING
    trits, scales = decompose(
        weight, shared, hessian, bases=2, group=32, tied=False, dtype=np.float32
    )
    found = dequantize(trits, scales, 32, False)
    nearest = dequantize(
        *als(weight, 2, 32, False, np.float32, feature_weights=np.diagonal(hessian)), 32, False
    )
    np.testing.assert_array_equal(
        found[:, dead], nearest[:, dead]
    )  # no correlation: as near as the scales allow


def test_fewer_tokens_than_inputs():
    hessian, weight = moment(72, tokens=10), gaussian(50, 72)
    found = fit(weight, hessian, 2, 32, False)
    nearest = dequantize(
        *als(weight, 2, 32, False, feature_weights=np.diagonal(hessian)), 32, False
    )
    assert relative(weight, found, hessian) < 0.1 * relative(weight, nearest, hessian)
    assert factor(hessian, damping=0.0).damping > 0  # raised, and said so


@pytest.mark.exact
def test_no_input_at_all():
    weight = gaussian(50, 72)
    found = fit(weight, np.zeros((72, 72), np.float32), 2, 32, False)
    np.testing.assert_array_equal(found, dequantize(*als(weight, 2, 32, False), 32, False))


def test_what_is_no_second_moment_is_refused():
    for hessian in (-np.eye(8), np.eye(8) + 100 * (1 - np.eye(8))):
        with pytest.raises(BadInput, match="not positive semi-definite"):
            factor(hessian)
    with pytest.raises(BadInput, match=r"square matrix.*\[8, 9\]"):
        factor(np.zeros((8, 9)))
    hessian = moment(40)
    with pytest.raises(BadInput, match=r"40 inputs .* for weights of 30"):
        decompose(gaussian(5, 30), factor(hessian), hessian, bases=2, group="row", tied=True)


def test_options_that_cannot_be_are_refused():
    hessian, weight = moment(40), gaussian(5, 40)
    with pytest.raises(BadInput, match="'tensor'"):
        decompose(weight, factor(hessian), hessian, bases=2, group="tensor", tied=True)
    with pytest.raises(BadInput, match="1 to 4 bases"):
        decompose(weight, factor(hessian), hessian, bases=5, group="row", tied=True)
    weight[1, 1] = np.nan
    with pytest.raises(BadInput, match="NaN"):
        decompose(weight, factor(hessian), hessian, bases=2, group="row", tied=True)
