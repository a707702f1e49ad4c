"""A tokenizer as the metadata of a GGUF file.

A GGUF file stores vocabulary, merges (or scores) and the name of a way to split text into words.
That name is found by trial: the tokenizer is rebuilt with each that is known, and must make the
same ids of a text that has whatever they treat differently.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter, TokenType

from atd.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, rebuild
from atd.checkpoint.tokenizer import Tokenizer, library_errors
from atd.errors import BadInput

SAMPLE = (
    "Once upon a time, I'll say it: DON'T you've 1 22 333 4444 55555, 3.14 and x=y+z; (a)[b]{c}!\n"
    "\n\n\tint  main()   {\r\n  return 0;  }  \n Café cafe\u0301 naïve ß 漢字かな 한국어 Привет "
    "🦊🦊 \u00a0  <s> [PAD] ▁a ... --- \u2019s 12th\n "
)
_PAD = "[PAD{}]"


def add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, size: int) -> None:
    """Adds a tokenizer to a writer.

    Args:
        writer: of the file.
        tokenizer: the model's.
        size: rows of the embedding; ids beyond the vocabulary become unused tokens.

    Raises:
        BadInput: GGUF has no form for it.
    """
    metadata = vocabulary(tokenizer, size)
    template = metadata.pop("chat_template", None)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in metadata.items():
        kind = GGUFValueType.get_type(value)
        # Ids are unsigned in the files of others.
        kind = GGUFValueType.UINT32 if kind == GGUFValueType.INT32 else kind
        writer.add_key_value(f"tokenizer.ggml.{key}", value, kind)


def vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Returns what a GGUF file says of a tokenizer: tokenizer.ggml.* without that prefix, and
    chat_template. Arguments and errors are those of `add_vocabulary`."""
    stored = json.loads(tokenizer.backend.to_str())
    model = stored["model"]
    if model.get("type") != "BPE":
        raise _no_form(tokenizer, f"its model is {model.get('type')!r}")
    pieces = bool(model.get("byte_fallback"))
    metadata: dict[str, Any] = {"model": "llama" if pieces else "gpt2"}
    tokens, types = _tokens(tokenizer, stored, size, pieces)
    metadata |= {"tokens": tokens, "token_type": types}
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if pieces:
        metadata["scores"] = scores_of_merges(tokens, merges)
        metadata["add_space_prefix"] = _puts_space_in_front(tokenizer)
    else:
        metadata["merges"] = [" ".join(merge) for merge in merges]
    metadata |= _special_ids(tokenizer)
    metadata["add_bos_token"] = tokenizer.adds_bos
    if tokenizer.chat_template:
        metadata["chat_template"] = tokenizer.chat_template
    return _that_agrees(tokenizer, metadata, ("default",) if pieces else PRE_TOKENIZERS)


def _no_form(tokenizer: Tokenizer, reason: str) -> BadInput:
    return BadInput(
        f"{tokenizer.name}: its tokenizer has no form in GGUF files that atd knows: {reason}; "
        "llama.cpp's convert_hf_to_gguf.py may know one: export with --to hf"
    )


def _tokens(
    tokenizer: Tokenizer, stored: dict, size: int, pieces: bool
) -> tuple[list[str], list[int]]:
    """(texts, types) of all ids below `size`."""
    found = {i: (text, TokenType.NORMAL) for text, i in stored["model"]["vocab"].items()}
    if pieces:
        for byte in range(256):
            i = stored["model"]["vocab"].get(f"<0x{byte:02X}>")
            if i is not None:
                found[i] = (found[i][0], TokenType.BYTE)
    for token in stored.get("added_tokens", []):
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        found[token["id"]] = (token["content"], kind)
    unknown = tokenizer.backend.token_to_id(stored["model"].get("unk_token") or "")
    if pieces and unknown is not None:
        found[unknown] = (found[unknown][0], TokenType.UNKNOWN)
    if max(found) >= size:
        raise _no_form(tokenizer, f"it has the id {max(found)}, and the embedding {size} rows")
    rows = [found.get(i, (_PAD.format(i), TokenType.UNUSED)) for i in range(size)]
    return [text for text, _ in rows], [int(kind) for _, kind in rows]


def scores_of_merges(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Returns the score of each token, by which SentencePiece joins the best pair first.

    A token scores minus the number of tokens that are made before it; what no merge makes comes
    last.
    """
    ranks: dict[str, int] = {}
    for pair in merges:
        ranks.setdefault("".join(pair), len(ranks))
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _puts_space_in_front(tokenizer: Tokenizer) -> bool:
    ids = tokenizer.backend.encode("a", add_special_tokens=False).ids
    return bool(ids) and (tokenizer.backend.id_to_token(ids[0]) or "").startswith("▁")


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of special tokens; of several that end a text the first two."""
    ids = {"bos_token_id": tokenizer.bos_id}
    for key, name in (("unk_token", "unknown"), ("pad_token", "padding"), ("eos_token", "eos")):
        if key in tokenizer.special:
            ids[f"{name}_token_id"] = tokenizer.backend.token_to_id(tokenizer.special[key])
    ends = [i for i in tokenizer.eos_ids if i != ids.get("eos_token_id")]
    if ids.get("eos_token_id") is None and ends:
        ids["eos_token_id"] = ends.pop(0)
    if ends:
        ids["eot_token_id"] = ends[0]
    return {key: i for key, i in ids.items() if i is not None}


def _that_agrees(
    tokenizer: Tokenizer, metadata: dict[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    """The metadata with the first of some names in `pre` that makes the same ids."""
    special = sorted(tokenizer.backend.get_added_tokens_decoder().items())
    sample = SAMPLE + "x ".join(token.content for _, token in special[:50])
    expected = tokenizer.encode(sample).tolist()
    for name in names:
        found = metadata | {"pre": name}
        with library_errors(f"{tokenizer.name}: its vocabulary makes no tokenizer in GGUF form"):
            if rebuild(Path(tokenizer.name), found).encode(sample).tolist() == expected:
                return found
    raise _no_form(tokenizer, f"none of {', '.join(names)} splits text as it does")
