"""Tokenizers of GGUF files against transformers and against what the files were made from."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from atd.checkpoint.gguf_tokenizer import merges_of_scores
from atd.checkpoint.reader import open_tokenizer
from atd.errors import BadInput
from tests.checkpoint.tokenizer_files import byte_level, sentencepiece_of, write_gguf

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer.json").read_text())
TEXTS = [case["text"] for case in GOLDEN["smollm"]]


@pytest.fixture(scope="module")
def smollm(smollm2):
    assert smollm2.name == GOLDEN["file"]
    return open_tokenizer(smollm2)


# --- GGUF, byte-level -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["smollm"], ids=range(len(TEXTS)))
def test_smollm_ids_are_those_of_transformers(smollm, case):
    ids = smollm.encode(case["text"])
    assert ids.dtype == np.int32
    assert ids.tolist() == case["ids"]
    assert smollm.decode(ids, special=True) == case["text"]


def test_smollm_digits_are_split_before_blanks_are_joined(smollm):
    """Where transformers, which does not know pre = smollm, differs from SmolLM2's published
    tokenizer.
    """
    for case in GOLDEN["undivided"]:
        assert smollm.encode(case["text"]).tolist() != case["ids"]


def test_smollm_special_tokens_and_chat(smollm):
    assert (smollm.bos_id, smollm.eos_ids, smollm.adds_bos, smollm.vocabulary_size) == (
        1,
        (2,),
        False,
        49152,
    )
    assert smollm.encode("Hi", bos=True).tolist() == [1, *smollm.encode("Hi")]
    assert smollm.decode(smollm.encode("<|im_start|>Hi<|im_end|>")) == "Hi"
    assert smollm.apply_chat(GOLDEN["chat_messages"]) == GOLDEN["chat"]


def test_smollm_written_as_a_folder_is_the_same_tokenizer(smollm, tmp_path):
    for name, data in smollm.files().items():
        (tmp_path / name).write_bytes(data)
    again = open_tokenizer(tmp_path)
    for text in TEXTS:
        assert again.encode(text).tolist() == smollm.encode(text).tolist()
    for name in ("bos_id", "eos_ids", "adds_bos", "chat_template", "special", "vocabulary_size"):
        assert getattr(again, name) == getattr(smollm, name), name
    assert again.files() == smollm.files()


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_words_are_cut_as_by_transformers(tmp_path, pre):
    split = open_tokenizer(byte_level(tmp_path / "m.gguf", pre=pre)).backend.pre_tokenizer
    for text, words in zip(TEXTS, GOLDEN["words"][pre], strict=True):
        assert [word for word, _ in split.pre_tokenize_str(text)] == words


def test_llama3_takes_a_whole_word_that_is_a_token_and_others_merge(tmp_path):
    llama3 = open_tokenizer(byte_level(tmp_path / "a.gguf", pre="llama-bpe"))
    gpt2 = open_tokenizer(byte_level(tmp_path / "b.gguf", pre="gpt-2"))
    assert llama3.encode(" hello").tolist() == [256]
    assert len(gpt2.encode(" hello")) == 6
    assert gpt2.encode("abab").tolist() == [257, 257]


def test_a_missing_pre_tokenizer_is_told(tmp_path):
    assert (
        "tokenizer.ggml.pre is missing" in open_tokenizer(byte_level(tmp_path / "a.gguf")).assumed
    )
    assert open_tokenizer(byte_level(tmp_path / "b.gguf", pre="qwen2")).assumed == ""


def test_a_gguf_file_needs_no_ending(tmp_path):
    path = byte_level(tmp_path / "sha256-0123", pre="gpt-2")
    assert open_tokenizer(path).vocabulary_size == 260


def test_qwen2_composes_characters(tmp_path):
    tokenizer = open_tokenizer(byte_level(tmp_path / "a.gguf", pre="qwen2"))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_bos_is_in_front_only_when_asked_but_files_say_what_the_model_is_used_to(tmp_path):
    tokenizer = open_tokenizer(byte_level(tmp_path / "a.gguf", pre="gpt-2", add_bos_token=True))
    assert tokenizer.adds_bos
    assert 258 not in tokenizer.encode("ab")
    assert tokenizer.backend.encode("ab").ids == [
        258,
        257,
    ]  # what tokenizer.json does in other tools
    assert open_tokenizer(
        byte_level(tmp_path / "b.gguf", pre="llama-bpe")
    ).adds_bos  # llama.cpp's default for it
    assert not open_tokenizer(
        byte_level(tmp_path / "c.gguf", pre="llama-bpe", add_bos_token=False)
    ).adds_bos


def test_user_defined_tokens_stay_whole_and_are_no_special_ones(tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "<think>", "<|end|>", "ab"]
    path = byte_level(
        tmp_path / "a.gguf",
        pre="qwen2",
        tokens=tokens,
        token_type=[1] * 256 + [4, 3, 1],
        bos_token_id=257,
        merges=["a b"],
    )
    tokenizer = open_tokenizer(path)
    ids = tokenizer.encode("a<think>b<|end|>")
    assert ids[1] == 256
    assert ids[-1] == 257
    assert tokenizer.decode(ids) == "a<think>b"


def test_generation_ends_at_the_end_of_a_turn_too(tmp_path):
    path = byte_level(tmp_path / "a.gguf", pre="gpt-2", eos_token_id=258, eot_token_id=259)
    tokenizer = open_tokenizer(path)
    assert tokenizer.eos_ids == (258, 259)
    assert json.loads(tokenizer.files()["generation_config.json"])["eos_token_id"] == [258, 259]


# --- GGUF, SentencePiece --------------------------------------------------------------------------


@pytest.mark.slow
def test_merges_from_scores_are_those_published_with_llama_2(stories15m):
    original = open_tokenizer(stories15m)
    published = json.loads(original.files()["tokenizer.json"])["model"]["merges"]
    assert len(published) == 61249
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in published
    ]
    assert merges_of_scores(*sentencepiece_of(original)) == merges


@pytest.fixture(scope="module")
def sentencepiece(stories260k, tmp_path_factory):
    """(tokenizer from a GGUF file with the vocabulary and scores of stories260K, the tokenizer.json
    they belong to).
    """
    original = open_tokenizer(stories260k)
    tokens, scores, types = sentencepiece_of(original)
    path = tmp_path_factory.mktemp("sentencepiece") / "m.gguf"
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    write_gguf(path, model="llama", tokens=tokens, scores=scores, token_type=types, **ids)
    return open_tokenizer(path), original


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_sentencepiece_gguf_gives_the_ids_of_the_original(sentencepiece, text):
    rebuilt, original = sentencepiece
    assert rebuilt.encode(text).tolist() == original.encode(text).tolist()
    assert (
        rebuilt.decode(rebuilt.encode(text))
        == original.decode(original.encode(text))
        == text.replace("<s></s>", "")
    )
    assert (rebuilt.bos_id, rebuilt.eos_ids, rebuilt.adds_bos) == (
        original.bos_id,
        original.eos_ids,
        True,
    )
    assert rebuilt.decode([0, 1, 2]) == ""  # <unk> is a special token as well


def test_sentencepiece_without_a_space_in_front(stories260k, tmp_path):
    tokens, scores, types = sentencepiece_of(open_tokenizer(stories260k))
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "unknown_token_id": 0,
    }
    bare = open_tokenizer(write_gguf(tmp_path / "m.gguf", **fields, add_space_prefix=False))
    assert bare.backend.id_to_token(int(bare.encode("t")[0])) == "t"
    assert bare.decode(bare.encode(" t")) == " t"
    assert bare.bos_id is None
    assert not bare.adds_bos


# --- bad input ---


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"pre": "tekken"}, "pre = 'tekken' is not known, only default, gpt-2, llama-bpe"),
        ({"model": "t5"}, "model = 't5'; known are 'gpt2'"),
        ({"tokens": ["a"], "token_type": [1, 1]}, "token_type has 2 entries for 1 tokens"),
        ({"bos_token_id": 260}, "bos_token_id is 260, beyond the vocabulary of 260"),
        ({"merges": 3}, "merges is absent"),
        ({"merges": ["no such"]}, "make no tokenizer"),
        ({"merges": ["single"]}, "make no tokenizer"),
        ({"model": "llama"}, "scores does not give one score to each of the 260 tokens"),
    ],
)
def test_bad_metadata_is_named(tmp_path, metadata, message):
    with pytest.raises(BadInput, match=message):
        open_tokenizer(byte_level(tmp_path / "m.gguf", **metadata))


def test_a_damaged_gguf_file_is_refused(tmp_path):
    whole = byte_level(tmp_path / "m.gguf").read_bytes()
    for i, data in enumerate((b"", b"GGUF", b"nonsense" * 100, whole[:2000])):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(data)
        with pytest.raises(BadInput, match="not a whole GGUF file"):
            open_tokenizer(path)
    with pytest.raises(BadInput, match=r"no tokenizer\.ggml\.model"):
        open_tokenizer(write_gguf(tmp_path / "bare.gguf"))


def test_a_gguf_file_with_damaged_bytes_is_read_or_refused(tmp_path):
    for model in ("gpt2", "llama"):
        path = byte_level(
            tmp_path / "m.gguf",
            model=model,
            scores=[0.0] * 260,
            add_bos_token=True,
            chat_template="x",
        )
        data = path.read_bytes()
        random = np.random.default_rng(0)
        for position in random.integers(4, len(data), 200):
            damaged = bytearray(data)
            damaged[position] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            with contextlib.suppress(BadInput):
                open_tokenizer(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokens": [1] * 260}, "make no tokenizer"),
        ({"bos_token_id": "first"}, "bos_token_id is 'first', beyond the vocabulary"),
        (
            {"model": "llama", "scores": [0.0] * 260, "unknown_token_id": 300},
            "unknown_token_id is 300, beyond",
        ),
        ({"pre": ["gpt-2"]}, "make no tokenizer"),
        ({"chat_template": 3}, "chat_template is 3; expected a Jinja template"),
    ],
)
def test_metadata_of_a_wrong_type_is_refused(tmp_path, metadata, message):
    with pytest.raises(BadInput, match=message):
        open_tokenizer(byte_level(tmp_path / "m.gguf", **metadata))
