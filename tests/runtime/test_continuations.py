"""Scores of continuations: against whole forward passes, lm-evaluation-harness's `hf` (a golden
file), and perplexity.
"""

import json
import math

import jax
import numpy as np
import pytest

from atd.errors import BadInput, RunFailed
from atd.models.model import load
from atd.runtime.continuations import fit, score_continuations
from atd.runtime.evaluate import evaluate
from atd.runtime.generate import generate
from atd.runtime.rows import Families, Request, batches
from tests.golden.write_gguf import GOLDEN
from tests.models.tiny import tiny_graph


@pytest.fixture(scope="module")
def model():
    return load(tiny_graph())


@pytest.fixture(scope="module")
def stories():
    return load(GOLDEN / "stories")


def questions(vocabulary: int, seed: int = 0) -> list[Request]:
    """Contexts with 1 to 5 continuations of 1 to 11 tokens, in any order, one of them twice."""
    rng = np.random.default_rng(seed)

    def some(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocabulary, rng.integers(1, most)).tolist())

    contexts = [some(60) for _ in range(12)]
    found = [Request(c, some(12)) for c in contexts for _ in range(rng.integers(1, 6))]
    found += [found[3], Request(found[0].context[:1], found[0].context[1:] or (1,))]
    return [found[i] for i in rng.permutation(len(found))]


def by_the_forward_pass(model, requests: list[Request]) -> list[tuple[float, bool]]:
    """Each request on a row of its own, all logits of it."""
    tokens = np.zeros((len(requests), 72), np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: len(request.tokens)] = request.tokens
    log_p = np.asarray(jax.nn.log_softmax(model(tokens)), np.float64)
    found = []
    for row, request in zip(log_p, requests, strict=True):
        targets, end = np.array(request.continuation), len(request.tokens)
        row = row[end - len(targets) : end]
        log_likelihood = row[np.arange(len(targets)), targets].sum()
        found.append((log_likelihood, bool((row.argmax(axis=1) == targets).all())))
    return found


@pytest.mark.parametrize("rows", [None, 3])
def test_they_are_those_of_the_forward_pass(model, rows):
    requests = questions(model.vocabulary)
    assert any(isinstance(batch, Families) for batch in batches(requests, rows))
    heard = []
    scores = score_continuations(model, requests, rows=rows, progress=heard.append)
    expected = by_the_forward_pass(model, requests)
    for score, (log_likelihood, greedy) in zip(scores, expected, strict=True):
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
        assert score.greedy == greedy
    assert heard[-1].ended
    assert [p.done for p in heard] == sorted(p.done for p in heard)


def test_the_likeliest_tokens_are_greedy(model):
    context = (3, 1, 4, 1, 5)
    found = generate(model, context, max_new_tokens=4)
    good, bad = Request(context, tuple(found)), Request(context, (*found[:3], found[3] ^ 1))
    assert [score.greedy for score in score_continuations(model, [bad, good])] == [False, True]


def test_they_are_those_of_transformers(stories):
    golden = json.loads((GOLDEN / "lm_eval.json").read_text())["requests"]
    requests = [Request(tuple(context), tuple(more)) for context, more, _, _ in golden]
    assert any(isinstance(batch, Families) for batch in batches(requests))
    for score, (_, _, log_likelihood, greedy) in zip(
        score_continuations(stories, requests), golden, strict=True
    ):
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-3)
        assert score.greedy == greedy


def test_windows_agree_with_perplexity(model):
    text = np.random.default_rng(1).integers(0, model.vocabulary, 4 * 32)
    found = evaluate(model, text, context=32)
    windows = [Request((window[0],), tuple(window[1:])) for window in text.reshape(4, 32).tolist()]
    total = sum(score.log_likelihood for score in score_continuations(model, windows))
    assert math.exp(-total / found.positions) == pytest.approx(found.perplexity, rel=1e-5)


def test_long_requests_are_cut_from_the_left():
    assert fit(Request((1, 2, 3), (4, 5)), 4) == Request((1, 2, 3), (4, 5))
    assert fit(Request((1, 2, 3), (4, 5)), 3) == Request((2, 3), (4, 5))
    assert fit(Request((1, 2, 3), (4, 5)), 2) == Request((3,), (4, 5))
    with pytest.raises(BadInput, match="of 2 tokens is longer than the model's context of 1"):
        fit(Request((1, 2, 3), (4, 5)), 1)


def test_refusals(model):
    for context, more in (((), (1,)), ((1,), ())):
        with pytest.raises(BadInput, match="both must have at least one"):
            score_continuations(model, [Request(context, more)])
    with pytest.raises(BadInput, match="outside the model's vocabulary"):
        score_continuations(model, [Request((1,), (2, model.vocabulary))])
    assert score_continuations(model, []) == []


def test_logits_that_are_not_finite_end_it(model):
    class Broken:
        vocabulary, hidden = model.vocabulary, staticmethod(model.hidden)

        def logits(self, hidden):
            return model.logits(hidden) * np.nan

    jax.tree_util.register_pytree_node(Broken, lambda _: ((), None), lambda *_: Broken())
    with pytest.raises(RunFailed, match="not finite"):
        score_continuations(Broken(), [Request((1, 2), (3,))])  # pyright: ignore[reportArgumentType]
