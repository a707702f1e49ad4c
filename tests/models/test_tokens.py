"""Token ids outside the vocabulary are refused wherever they enter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.calibration.moments import dense_moments
from atd.calibration.streams import Calibration
from atd.errors import BadInput
from atd.models.model import load
from atd.models.tokens import check_tokens
from tests.models.tiny import tiny_graph


@pytest.fixture(scope="module")
def model():
    return load(tiny_graph())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 39], ""),
        ([], ""),
        (np.array([[1, 40]]), "token id 40 lies outside the model's vocabulary of 40"),
        ([-1, 3], "token id -1 lies outside"),
        ([2**32 + 1], "token id 4294967297 lies outside"),  # int32 would make 1 of it
        ([1.0], "token ids are float64; expected integers"),
    ],
)
def test_what_is_refused(tokens, message):
    if not message:
        check_tokens(tokens, 40)
        return
    with pytest.raises(BadInput, match=message):
        check_tokens(tokens, 40)


@pytest.mark.parametrize("make", [np.array, jnp.array, list])
def test_a_model_refuses_them(model, make):
    for enter in (model, model.hidden, lambda ids: model.prefill(ids, model.new_cache(1, 8))):
        with pytest.raises(BadInput, match="token id 40 lies outside"):
            enter(make([[1, 40]]))
    _, cache = model.prefill([[1, 2]], model.new_cache(1, 8))
    with pytest.raises(BadInput, match="token id 40 lies outside"):
        model.decode([40], cache)


def test_what_pads_a_prompt_may_be_anything(model):
    one, _ = model.prefill([[1, 2, 0]], model.new_cache(1, 8), [2])
    other, _ = model.prefill([[1, 2, 99]], model.new_cache(1, 8), [2])
    np.testing.assert_array_equal(one, other)


def test_a_traced_call_is_not_looked_at(model):
    assert jax.eval_shape(model.hidden, jnp.zeros((1, 4), jnp.int32)).shape == (1, 4, 32)


def test_calibration_refuses_them():
    graph, windows = tiny_graph(), np.array([[1, 40]], np.int32)
    with pytest.raises(BadInput, match="token id 40 lies outside"):
        Calibration(windows).begin(graph.prologue, graph.prologue)
    with pytest.raises(BadInput, match="token id 40 lies outside"):
        next(dense_moments(graph, windows, ()))
