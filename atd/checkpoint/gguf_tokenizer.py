"""Rebuilds the tokenizer of a GGUF file from its metadata.

A GGUF file stores vocabulary, merges (or scores) and the *name* of its pre-tokenizer, not the
tokenizer. `tokenizer.ggml.model = gpt2` is byte-level BPE, and `tokenizer.ggml.pre` names how it
splits text into words; `llama` is SentencePiece BPE with byte fallback, whose merges follow from
the scores.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from atd.checkpoint.gguf_header import read_header
from atd.checkpoint.tokenizer import Tokenizer, library_errors
from atd.errors import BadInput

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # gguf.TokenType


def open_gguf_tokenizer(path: Path) -> Tokenizer:
    """Reads the tokenizer of a GGUF file.

    Raises BadInput for a damaged file and a tokenizer of an unknown kind.
    """
    header, _ = read_header(path)
    metadata = {
        key.removeprefix("tokenizer.ggml.").removeprefix("tokenizer."): value
        for key, value in header.items()
        if key.startswith("tokenizer.")
    }
    # Values of a wrong type fail anywhere.
    with library_errors(f"{path}: its vocabulary and merges make no tokenizer"):
        return rebuild(path, metadata)


def rebuild(path: Path, metadata: dict) -> Tokenizer:
    """Builds the tokenizer that `metadata` describes: tokenizer.ggml.* without that prefix.

    Raises:
        BadInput: it is of an unknown kind. What its values make the tokenizers library raise is not
            caught here.
    """
    model = metadata.get("model")
    if model not in ("gpt2", "llama"):
        found = f"tokenizer.ggml.model = {model!r}" if model else "no tokenizer.ggml.model"
        raise BadInput(
            f"{path}: {found}; known are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)"
        )
    tokens = metadata.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise BadInput(
            f"{path}: tokenizer.ggml.tokens is absent or empty, so there is no vocabulary"
        )
    types = metadata.get("token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise BadInput(
            f"{path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens"
        )
    template = metadata.get("chat_template")
    if not isinstance(template, str | None):
        raise BadInput(
            f"{path}: tokenizer.chat_template is {template!r}; expected a Jinja template"
        )

    def id_of(key: str) -> int | None:
        value = metadata.get(key)
        if value is not None and not (isinstance(value, int) and 0 <= value < len(tokens)):
            raise BadInput(
                f"{path}: tokenizer.ggml.{key} is {value!r}, beyond the vocabulary of {len(tokens)}"
            )
        return value

    bos, unknown = id_of("bos_token_id"), id_of("unknown_token_id")
    if model == "gpt2":
        backend, adds_bos = _byte_level(path, metadata, tokens)
    else:
        backend, adds_bos = _sentencepiece(path, metadata, tokens, types, tokens[unknown or 0])
    kinds = list(zip(tokens, types, strict=True))
    backend.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED]
    )
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in kinds
            if kind in (_CONTROL, _UNKNOWN)
        ]
    )
    adds_bos = bos is not None and bool(metadata.get("add_bos_token", adds_bos))
    if adds_bos and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )

    ends = [
        i
        for key in ("eos_token_id", "eot_token_id", "eom_token_id")
        if (i := id_of(key)) is not None
    ]
    ends = tuple(dict.fromkeys(ends))
    special_ids = {
        "bos_token": bos,
        "eos_token": id_of("eos_token_id"),
        "unk_token": unknown,
        "pad_token": id_of("padding_token_id"),
    }
    special = {name: tokens[i] for name, i in special_ids.items() if i is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    generation = ({"bos_token_id": bos} if bos is not None else {}) | (
        {"eos_token_id": list(ends)} if ends else {}
    )
    stored = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": _json_bytes(
            config | ({"chat_template": template} if template else {})
        ),
        "generation_config.json": _json_bytes(generation),
    }
    name = str(path)
    assumed = ""
    if model == "gpt2" and "pre" not in metadata:
        assumed = (
            f"{path}: tokenizer.ggml.pre is missing, so text is cut into words as by GPT-2; where "
            "the model is of another kind, use its Hugging Face folder"
        )
    return Tokenizer(backend, bos, ends, adds_bos, template, special, stored, name, assumed)


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# --- byte-level BPE -------------------------------------------------------------------------------

# How the published tokenizer.json files split text into words.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    # Digits first, as SmolLM2's tokenizer.json and llama.cpp have it: it decides on how blanks in
    # front of a number are joined.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _words(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@dataclass(frozen=True)
class _Pre:
    """What a name in tokenizer.ggml.pre stands for."""

    split: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False  # normalize to composed characters first
    whole_words: bool = False  # a word that is a token is taken whole, merges or not
    adds_bos: bool = False  # when tokenizer.ggml.add_bos_token is absent


_LLAMA3 = _Pre(_words(_LLAMA3_WORDS), whole_words=True, adds_bos=True)
_PRE = {
    "default": _Pre(_gpt2),
    "gpt-2": _Pre(_gpt2),
    "smollm": _Pre(_smollm),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Pre(_words(_QWEN2_WORDS), nfc=True),
}
PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")  # one name of each kind


def _byte_level(path: Path, metadata: dict, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """(tokenizer without its special tokens, whether BOS goes in front by default)."""
    name = metadata.get("pre", "default")
    if name not in _PRE:
        known = ", ".join(sorted(_PRE))
        raise BadInput(
            f"{path}: tokenizer.ggml.pre = {name!r} is not known, only {known}; "
            "use the model's Hugging Face folder"
        )
    if not isinstance(metadata.get("merges"), list):
        raise BadInput(f"{path}: tokenizer.ggml.merges is absent; byte-level BPE needs it")
    pre = _PRE[name]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["merges"]]
    backend = tokenizers.Tokenizer(
        BPE(
            vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=pre.whole_words
        )
    )
    backend.pre_tokenizer = pre.split()
    backend.decoder = decoders.ByteLevel()
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    return backend, pre.adds_bos


# --- SentencePiece BPE ----------------------------------------------------------------------------


def _sentencepiece(
    path: Path, metadata: dict, tokens: list[str], types: list[int], unknown: str
) -> tuple[tokenizers.Tokenizer, bool]:
    """(tokenizer without its special tokens, whether BOS goes in front by default)."""
    if not isinstance(metadata.get("scores"), list) or len(metadata["scores"]) != len(tokens):
        raise BadInput(
            f"{path}: tokenizer.ggml.scores does not give one score to each of the "
            f"{len(tokens)} tokens"
        )
    merges = merges_of_scores(tokens, metadata["scores"], types)
    vocabulary = {t: i for i, t in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        backend.decoder = decoders.Sequence([*back, decoders.Strip(content=" ", left=1)])
    else:
        backend.normalizer = space
        backend.decoder = decoders.Sequence(back)
    return backend, True


def merges_of_scores(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Returns every split of a token in two tokens, best score first.

    SentencePiece joins the pair of tokens whose union scores highest. Equal scores go by id, as in
    the tokenizer.json published with Llama 2. Control, unknown and byte tokens never arise from
    text.
    """
    ids = {
        t: i
        for i, (t, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_NORMAL, _USER_DEFINED)
    }
    merges = [
        (t[:i], t[i:]) for t in ids for i in range(1, len(t)) if t[:i] in ids and t[i:] in ids
    ]

    def order(pair: tuple[str, str]):
        merged = ids[pair[0] + pair[1]]
        return -scores[merged], merged, ids[pair[0]], ids[pair[1]]

    return sorted(merges, key=order)
