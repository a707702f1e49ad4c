"""Generation: greedy against the forward pass, many prompts at once, seeds, refusals."""

import numpy as np
import pytest

from atd.checkpoint.reader import open_tokenizer
from atd.errors import BadInput, RunFailed
from atd.models.cache import padded_width
from atd.models.model import load
from atd.runtime.generate import generate
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


PROMPTS = [[3, 1, 4], [1] * 120, [2], [7, 8, 9, 10, 11, 12], [5, 5]]


def test_many_prompts_are_continued_as_each_alone(model):
    """Ending at different places: a stop token, the model's context, the number of tokens."""
    alone = [generate(model, prompt, max_new_tokens=20) for prompt in PROMPTS]
    assert [len(tokens) for tokens in alone] == [20, 8, 20, 20, 20]
    assert generate(model, PROMPTS, max_new_tokens=20, batch=3, chunk=32) == alone
    stop = {alone[0][9], alone[3][3]}
    seen = [[] for _ in PROMPTS]
    options = {"max_new_tokens": 20, "stop_tokens": stop}
    told = generate(model, PROMPTS, **options, on_token=lambda row, new: seen[row].append(new))
    assert told == seen == [generate(model, prompt, **options) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in told}) > 3
    assert generate(model, [[3, 1, 4]], max_new_tokens=20) == alone[:1]


def test_what_is_drawn_depends_on_the_seed_and_on_the_place_alone(model):
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 3}
    drawn = generate(model, [[1, 2]] * 4, **options)
    assert len({tuple(tokens) for tokens in drawn}) == 4
    assert drawn[0] == generate(model, [1, 2], **options)
    others = [[9], [1, 2], [4] * 20, [1, 2], [6, 6, 6]]
    found = generate(model, others, **options, batch=2)
    assert [found[1], found[3]] == [drawn[1], drawn[3]]


def test_many_prompts_compile_little(model, monkeypatch):
    """Three, seven and five of up to 16 tokens are run by 4 and 8 rows, of one width."""
    seen, prefill = set(), type(model).prefill

    def counted(self, tokens, cache, *rest):
        seen.add((len(tokens), padded_width(tokens.shape[1], cache), cache.length))
        return prefill(self, tokens, cache, *rest)

    monkeypatch.setattr(type(model), "prefill", counted)
    for count, longest in ((3, 16), (7, 9), (5, 12)):
        generate(model, [[1] * (longest - i) for i in range(count)], max_new_tokens=10)
    assert seen == {(4, 16, 32), (8, 16, 32)}


def test_progress_ends_where_texts_do(model):
    seen = []
    told = generate(model, PROMPTS, max_new_tokens=20, stop_tokens={4}, progress=seen.append)
    assert seen[-1].ended
    assert [now.done for now in seen] == list(range(1, sum(map(len, told)) + 1))


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
        ([1], {"batch": 0}, "batch is 0; expected at least 1"),
        ([1], {"chunk": 0}, "chunk is 0; expected at least 1"),
        ([[1], []], {}, "prompt 1: the prompt is empty"),
        ([[1], [2, 40]], {}, "prompt 1: token id 40 lies outside"),
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


def test_which_prompt_has_logits_that_are_not_finite(model, monkeypatch):
    decode = type(model).decode

    def broken(self, token, cache):
        logits, cache = decode(self, token, cache)
        return logits.at[1, 7].set(np.nan), cache

    monkeypatch.setattr(type(model), "decode", broken)
    with pytest.raises(RunFailed, match="prompt 0: the model's logits at position 2 are not"):
        generate(model, [[1], [2, 3]], max_new_tokens=3)


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


def test_a_real_model_tells_several_stories_at_once(trained):
    model, words = load(trained.folder), open_tokenizer(trained.folder)
    starts = ["Once upon a time", "Lily", "The dog ran to the tree. Then", "Tom was sad because"]
    prompts = [words.encode(start, bos=True).tolist() for start in starts]
    options = {"max_new_tokens": 24, "stop_tokens": words.eos_ids}
    told = generate(model, prompts, **options)
    assert told == [generate(model, prompt, **options) for prompt in prompts]
