"""How much tokens count, against the model's own logits; and what it changes."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from atd.calibration.room import Room
from atd.calibration.streams import Calibration
from atd.calibration.uncertainty import token_counts
from atd.checkpoint.cache import Cache
from atd.errors import RunFailed
from atd.ir import Graph
from atd.models.model import load
from atd.weights import Dense
from tests.models.tiny import tiny_graph

TOKENS = np.random.default_rng(0).integers(0, 40, (3, 16)).astype(np.int32)


def changed(graph: Graph, scale: float) -> Graph:
    """The graph whose logits are `scale` times as large."""

    def larger(ref):
        if ref.tensor != "lm_head.weight":
            return ref
        weight = Dense(ref.load().array * scale)
        return replace(ref, load=lambda: weight)

    return graph.with_units(tuple(unit.map_weights(larger) for unit in graph.units))


@pytest.mark.usefixtures("exact_streams")
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_roots_of_the_spread_of_the_next_token(tied):
    graph = tiny_graph(tied=tied)
    p = np.asarray(jax.nn.softmax(load(graph)(TOKENS)), np.float64)
    expected = np.sqrt((p * (1 - p)).sum(-1))
    counts = token_counts(graph, TOKENS)
    assert counts.dtype == np.float32
    np.testing.assert_allclose(counts, expected / expected.mean(), rtol=1e-4)
    assert expected.std() > 1e-3 * expected.mean()  # they do not count alike


def test_a_model_that_is_certain_lets_tokens_count_alike():
    graph = changed(tiny_graph(), 1e6)
    np.testing.assert_array_equal(token_counts(graph, TOKENS), np.ones_like(TOKENS, np.float32))


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(RunFailed, match=r"not finite.*leave out decompose\.uncertainty"):
        token_counts(changed(tiny_graph(), np.inf), TOKENS)


def test_room_is_kept_to_and_given_back(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 40, (11, 400)).astype(np.int32)  # two batches
    small, large = Room(0, tmp_path / "streams"), Room(1e9)
    in_files, in_memory = (token_counts(tiny_graph(), tokens, room) for room in (small, large))
    np.testing.assert_array_equal(in_files, in_memory)
    assert (small.left, large.left) == (0, 1e9)
    assert (tmp_path / "streams").is_dir()
    assert not list((tmp_path / "streams").rglob("*.npy"))


def test_counts_are_found_once(tmp_path):
    graph = tiny_graph()
    named = graph.with_units(
        tuple(u.map_weights(lambda ref: replace(ref, source=ref.tensor)) for u in graph.units)
    )

    def refuse():
        raise AssertionError("weights were read")

    unread = named.with_units(
        tuple(u.map_weights(lambda ref: replace(ref, load=refuse)) for u in named.units)
    )
    cache = Cache(tmp_path)
    first = token_counts(named, TOKENS, cache=cache)
    np.testing.assert_array_equal(token_counts(unread, TOKENS, cache=cache), first)
    with pytest.raises(AssertionError, match="weights were read"):
        token_counts(unread, TOKENS + 1, cache=cache)


@pytest.mark.usefixtures("exact_streams")
def test_moments_weigh_products_of_tokens_by_their_counts():
    graph = tiny_graph()
    counts = np.random.default_rng(1).uniform(0.1, 2, TOKENS.shape).astype(np.float32)
    calibration, plain = Calibration(TOKENS, counts=counts), Calibration(TOKENS)
    for one in (calibration, plain):
        for unit in graph.units[:-1]:
            one.begin(unit, unit)
            one.finish()
        one.begin(graph.epilogue, graph.epilogue)
    hidden = np.asarray(load(graph).hidden(TOKENS), np.float64).reshape(-1, 32)
    gain = graph.epilogue.node("model.norm").weights["weight"].load().dequantize()
    x = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5) * gain
    weighed = calibration.moments("lm_head", counted=True)
    expected = (x * counts.reshape(-1, 1)).T @ x / TOKENS.size
    np.testing.assert_allclose(weighed.hessian, expected, atol=1e-4)
    np.testing.assert_allclose(weighed.cross, expected, atol=1e-4)
    alike = calibration.moments("lm_head").hessian
    np.testing.assert_array_equal(alike, plain.moments("lm_head", counted=True).hessian)
    assert np.abs(alike - expected).max() > 0.01
