"""Conversations: each answer is that of a model that reads all of it anew, and only new tokens are
read.
"""

from dataclasses import replace

import numpy as np
import pytest

from atd.checkpoint.reader import open_tokenizer
from atd.errors import BadInput, RunFailed
from atd.models.model import load
from atd.runtime.chat import Chat, common, first_prompt
from atd.runtime.generate import generate
from atd.runtime.sampling import Sampling
from tests.golden.write_gguf import GOLDEN

PLAIN = "{% for m in messages %}{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}"
# Of the model's own words, a later turn shows the first six characters.
FORGETFUL = (
    "{% for m in messages %}"
    "{{ m.content if m.role != 'assistant' else m.content[:6] }} {% endfor %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
TURNS = ["Once upon a time", "Then Lily saw", "It was big. She"]


@pytest.fixture(scope="module")
def model():
    return load(GOLDEN / "stories")


@pytest.fixture(scope="module")
def tokenizer():
    return replace(open_tokenizer(GOLDEN / "stories"), chat_template=PLAIN)


def prompt(tokenizer, messages) -> list[int]:
    return tokenizer.encode(tokenizer.apply_chat(messages)).tolist()


@pytest.mark.parametrize(
    ("template", "sampling"),
    [(PLAIN, Sampling()), (FORGETFUL, Sampling(0.8, top_k=9, seed=4))],
    ids=["plain", "forgetful"],
)
def test_answers_are_those_of_the_whole_conversation(model, tokenizer, template, sampling):
    words = replace(tokenizer, chat_template=template)
    chat = Chat(model, words, sampling, system="Tell a story.", max_new_tokens=12, chunk=16)
    seen: list[int] = []  # read and written, but for the last token
    for turn in TURNS:
        parts = []
        ids = prompt(words, [*chat.messages, {"role": "user", "content": turn}])
        answer = chat.answer(turn, parts.append)
        options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "seed": 4}
        new = generate(model, ids, max_new_tokens=12, stop_tokens=words.eos_ids, **options)
        assert answer.text == "".join(parts) == words.decode(new)
        assert (answer.tokens, answer.prompt) == (len(new), len(ids))
        assert answer.read == len(ids) - common(seen, ids)
        seen = [*ids, *new[:-1]]
        assert chat.messages[-1] == {"role": "assistant", "content": answer.text}
    assert len(chat.messages) == 7
    if template == PLAIN:
        assert answer.read < 16 < len(ids) / 2


def test_ids_that_begin_alike():
    assert [common([], [1]), common([1, 2], [1, 2, 3]), common([1, 2, 3], [1, 4])] == [0, 2, 1]


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(model, tokenizer):
    chat, parts = Chat(model, tokenizer, max_new_tokens=40), []
    answer = chat.answer(TURNS[0], parts.append, stopped=lambda: len(parts) == 5)
    assert (answer.finish, answer.tokens) == ("interrupted", 5)
    assert chat.messages[-1]["content"] == answer.text == "".join(parts)
    ids = prompt(tokenizer, [*chat.messages, {"role": "user", "content": TURNS[1]}])
    again = chat.answer(TURNS[1])
    assert again.text == tokenizer.decode(
        [t for t in generate(model, ids, max_new_tokens=40, stop_tokens=(2,)) if t != 2]
    )
    assert again.read < len(ids) - 8


def test_a_reset_keeps_the_system_message_and_what_was_read_of_it(model, tokenizer):
    system = "Once upon a time there was a small child. The child had a red ball."
    chat = Chat(model, tokenizer, system=system, max_new_tokens=3)
    first = chat.answer("Tom")
    chat.reset()
    assert [m["role"] for m in chat.messages] == ["system"]
    again = chat.answer("Tom")
    assert (again.text, again.read) == (first.text, 1)


def test_a_conversation_that_fills_the_context_is_refused_and_goes_on(model, tokenizer):
    chat = Chat(model, tokenizer, max_new_tokens=8)
    chat.answer(TURNS[0])
    before = list(chat.messages)
    with pytest.raises(BadInput, match="leaves no room in the model's context of 512; write"):
        chat.answer("Lily " * 600)
    assert chat.messages == before
    long = chat.answer("the dog " * 110)
    assert long.prompt > 400
    assert long.tokens == 8


def test_the_last_answer_ends_with_the_context(model, tokenizer):
    chat = Chat(model, replace(tokenizer, eos_ids=()), max_new_tokens=300)
    chat.answer(TURNS[0])
    answer = chat.answer("The dog.")
    assert (answer.prompt + answer.tokens, answer.finish) == (512, "length")


def test_templates_that_are_absent_raise_or_say_nothing(model, tokenizer):
    with pytest.raises(BadInput, match=r"no chat template.*generate --prompt.*--tokenizer PATH"):
        first_prompt(replace(tokenizer, chat_template=None), [])
    system = {"role": "system", "content": ""}
    with pytest.raises(BadInput, match="refuses this conversation: no system here"):
        first_prompt(replace(tokenizer, chat_template=STRICT), [system])
    silent = Chat(model, replace(tokenizer, chat_template="{# #}"))
    with pytest.raises(BadInput, match="its chat template makes an empty prompt"):
        silent.answer("Hello")


def test_logits_that_are_not_finite_end_the_answer(model, tokenizer, monkeypatch):
    chat, prefill = Chat(model, tokenizer, max_new_tokens=4), type(model).prefill

    def broken(self, *rest, **options):
        logits, cache = prefill(self, *rest, **options)
        return logits * np.nan, cache

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "prefill", broken)
        with pytest.raises(RunFailed, match="not finite, with 0 tokens written"):
            chat.answer(TURNS[0])
    assert chat.messages == []
    assert chat.answer(TURNS[0]).tokens == 4


@pytest.mark.slow
def test_the_fifth_turn_reads_only_what_is_new(smollm2):
    """Of SmolLM2, compiled beforehand: the time to the first token does not grow with the turns."""
    model, words = load(smollm2), open_tokenizer(smollm2)
    told = "Explain why the sky is blue in the morning and red in the evening, please. " * 8

    def turns():
        chat = Chat(model, words, system=told, max_new_tokens=24)
        return [chat.answer(f"{turn}: go on.") for turn in range(5)]

    turns()
    first, *_, fifth = turns()
    print(f"first turn {first}\nfifth turn {fifth}")
    assert fifth.prompt > first.prompt + 100
    assert fifth.read < 64 < first.read
    assert fifth.first_seconds < first.first_seconds
