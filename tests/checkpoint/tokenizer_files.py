"""Writes small tokenizers into files: byte-level and SentencePiece ones of GGUF, and folders."""

import json
from pathlib import Path

import gguf
from tokenizers.pre_tokenizers import ByteLevel

from atd.checkpoint.tokenizer import Tokenizer


def write_gguf(path: Path, **metadata) -> Path:
    """A GGUF file without tensors; keys of `metadata` lack their "tokenizer.ggml."."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level(path: Path, **metadata) -> Path:
    """A GGUF file with a vocabulary of 256 bytes, a word no merge leads to, a merged pair and two
    special tokens.
    """
    tokens = [*sorted(ByteLevel.alphabet()), "Ġhello", "ab", "<|begin|>", "<|end|>"]
    types = [1] * 258 + [3, 3]
    return write_gguf(
        path,
        **(
            {
                "model": "gpt2",
                "tokens": tokens,
                "token_type": types,
                "merges": ["a b"],
                "bos_token_id": 258,
            }
            | metadata
        ),
    )


def sentencepiece_of(tokenizer: Tokenizer) -> tuple[list[str], list[float], list[int]]:
    """tokens, scores, types of the SentencePiece model behind a tokenizer.json: <unk>, <s>, </s>,
    256 bytes, pieces.

    Llama 2's scores are minus the rank, and -1e9 for runs of blanks.
    """
    tokens = [tokenizer.backend.id_to_token(i) or "" for i in range(tokenizer.vocabulary_size)]
    ranks = [
        0.0 if i < 259 else -1e9 if set(t) == {"▁"} and t != "▁" else 259.0 - i
        for i, t in enumerate(tokens)
    ]
    return tokens, ranks, [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)


def folder(path: Path, source: Path, **configs) -> Path:
    """A folder with the tokenizer.json of `source` and JSON files: name without .json = content."""
    path.mkdir()
    (path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    for name, content in configs.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path
