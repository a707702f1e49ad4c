"""Tokenizers: text to token ids and back, of a Hugging Face folder or out of a GGUF file (`atd.checkpoint.gguf_tokenizer`).

    tokenizer = open_tokenizer("models/stories15M")      folder with tokenizer.json
    tokenizer = open_tokenizer("SmolLM2.Q4_1.gguf")      rebuilt from its metadata
    ids = tokenizer.encode("Once upon a time", bos=True) int32 [n]

`Tokenizer.files()` is what a converted checkpoint needs to keep its tokenizer.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from atd.errors import BadInput

# What a Hugging Face folder may hold of a tokenizer: copied unchanged into a converted checkpoint.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back."""

    backend: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None  # None: there is no such token
    eos_ids: tuple[int, ...]  # generation ends at any of these
    adds_bos: bool  # the model is used to BOS in front (`encode` adds it only when asked)
    chat_template: str | None = field(repr=False)
    special: dict[str, str] = field(repr=False)  # "bos_token" -> "<s>", ...: what chat templates see
    stored: dict[str, bytes] = field(repr=False)  # file name -> content
    name: str  # of the folder or file, for messages

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, special ones included. A model's embedding may have more rows, for padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, bos: bool = False) -> np.ndarray:
        """Token ids int32 [n] of the text; with `bos`, BOS in front. Special tokens in the text get their ids."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if bos:
            if self.bos_id is None:
                raise BadInput(f"{self.name}: its tokenizer has no BOS token; leave out --bos")
            ids = [self.bos_id, *ids]
        return np.asarray(ids, np.int32)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of the ids; special tokens are left out unless `special`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def apply_chat(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, `[{"role": "user", "content": "..."}, ...]`, by the model's own template.

        Templates run in Jinja2's sandbox and see what transformers gives them: messages, tools and documents (None),
        the special tokens, raise_exception, strftime_now, tojson.
        """
        if self.chat_template is None:
            raise BadInput(
                f"{self.name}: the model has no chat template; give it plain text (it is a base model, most likely)"
            )
        try:
            return _compile_template(self.chat_template).render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except jinja2.TemplateError as error:
            raise BadInput(f"{self.name}: its chat template refuses this conversation: {error}") from None

    def files(self) -> dict[str, bytes]:
        """File name -> content: what gives a checkpoint's folder the same tokenizer. A folder's own stay as is."""
        return dict(self.stored)


def open_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or of a .gguf file. Raises BadInput if there is none it knows."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder; give a Hugging Face folder or a .gguf file")
    if path.suffix != ".gguf":
        raise BadInput(f"{path}: a tokenizer is read from a Hugging Face folder or a .gguf file, and this is neither")
    from atd.checkpoint.gguf_tokenizer import open_gguf_tokenizer  # here, because it needs Tokenizer

    return open_gguf_tokenizer(path)


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file. Raises BadInput if absent, unreadable, not UTF-8 or empty.

    Line ends become "\\n", as in Python's text mode and so in other tools' figures: with its carriage returns left in,
    the perplexity of stories15M on tinystories_valid_30k.txt would be 6.842 instead of 6.390.
    """
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; give one text file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} at offset {error.start} (line {line})"
        raise BadInput(f"{path}: not UTF-8 text: {found}; convert it with iconv, or give another file") from None
    if not text.strip():
        raise BadInput(f"{path}: is empty; a text file is expected")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def _open_folder(folder: Path) -> Tokenizer:
    stored = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "tokenizer.json" not in stored:
        others = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
        remedy = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers writes one"
        raise BadInput(
            f"{folder}: has no tokenizer.json"
            + (f", only {others[0]}: {remedy}" if others else "; copy it from the model's repository")
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
        _json_object(folder / name, stored.get(name)) for name in ("tokenizer_config.json", "generation_config.json")
    )
    model = folder / "config.json"
    model_config = _json_object(model, model.read_bytes() if model.is_file() else None)
    special = _special_tokens(
        config, _json_object(folder / "special_tokens_map.json", stored.get("special_tokens_map.json"))
    )

    def id_of(key: str) -> int | None:
        return backend.token_to_id(special[key]) if key in special else None

    bos = id_of("bos_token")
    bos = bos if bos is not None else next(iter(_ids(model_config.get("bos_token_id"))), None)
    ends = [*_ids(generation.get("eos_token_id")), *_ids(model_config.get("eos_token_id")), *_ids(id_of("eos_token"))]
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:  # then the post-processor of tokenizer.json decides
        adds_bos = backend.encode("").ids[:1] == [bos]
    template = stored.get("chat_template.jinja")
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys(ends)),
        adds_bos=bool(adds_bos) and bos is not None,
        chat_template=template.decode() if template is not None else _default_template(config.get("chat_template")),
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


# --- chat templates ---------------------------------------------------------------------------------------------------


def _compile_template(text: str) -> jinja2.Template:
    """The environment that transformers renders chat templates in; they are untrusted code, hence the sandbox."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )  # Jinja's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)
