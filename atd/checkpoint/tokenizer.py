"""Turns text into token ids and back.

    tokenizer = open_tokenizer("models/stories15M")        # a folder with tokenizer.json
    tokenizer = open_tokenizer("SmolLM2.Q4_1.gguf")        # rebuilt from its metadata
    ids = tokenizer.encode("Once upon a time", bos=True)   # int32 [n]

`open_tokenizer` is in `atd.checkpoint.reader`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import groupby

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from atd.errors import BadInput

# What a Hugging Face folder may hold of a tokenizer: copied unchanged into a converted checkpoint.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Turns what the tokenizers library raises into BadInput: bare Exception, and panics of Rust,
    which are none.
    """
    try:
        yield
    except BadInput:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise BadInput(f"{problem}: {error}") from None
        raise


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model: text to ids and back."""

    backend: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None  # None: there is no such token
    eos_ids: tuple[int, ...]  # generation ends at any of these
    adds_bos: bool  # the model is used to BOS in front (`encode` adds it only when asked)
    chat_template: str | None = field(repr=False)
    special: dict[str, str] = field(repr=False)  # what chat templates see: "bos_token" -> "<s>"
    stored: dict[str, bytes] = field(repr=False)  # file name -> content
    name: str  # of the folder or file, for messages
    assumed: str = ""  # what the file does not say, in words for people

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, special ones too; an embedding may have more rows, for padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, bos: bool = False) -> np.ndarray:
        """Returns the token ids int32 [n] of a text; with `bos`, BOS in front.

        Special tokens in the text get their ids. Raises BadInput for `bos` where there is none, and
        for text that is no Unicode, such as bytes of another encoding on a command line.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"character {error.start}, {text[error.start]!r}"
            raise BadInput(f"the text is not valid Unicode at {where}; give it in UTF-8") from None
        with library_errors(f"{self.name}: its tokenizer fails"):
            ids = self.backend.encode(text, add_special_tokens=False).ids
        if bos:
            if self.bos_id is None:
                raise BadInput(f"{self.name}: its tokenizer has no BOS token; leave out --bos")
            ids = [self.bos_id, *ids]
        return np.asarray(ids, np.int32)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Returns the text of the ids; special tokens are left out unless `special`.

        Bytes that make no character become U+FFFD, and those around them stay what they are.
        """
        ids = self._with_whole_characters(self.shown(ids, special))
        with library_errors(f"{self.name}: its tokenizer fails"):
            return self.backend.decode(ids, skip_special_tokens=False)

    def shown(self, ids: Iterable[int], special: bool = False) -> list[int]:
        """Returns the ids whose text `decode` shows: of tokens that exist, and are not special."""
        hidden = frozenset() if special else self._special_ids
        known = self.backend.id_to_token
        return [i for i in map(int, ids) if i not in hidden and known(i) is not None]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added, named = self.backend.get_added_tokens_decoder(), self.special.values()
        return frozenset(i for i, t in added.items() if t.special or t.content in named)

    @cached_property
    def _byte_ids(self) -> list[int]:
        """The ids of the tokens <0x00> to <0xFF>; [] where these are not decoded as bytes."""
        names = (f"<0x{byte:02X}>" for byte in range(256))
        ids = [i for name in names if (i := self.backend.token_to_id(name)) is not None]
        return ids if len(ids) == 256 and self.backend.decode([ids[65]]) == "A" else []

    def _with_whole_characters(self, ids: list[int]) -> list[int]:
        """The ids, with U+FFFD in place of bytes that make no character.

        The library takes a run of bytes for text or not as a whole: one character that was cut off
        would cost all those in front of it.
        """
        byte_of = {i: byte for byte, i in enumerate(self._byte_ids)}
        repaired: list[int] = []
        for are_bytes, run in groupby(ids, byte_of.__contains__):
            if are_bytes:
                text = bytes(byte_of[i] for i in run).decode(errors="replace")
                run = (self._byte_ids[byte] for byte in text.encode())
            repaired += run
        return repaired

    def apply_chat(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation in the model's own chat template.

        Templates run in Jinja2's sandbox and see what transformers gives them: messages, tools and
        documents (None), the special tokens, raise_exception, strftime_now, tojson.

        Args:
          messages: `[{"role": "user", "content": "..."}, ...]`.
          add_generation_prompt: ends the text where the model is to answer.

        Raises BadInput where there is no template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise BadInput(
                f"{self.name}: the model has no chat template; "
                "give it plain text (it is a base model, most likely)"
            )
        try:
            template = _compile_template(self.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise BadInput(
                f"{self.name}: its chat template is no valid Jinja: line {error.lineno}: {error}"
            ) from None
        try:
            return template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except jinja2.TemplateError as error:
            raise BadInput(
                f"{self.name}: its chat template refuses this conversation: {error}"
            ) from None
        except Exception as error:  # a template is a program of the model's author
            raise BadInput(
                f"{self.name}: its chat template fails: {type(error).__name__}: {error}"
            ) from None

    def files(self) -> dict[str, bytes]:
        """Returns what gives a converted checkpoint the same tokenizer: file name -> content."""
        return dict(self.stored)


# --- chat templates -------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks the text that models learn from."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _compile_template(text: str) -> jinja2.Template:
    """Compiles a template as transformers does; sandboxed, for it is untrusted code."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter of this name escapes HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)
