"""Text as it streams is the text as it is decoded at once."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.text_stream import TextStream
from atd.checkpoint.tokenizer import Tokenizer
from tests.checkpoint.tokenizer_files import byte_level, sentencepiece_of, write_gguf

FOLDER = Path(__file__).parents[1] / "golden" / "stories"
KINDS = ("folder", "byte-level", "sentencepiece", "no blank in front")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """tokenizers(kind): a folder's SentencePiece, and both kinds of GGUF files."""
    path = tmp_path_factory.mktemp("tokenizers")

    @cache
    def made(kind: str) -> Tokenizer:
        folder = open_tokenizer(FOLDER)
        if kind == "folder":
            return folder
        if kind == "byte-level":
            return open_tokenizer(byte_level(path / "b.gguf"))
        tokens, scores, types = sentencepiece_of(folder)
        ids = {"unknown_token_id": 0, "bos_token_id": 1, "add_space_prefix": kind[0] != "n"}
        fields = {"tokens": tokens, "scores": scores, "token_type": types}
        return open_tokenizer(write_gguf(path / f"{kind}.gguf", model="llama", **fields, **ids))

    return made


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.add(token) for token in ids), stream.end()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streamed_text_equals_the_decoded_whole(tokenizers, kind, data):
    tokenizer = tokenizers(kind)
    prompt = tokenizer.encode(data.draw(st.text(max_size=8))).tolist()
    token = st.integers(0, tokenizer.vocabulary_size + 1).map(lambda i: [i])
    text = st.text(max_size=6).map(lambda text: tokenizer.encode(text).tolist())
    ids = [i for part in data.draw(st.lists(token | text, max_size=12)) for i in part]
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    assert before + "".join(streamed(tokenizer, ids, prompt)) == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(), prompt=st.sampled_from(["", "Once upon a", "é ", "漢"]))
def test_a_text_streams_in_whole_characters(tokenizers, kind, text, prompt):
    tokenizer = tokenizers(kind)
    ids = tokenizer.encode(prompt + text).tolist()
    start = tokenizer.encode(prompt).tolist()
    if ids[: len(start)] != start or "\ufffd" in text:
        return
    parts = streamed(tokenizer, ids[len(start) :], start)
    assert tokenizer.decode(start) + "".join(parts) == tokenizer.decode(ids)
    assert parts[-1] == ""
    assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("kind", ["folder", "sentencepiece"])
def test_blanks_characters_of_bytes_and_what_is_cut_off(tokenizers, kind):
    tokenizer = tokenizers(kind)
    blank = tokenizer.backend.token_to_id("▁t")

    def of_bytes(text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in data]

    once = tokenizer.encode("Once").tolist()
    assert streamed(tokenizer, [blank], once) == [" t", ""]
    assert streamed(tokenizer, [blank, *of_bytes("漢")], []) == ["t", "", "", "漢", ""]
    assert streamed(tokenizer, of_bytes("漢字"), []) == ["", "", "漢", "", "", "字", ""]
    # A character that was cut off leaves those in front of it, and special tokens are no text.
    cut = of_bytes("漢字"[:2].encode()[:-1])
    assert streamed(tokenizer, cut, []) == ["", "", "漢", "", "", "\ufffd"]
    assert tokenizer.decode([*cut, blank]) == "漢\ufffd t"
    assert streamed(tokenizer, [1, blank, 2], once) == ["", " t", "", ""]


def test_byte_level_characters_over_several_tokens(tokenizers):
    tokenizer = tokenizers("byte-level")
    ids = tokenizer.encode(" 🙂 a").tolist()
    assert len(ids) == 7
    assert streamed(tokenizer, ids, []) == [" ", "", "", "", "🙂", " ", "a", ""]
    assert streamed(tokenizer, ids[:3], []) == [" ", "", "", "\ufffd"]
