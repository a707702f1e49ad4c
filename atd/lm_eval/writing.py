"""Writes answers for lm-evaluation-harness, in batches, up to stop strings."""
# pyright: reportMissingImports=false

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from atd.checkpoint.text_stream import TextStream
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput
from atd.models.model import Model
from atd.runtime.generate import generate

MAX_TOKENS = 256  # of an answer where the task does not say, as of the harness's own models
_SAMPLING = ("temperature", "top_k", "top_p")
_NEUTRAL = (None, False, 1, "")  # other options with one of these values change nothing


@dataclass(frozen=True)
class Writing:
    """How answers are written."""

    until: tuple[str, ...]  # stop strings, which are no part of the answer
    max_tokens: int
    sampling: dict[str, Any] = field(hash=False)  # of `atd.generate`


def writing(gen_kwargs: dict, words: Tokenizer) -> Writing:
    """Reads the options of a task; raises BadInput for those that `atd.generate` has not."""
    options = dict(normalize_gen_kwargs(gen_kwargs, MAX_TOKENS))
    end = words.decode(words.eos_ids[:1], special=True)
    until = handle_stop_sequences(options.pop("until"), end or None)
    count, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
    given = {name: options.pop(name) for name in _SAMPLING if name in options}
    unknown = sorted(name for name, value in options.items() if value not in _NEUTRAL)
    if unknown:
        raise BadInput(f"atd generates without the option {', '.join(unknown)} that the task gives")
    return Writing(tuple(filter(None, until)), count, given if sampled else {})


def write(
    model: Model,
    words: Tokenizer,
    prompts: Sequence[Sequence[int]],
    how: Writing,
    *,
    seed: int,
    rows: int,
    done: Callable[[int, str], None],
) -> None:
    """Writes behind prompts of token ids, some of like length at a time.

    Args:
        seed: of the first prompt's draws.
        rows: prompts that run together.
        done: called with the number of each prompt and its answer.
    """
    ids = map(words.backend.token_to_id, how.until)
    special = {i for i in ids if i is not None and not words.shown([i])}  # never part of a text
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        answers = [_Answer(words, how, {*words.eos_ids, *special}) for _ in part]
        live = set(range(len(part)))

        def hear(row: int, token: int, answers=answers, live=live) -> None:
            if row in live and answers[row].ends_with(token):
                live.remove(row)
            if not live:
                raise _AllEnded

        with suppress(_AllEnded):
            generate(
                model,
                [prompts[i] for i in part],
                max_new_tokens=how.max_tokens,
                seed=seed + start,
                stop_tokens={*words.eos_ids, *special},
                on_token=hear,
                batch=rows,
                **how.sampling,
            )
        for i, answer in zip(part, answers, strict=True):
            done(i, answer.text())


class _AllEnded(Exception):
    """Every text of a batch has ended, which `generate` does not see of stop strings."""


class _Answer:
    """A text that is written. The tokens may be spread over a stop string in any way."""

    def __init__(self, words: Tokenizer, how: Writing, stop_tokens: Collection[int]):
        self._stream, self._how, self._stop_tokens = TextStream(words), how, stop_tokens
        self._text, self._count = "", 0
        self._longest = max(map(len, how.until), default=0)

    def ends_with(self, token: int) -> bool:
        """Adds a token; returns whether the text has ended."""
        new = self._stream.add(token)
        self._text, self._count = self._text + new, self._count + 1
        tail = self._text[-(len(new) + self._longest) :]
        return (
            token in self._stop_tokens
            or self._count == self._how.max_tokens
            or any(stop in tail for stop in self._how.until)
        )

    def text(self) -> str:
        """Returns the whole text in front of a stop string."""
        return postprocess_generated_text(
            self._text + self._stream.end(), list(self._how.until), None
        )
