"""Generates text: token ids in, token ids out, greedy or sampled with a seed, for one prompt or
many at once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast, overload

import jax.numpy as jnp
import numpy as np

from atd.errors import BadInput, RunFailed, about
from atd.ir import Graph
from atd.models.cache import Cache, bucket
from atd.models.model import Model
from atd.models.tokens import check_tokens
from atd.progress import Progress, Report, unheard
from atd.runtime.sampling import Sampling

CHUNK = 512  # tokens of a prompt that are read at a time


@overload
def generate(
    model: Model,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int], None] | None = None,
    batch: int = 8,
    chunk: int = CHUNK,
    progress: Report = unheard,
) -> list[int]: ...
@overload
def generate(
    model: Model,
    prompt_tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int, int], None] | None = None,
    batch: int = 8,
    chunk: int = CHUNK,
    progress: Report = unheard,
) -> list[list[int]]: ...
def generate(
    model: Model,
    prompt_tokens: Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    on_token: Callable[..., None] | None = None,
    batch: int = 8,
    chunk: int = CHUNK,
    progress: Report = unheard,
) -> list[int] | list[list[int]]:
    """Goes on from a prompt, or from several.

    With temperature 0 each token is the likeliest. Otherwise it is drawn from
    softmax(logits / temperature), cut to the `top_k` likeliest tokens (0: all) and then to the
    likeliest that hold `top_p` of the probability together.

    Args:
      model: what `atd.load` returns.
      prompt_tokens: ids of the prompt, at least one; or a sequence of prompts, which run together.
      max_new_tokens: a text ends after this number of tokens, or where the model's context
        (max_position_embeddings) ends.
      seed: the same one draws the same tokens. What continues a prompt depends on the seed and on
        the prompt's place among the prompts, not on the others; one alone is in the first place.
      stop_tokens: a text ends with any of these.
      on_token: called with each token as it is made; of several prompts with the number of the
        prompt, from 0 on, and the token.
      batch: of several prompts, how many run at once: those of like length do.
      chunk: tokens of a prompt that are read at a time, which bounds the memory of activations.
      progress: hears of the tokens made.

    Returns the new tokens, a stop token included where one ends the text; of several prompts a list
    of them for each.

    Raises BadInput for an empty prompt, one that fills the model's context or holds ids outside its
    vocabulary, and options out of range. Raises RunFailed where logits are NaN or infinite.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    several = len(prompt_tokens) > 0 and np.ndim(cast(Any, prompt_tokens[0])) > 0
    prompts = cast(Sequence[Sequence[int]], prompt_tokens if several else [prompt_tokens])
    for what, value in (("batch", batch), ("chunk", chunk)):
        if value < 1:
            raise BadInput(f"{what} is {value}; expected at least 1")

    about_row = about if several else lambda _: nullcontext()
    rooms = []
    for row, prompt in enumerate(prompts):
        with about_row(f"prompt {row}"):
            rooms.append(room(model, prompt, max_new_tokens))
    made: list[list[int]] = [[] for _ in prompts]
    total = sum(rooms)
    by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for start in range(0, len(prompts), batch):
        rows = by_length[start : start + batch]
        logits, cache = _read(model, prompts, rows, rooms, batch, chunk)
        for row, token in _write(model, logits, cache, sampling, rows, rooms, stop_tokens):
            if token < 0:
                with about_row(f"prompt {row}"):
                    raise not_finite(len(prompts[row]), len(made[row]))
            made[row].append(token)
            if on_token:
                on_token(*([row] if several else []), token)
            total -= rooms[row] - len(made[row]) if token in stop_tokens else 0
            progress(Progress("generating", sum(map(len, made)), total, "tokens"))
    return made if several else made[0]


def continued(
    model: Model, logits, cache: Cache, sampling: Sampling, steps: int, rows: Sequence[int] = (0,)
) -> Iterator[tuple[np.ndarray, Cache]]:
    """Writes on, token by token, behind what `Model.prefill` returned.

    The device makes the next token while the caller looks at this one.

    Args:
        logits, cache: of the sequences; the cache is used up.
        sampling: how tokens are drawn.
        steps: tokens to write at most.
        rows: int [B], the numbers of the sequences, which their draws depend on.

    Yields the tokens int32 [B], -1 where logits are not finite, and the cache as it is then: it
    holds these tokens too, but for the last ones.
    """
    draw, numbers = sampling.draw(), jnp.asarray(rows, jnp.int32)
    for step in range(steps):
        tokens = draw(logits, numbers, cache.positions)
        if step + 1 < steps:
            logits, cache = model.decode(tokens, cache)
        yield np.asarray(tokens), cache


def room(model: Model | Graph, prompt: Sequence[int] | np.ndarray, max_new_tokens: int) -> int:
    """Returns how many new tokens fit behind a prompt, at most `max_new_tokens`.

    Raises BadInput as `generate` says. The graph of a model is enough, so that this can be asked
    before its weights are read.
    """
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if len(prompt) == 0:
        raise BadInput("the prompt is empty; give at least one token, such as the model's BOS")
    check_tokens(prompt, model.vocabulary)
    limit = model.max_context or len(prompt) + max_new_tokens
    if len(prompt) >= limit:
        raise BadInput(
            f"the prompt has {len(prompt)} tokens and leaves no room in the model's context of "
            f"{limit}; shorten it"
        )
    return min(max_new_tokens, limit - len(prompt))


def places(model: Model, length: int) -> int:
    """Returns how long a cache for `length` tokens is made: few lengths, no more than the model's
    context where that is enough.
    """
    return min(bucket(length), max(length, model.max_context or bucket(length)))


def not_finite(prompt: int, written: int) -> RunFailed:
    """Returns the error for logits that are not finite behind a prompt of this many tokens and
    those written.
    """
    return RunFailed(
        f"the model's logits at position {prompt + written} are not finite, with {written} "
        "tokens written: weights are NaN or infinite, or a product overflowed "
        "(atd verify searches a converted folder)"
    )


def _read(
    model: Model,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    rooms: Sequence[int],
    batch: int,
    chunk: int,
):
    """Reads the prompts of some rows: (logits [B, V], cache with room for what is to be written).

    The first row is repeated, so that few numbers of rows are compiled.
    """
    count = min(bucket(len(rows)), batch)
    lengths = np.array([len(prompts[row]) for row in _filled(rows, count)])
    tokens = np.zeros((count, lengths.max()), np.int32)
    for i, row in enumerate(_filled(rows, count)):
        tokens[i, : lengths[i]] = prompts[row]
    length = int(lengths.max()) + max(rooms[row] for row in rows)
    return model.prefill(tokens, model.new_cache(count, places(model, length)), lengths, chunk)


def _filled(rows: Sequence[int], count: int) -> list[int]:
    """The rows, and the first of them again until there are `count`."""
    return [*rows, *[rows[0]] * (count - len(rows))]


def _write(
    model: Model,
    logits,
    cache: Cache,
    sampling: Sampling,
    rows: Sequence[int],
    rooms: Sequence[int],
    stop_tokens: Collection[int],
) -> Iterator[tuple[int, int]]:
    """Writes on behind what `_read` returned: (row, token) until each row has ended.

    A row that has ended goes on for the others' sake; nobody looks at it.
    """
    live, steps = set(rows), max(rooms[row] for row in rows)
    numbers = _filled(rows, len(logits))
    for step, (tokens, _) in enumerate(continued(model, logits, cache, sampling, steps, numbers)):
        for row, token in zip(rows, tokens.tolist(), strict=False):
            if row in live:
                yield row, token
                if token in stop_tokens or step + 1 == rooms[row]:
                    live.remove(row)
        if not live:
            return
