"""Tokenizers as metadata of GGUF files."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import ByteLevel

from atd.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, rebuild
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput
from atd.exports.gguf_vocabulary import SAMPLE, scores_of_merges, vocabulary
from tests.golden.write_gguf import GOLDEN

WORDS = ["12", "123", "1234", "Ġ1", "ĠD", "ON", "\u00c4\u0142"]
MERGES = ["1 2", "12 3", "123 4", "Ġ 1", "Ġ D", "O N"]
PLAIN = {
    "model": "gpt2",
    "tokens": [*sorted(ByteLevel.alphabet()), *WORDS, "<|begin|>", "<|end|>", "<|call|>"],
    "token_type": [1] * (256 + len(WORDS)) + [3, 3, 4],
    "merges": MERGES,
    "bos_token_id": 256 + len(WORDS),
    "eos_token_id": 257 + len(WORDS),
    "eot_token_id": 256 + len(WORDS),
    "add_bos_token": True,
    "chat_template": "{{ messages[0].content }}",
}
SIZE = 256 + len(WORDS) + 3


def byte_level(**more) -> Tokenizer:
    return rebuild(Path("m.gguf"), PLAIN | {"pre": "gpt-2"} | more)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_way_to_split_words_is_found(pre):
    tokenizer = byte_level(pre=pre)
    found = vocabulary(tokenizer, SIZE)
    again = rebuild(Path("m.gguf"), found)
    for text in ("I'LL 1234567 x", " 12 DON'T\n\n12", "e\u0301 \u00e9", SAMPLE):
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist(), (pre, text)
    assert found["pre"] == pre


def test_nothing_is_lost():
    found = vocabulary(byte_level(), SIZE + 2)
    assert found["tokens"] == [*PLAIN["tokens"], f"[PAD{SIZE}]", f"[PAD{SIZE + 1}]"]
    assert found["token_type"] == [*PLAIN["token_type"], 5, 5]
    for key in PLAIN.keys() - {"tokens", "token_type", "model"}:
        assert found[key] == PLAIN[key], key


def test_pieces_keep_their_order():
    tokenizer = open_tokenizer(GOLDEN / "stories")
    found = vocabulary(tokenizer, 512)
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("llama", "default", True)
    assert found["token_type"][:3] == [2, 3, 3]
    assert set(found["token_type"][3:259]) == {6}
    again = rebuild(Path("m.gguf"), found)
    text = (GOLDEN / "make_stories.py").read_text() + SAMPLE
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_scores_follow_the_merges():
    scores = scores_of_merges(
        ["a", "b", "ab", "abb", "bb"], [("a", "b"), ("ab", "b"), ("a", "bb"), ("b", "b")]
    )
    assert scores == [-3, -3, 0, -1, -2]


def refused(tokenizer: Tokenizer, size: int, words: str) -> None:
    with pytest.raises(BadInput, match=re.escape(words)) as caught:
        vocabulary(tokenizer, size)
    assert "export with --to hf" in str(caught.value)


def test_tokenizers_without_a_form_are_refused():
    tokenizer = byte_level()
    refused(tokenizer, SIZE - 1, f"it has the id {SIZE - 1}, and the embedding {SIZE - 1} rows")
    unigram = tokenizers.Tokenizer(Unigram([("a", 0.0)], 0, False))
    refused(replace(tokenizer, backend=unigram), SIZE, "its model is 'Unigram'")
    words = byte_level()
    words.backend.pre_tokenizer = ByteLevel(add_prefix_space=True)
    refused(words, SIZE, "none of gpt-2, smollm, llama-bpe, qwen2 splits text as it does")
