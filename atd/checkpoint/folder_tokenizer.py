"""Reads the tokenizer of a Hugging Face folder: tokenizer.json and what stands beside it."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from atd.checkpoint.files import path_exists, read_bytes, read_json, refuse_pointer
from atd.checkpoint.tokenizer import FILES, Tokenizer, library_errors
from atd.errors import BadInput


def open_folder_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder.

    Raises BadInput where there is none, or a damaged one.
    """
    stored = {name: read_bytes(folder / name) for name in FILES if path_exists(folder / name)}
    if "tokenizer.json" not in stored:
        raise BadInput(f"{folder}: has no tokenizer.json{_remedy(folder)}")
    file = folder / "tokenizer.json"
    refuse_pointer(file)
    with library_errors(f"{file}: the tokenizers library cannot read it"):
        backend = tokenizers.Tokenizer.from_buffer(stored["tokenizer.json"])
    backend.no_truncation()
    backend.no_padding()

    config = _optional_json(folder / "tokenizer_config.json")
    generation = folder / "generation_config.json"
    model = folder / "config.json"
    special = _special_tokens(config, _optional_json(folder / "special_tokens_map.json"))
    _add_tokens(backend, {**_legacy_tokens(folder, special), **_declared_tokens(folder, config)})
    backend.add_special_tokens(
        [_token(word) for word in special.values() if backend.token_to_id(word) is not None]
    )

    def id_of(key: str) -> int | None:
        return backend.token_to_id(special[key]) if key in special else None

    bos = id_of("bos_token")
    bos = bos if bos is not None else next(iter(_ids(model, "bos_token_id")), None)
    end = id_of("eos_token")
    ends = [*_ids(generation, "eos_token_id"), *_ids(model, "eos_token_id")]
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:  # then the post-processor of tokenizer.json decides
        with library_errors(f"{file}: the tokenizers library cannot use it"):
            adds_bos = backend.encode("").ids[:1] == [bos]
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys([*ends, *([] if end is None else [end])])),
        adds_bos=bool(adds_bos) and bos is not None,
        chat_template=_chat_template(folder, stored, config),
        special=special,
        stored=stored,
        name=str(folder),
    )


def _remedy(folder: Path) -> str:
    """What to do about a tokenizer.json that is absent."""
    others = [name for name in ("tokenizer.model", "vocab.json") if path_exists(folder / name)]
    if not others:
        return "; copy it from the model's repository"
    return (
        f", only {others[0]}: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of "
        "transformers writes one"
    )


def _optional_json(file: Path) -> dict:
    """The object in a JSON file; {} for one that is absent."""
    return read_json(file) if path_exists(file) else {}


def _special_tokens(*configs: dict) -> dict[str, str]:
    """The special tokens by key, as strings; the first config to have one counts."""
    special = {}
    for config in configs:
        for key in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
            key = f"{key}_token"
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special.setdefault(key, value)
    return special


# --- tokens that tokenizer.json does not have -----------------------------------------------------

_Tokens = dict[int, tuple[AddedToken, Path]]  # id -> token, and the file that names it
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _token(content: str, special: bool = True) -> AddedToken:
    """A token that is found in the text as it stands."""
    return AddedToken(content, normalized=False, special=special)


def _declared_tokens(folder: Path, config: dict) -> _Tokens:
    """Those of added_tokens_decoder in tokenizer_config.json."""
    file, tokens = folder / "tokenizer_config.json", {}
    for number, entry in (_object(file, config, "added_tokens_decoder") or {}).items():
        flags = {key: entry.get(key, False) for key in _FLAGS} if isinstance(entry, dict) else {}
        is_id = number.isdecimal() and len(number) < 11
        if not flags or not is_id or not isinstance(entry.get("content"), str):
            raise BadInput(f"{file}: added_tokens_decoder: {number}: {entry!r} is no token")
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise BadInput(f"{file}: added_tokens_decoder: {number}: {entry!r} is no token")
        tokens[int(number)] = AddedToken(entry["content"], **flags), file
    return tokens


def _legacy_tokens(folder: Path, special: dict[str, str]) -> _Tokens:
    """Those of added_tokens.json, which has their ids alone."""
    file, tokens = folder / "added_tokens.json", {}
    for word, i in _optional_json(file).items():
        if type(i) is not int:
            raise BadInput(f"{file}: the id of {word!r} is {i!r}; expected an integer")
        tokens[i] = _token(word, word in special.values()), file
    return tokens


def _add_tokens(backend: tokenizers.Tokenizer, tokens: _Tokens) -> None:
    """Adds tokens to the tokenizer, under the ids that they are to have."""
    for i, (token, file) in sorted(tokens.items()):
        if i not in backend.get_added_tokens_decoder() or backend.id_to_token(i) != token.content:
            backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != i:
            raise BadInput(
                f"{file}: the token {token.content!r} has the id {i}, but with tokenizer.json it "
                f"is {found}: the files are not of one tokenizer"
            )


def _object(file: Path, config: dict, key: str) -> dict | None:
    """The object under a key, None where it is absent."""
    value = config.get(key)
    if not isinstance(value, dict | None):
        raise BadInput(f"{file}: {key} is {value!r}; expected an object")
    return value


def _ids(file: Path, key: str) -> list[int]:
    """The ids in a JSON file, which may be a number, a list or absent, as a list."""
    value = _optional_json(file).get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < 1 << 32 for i in ids):
        raise BadInput(f"{file}: {key} is {value!r}; expected a token id or a list of them")
    return ids


def _chat_template(folder: Path, stored: dict[str, bytes], config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or what tokenizer_config.json has: a string, or named ones, as a list
    or an object."""
    if "chat_template.jinja" in stored:
        try:
            return stored["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise BadInput(f"{folder / 'chat_template.jinja'}: not UTF-8 text: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = {t["name"]: t.get("template") for t in named if isinstance(t.get("name"), str)}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str | None):
        raise BadInput(f"{folder / 'tokenizer_config.json'}: chat_template is no template")
    return template
