"""A conversation with a model, turn by turn; what was read before is not read again.

Each turn the chat template renders the whole conversation. The keys and values of the longest
beginning that the model has read already are in the cache, and only the tokens behind it are
prefilled: mostly the new message, more where a template renders earlier turns in another way than
they were written.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from atd.checkpoint.text_stream import TextStream
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput
from atd.models.cache import Cache
from atd.models.model import Model
from atd.models.tokens import check_tokens
from atd.runtime.generate import CHUNK, continued, not_finite, places
from atd.runtime.sampling import Sampling

Message = dict[str, str]  # {"role": "user", "content": "..."}


@dataclass(frozen=True)
class Answer:
    """What a model said in a turn, and how long that took."""

    text: str
    tokens: int  # written, the end-of-sequence token included
    prompt: int  # tokens of the conversation in front of it
    read: int  # of these, those that were prefilled in this turn
    first_seconds: float  # from the question to the first token, compilation included
    seconds: float  # from the first token to the last
    finish: Literal["stop", "length", "interrupted"]

    @property
    def tokens_per_second(self) -> float:
        """The rate behind the first token; 0 where there are no others."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else 0.0


def first_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """Returns the text of messages and a first question, to see whether the template takes them.

    Raises BadInput where there is no template, or it refuses them.
    """
    if tokenizer.chat_template is None:
        raise BadInput(
            f"{tokenizer.name}: the model has no chat template, it is a base model, most likely; "
            "let it go on from a text (atd generate --prompt), or take the template of a model "
            "that has one (--tokenizer PATH)"
        )
    return tokenizer.apply_chat([*messages, {"role": "user", "content": "Hello"}])


class Chat:
    """A conversation: its messages, and the cache of what the model has read and written."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        sampling: Sampling | None = None,
        *,
        system: str = "",
        max_new_tokens: int = 512,
        chunk: int = CHUNK,
    ):
        """Begins a conversation.

        Args:
            model: what `atd.load` returns.
            tokenizer: with a chat template.
            sampling: how tokens are drawn; None: the likeliest.
            system: what the system message says; "": there is none.
            max_new_tokens: an answer ends after this number of tokens, or where the context does.
            chunk: tokens that are prefilled at a time.
        """
        self.model, self.tokenizer = model, tokenizer
        self.sampling = sampling or Sampling()
        self.max_new_tokens, self.chunk = max_new_tokens, chunk
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._system)
        self._ids: list[int] = []  # read and written; the cache has the first `filled` of them
        self._cache: Cache | None = None

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self.messages = list(self._system)

    def answer(
        self,
        text: str,
        on_text: Callable[[str], object] = lambda part: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answers a message of the user. Both go into `messages`.

        Args:
            text: what the user says.
            on_text: called with each part of the answer as it comes, in whole characters.
            stopped: asked before each token; where it is true, the answer ends.

        Raises:
            BadInput: the template refuses the conversation, or it leaves no room in the model's
                context; nothing has changed then. RunFailed where logits are not finite.
        """
        asked = time.perf_counter()
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.encode(self.tokenizer.apply_chat(messages)).tolist()
        steps = min(self.max_new_tokens, self._room(ids))
        logits, filled, read = self._read(ids, steps)
        stream, parts, times = TextStream(self.tokenizer), [], []
        finish = "length"

        def say(part: str) -> None:
            parts.append(part)
            on_text(part)

        for tokens, cache in continued(self.model, logits, filled, self.sampling, steps):
            token, self._cache = int(tokens[0]), cache
            if token < 0:
                self._ids, self._cache = [], None
                raise not_finite(len(ids), len(times))
            self._ids.append(token)
            times.append(time.perf_counter())
            if token in self.tokenizer.eos_ids:
                finish = "stop"
                break
            say(stream.add(token))
            if stopped():
                finish = "interrupted"
                break
        say(stream.end())
        answer = "".join(parts)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        first, last = times[0], times[-1]
        return Answer(answer, len(times), len(ids), read, first - asked, last - first, finish)

    def _room(self, ids: Sequence[int]) -> int:
        """How many tokens fit behind a conversation; raises BadInput where none do."""
        check_tokens(ids, self.model.vocabulary)
        if not ids:
            raise BadInput(f"{self.tokenizer.name}: its chat template makes an empty prompt")
        limit = self.model.max_context or len(ids) + self.max_new_tokens
        if len(ids) >= limit:
            raise BadInput(
                f"the conversation has {len(ids)} tokens with this message and leaves no room in "
                f"the model's context of {limit}; write a shorter one, or begin anew (/reset)"
            )
        return limit - len(ids)

    def _read(self, ids: list[int], steps: int) -> tuple[jax.Array, Cache, int]:
        """Reads what is new in the ids: (logits, cache with room for `steps` more, tokens read)."""
        length = places(self.model, len(ids) + steps)
        cache = self._cache or self.model.new_cache(1, length)
        there = min(cache.filled, common(self._ids, ids[:-1]))  # the last one gives the logits
        cache = cache.back_to(there).longer(max(length, cache.length))
        self._ids, self._cache = [], None  # until it has been read, the cache is used up
        new = np.asarray([ids[there:]], np.int32)
        logits, cache = self.model.prefill(new, cache, chunk=self.chunk)
        self._ids, self._cache = list(ids), cache
        return logits, cache, len(ids) - there


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the length of the longest common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
