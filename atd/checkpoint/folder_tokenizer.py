"""The tokenizer of a Hugging Face folder: tokenizer.json and what stands beside it."""

import json
from pathlib import Path

import tokenizers

from atd.checkpoint.tokenizer import FILES, Tokenizer
from atd.errors import BadInput


def open_folder_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder. Raises BadInput where there is none, or a damaged one."""
    stored = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "tokenizer.json" not in stored:
        others = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
        remedy = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers writes one"
        raise BadInput(
            f"{folder}: has no tokenizer.json"
            + (
                f", only {others[0]}: {remedy}"
                if others
                else "; copy it from the model's repository"
            )
        )
    try:
        backend = tokenizers.Tokenizer.from_buffer(stored["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception
        raise BadInput(
            f"{folder / 'tokenizer.json'}: is no tokenizer that the tokenizers library reads: {error}"
        ) from None
    backend.no_truncation()
    backend.no_padding()

    config, generation = (
        _json_object(folder / name, stored.get(name))
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    model = folder / "config.json"
    model_config = _json_object(model, model.read_bytes() if model.is_file() else None)
    special = _special_tokens(
        config,
        _json_object(folder / "special_tokens_map.json", stored.get("special_tokens_map.json")),
    )

    def id_of(key: str) -> int | None:
        return backend.token_to_id(special[key]) if key in special else None

    bos = id_of("bos_token")
    bos = bos if bos is not None else next(iter(_ids(model_config.get("bos_token_id"))), None)
    ends = [
        *_ids(generation.get("eos_token_id")),
        *_ids(model_config.get("eos_token_id")),
        *_ids(id_of("eos_token")),
    ]
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:  # then the post-processor of tokenizer.json decides
        adds_bos = backend.encode("").ids[:1] == [bos]
    template = stored.get("chat_template.jinja")
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys(ends)),
        adds_bos=bool(adds_bos) and bos is not None,
        chat_template=template.decode()
        if template is not None
        else _default_template(config.get("chat_template")),
        special=special,
        stored=stored,
        name=str(folder),
    )


def _json_object(path: Path, data: bytes | None) -> dict:
    """The object in a JSON file; {} for one that is absent."""
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except ValueError as error:
        raise BadInput(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def _special_tokens(*configs: dict) -> dict[str, str]:
    """bos_token, eos_token, unk_token, pad_token, each a string or {"content": string}; the first to have it counts."""
    special = {}
    for config in configs:
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special.setdefault(key, value)
    return special


def _ids(value) -> list[int]:
    """An id, a list of ids or None -> a list."""
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _default_template(value) -> str | None:
    """chat_template of tokenizer_config.json: a string, or a list of named ones of which "default" is meant."""
    if isinstance(value, list):
        return next((item["template"] for item in value if item.get("name") == "default"), None)
    return value
