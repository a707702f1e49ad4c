"""Generation: greedy against the forward pass, the sampled distribution, seeds, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.checkpoint.reader import open_tokenizer
from atd.errors import BadInput, RunFailed
from atd.models.model import load
from atd.runtime.generate import _pick, generate
from tests.golden.write_gguf import GOLDEN
from tests.models.tiny import tiny_graph


@pytest.fixture(scope="module")
def model():
    return load(tiny_graph())


def test_greedy_is_the_argmax_of_the_forward_pass(model):
    prompt = [3, 1, 4, 1, 5]
    tokens = generate(model, prompt, max_new_tokens=12)
    logits = np.asarray(model(np.array([prompt + tokens])))[0]
    assert tokens == logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()


def test_on_token_gets_each_token(model):
    seen = []
    assert generate(model, [1, 2], max_new_tokens=5, on_token=seen.append) == seen
    assert len(seen) == 5


def test_it_ends_with_a_stop_token(model):
    tokens = generate(model, [1, 2], max_new_tokens=8, temperature=2.0)
    stop = tokens[4]
    assert (
        generate(model, [1, 2], max_new_tokens=8, temperature=2.0, stop_tokens={stop})
        == tokens[: tokens.index(stop) + 1]
    )


def test_it_ends_where_the_context_does(model):
    assert len(generate(model, [1] * 120, max_new_tokens=50)) == 8
    assert len(generate(model, [1] * 127, max_new_tokens=50)) == 1


def test_same_seed_same_tokens(model):
    options = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 20, "top_p": 0.9}
    first = generate(model, [1, 2], seed=7, **options)
    assert generate(model, [1, 2], seed=7, **options) == first
    assert generate(model, [1, 2], seed=8, **options) != first


def test_the_likeliest_alone_is_greedy(model):
    greedy = generate(model, [1, 2], max_new_tokens=6)
    assert generate(model, [1, 2], max_new_tokens=6, temperature=3.0, top_k=1) == greedy
    assert generate(model, [1, 2], max_new_tokens=6, temperature=3.0, top_p=1e-6) == greedy
    assert generate(model, [1, 2], max_new_tokens=6, temperature=1e-4) == greedy
    assert generate(model, [1, 2], max_new_tokens=6, temperature=1.3e-38) == greedy
    assert generate(model, [1, 2], max_new_tokens=6, temperature=1.3e-38, top_k=9) == greedy


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, PROBABILITIES),
        (0.5, 0, 1.0, PROBABILITIES**2),
        (1.0, 2, 1.0, PROBABILITIES * [0, 1, 0, 1, 0]),
        (1.0, 99, 1.0, PROBABILITIES),
        (1.0, 0, 0.6, PROBABILITIES * [0, 1, 0, 1, 0]),  # 0.4 + 0.25 reach 0.6
        (1.0, 0, 0.7, PROBABILITIES * [0, 1, 0, 1, 1]),
        (
            1.0,
            3,
            0.5,
            PROBABILITIES * [0, 1, 0, 1, 0],
        ),  # of the three, 0.4 / 0.85 = 0.47 falls short of 0.5
    ],
)
def test_what_is_sampled(temperature, top_k, top_p, expected):
    draws = 20_000
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES) + 3.0, (draws, 5))
    tokens = _pick(
        logits,
        jax.random.key(0),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        greedy=False,
        nucleus=top_p < 1,
    )
    frequencies = np.bincount(np.asarray(tokens), minlength=5) / draws
    expected = expected / expected.sum()
    assert not frequencies[expected == 0].any()
    np.testing.assert_allclose(frequencies, expected, atol=4 * np.sqrt(0.25 / draws))


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 40], {}, "token id 40 lies outside the model's vocabulary of 40"),
        ([-1], {}, "token id -1 lies outside"),
        (
            [1] * 128,
            {},
            "the prompt has 128 tokens and leaves no room in the model's context of 128",
        ),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ([1], {"temperature": -0.1}, "temperature is -0.1"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"temperature": float("inf")}, "temperature is inf"),
        ([1], {"temperature": 1e-39}, "temperature is 1e-39; expected 0 .* at least 1.2e-38"),
        ([1], {"top_k": -1}, "top_k is -1"),
        ([1], {"top_p": float("nan")}, "top_p is nan"),
        ([1], {"top_p": 0.0}, "top_p is 0.0"),
        ([1], {"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_refusals(model, prompt, options, words):
    with pytest.raises(BadInput, match=words):
        generate(model, prompt, **({"max_new_tokens": 4} | options))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_logits_that_are_not_finite_end_the_text(model, monkeypatch, bad, options):
    decode = type(model).decode

    def broken(self, token, cache):
        logits, cache = decode(self, token, cache)
        return logits.at[0, 7].set(bad if cache.filled == 5 else 0.0), cache

    monkeypatch.setattr(type(model), "decode", broken)
    with pytest.raises(RunFailed, match="logits at position 5 are not finite, with 3 tokens"):
        generate(model, [1, 2], max_new_tokens=6, **options)


# "Once upon a time" behind a BOS, and what transformers 5.23 in float32 adds: ", there was a little
# girl named L"
TOLD = [1, 9038, 2501, 263, 931, 29892, 727, 471, 263, 2217, 7826, 4257, 365]


def test_a_real_model_tells_a_story(trained):
    """Greedily, as another implementation goes on: for the packaged model make_stories.py."""
    told = {"packaged": np.load(GOLDEN / "stories.npz")["told"].tolist(), "stories15M": TOLD}
    told = told[trained.name]
    start = open_tokenizer(trained.folder).encode("Once upon a time", bos=True).tolist()
    assert told[: len(start)] == start
    new = len(told) - len(start)
    assert generate(load(trained.folder), start, max_new_tokens=new) == told[len(start) :]
