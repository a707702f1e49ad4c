"""Scores continuations of contexts, as multiple-choice tasks and rolling windows need them.

    log p(continuation | context) = sum_t log p(token t | context, the continuation's tokens < t)

The tokens that run are the context and the continuation without its last. Which rows they make is
decided in `atd.runtime.rows`: what requests begin with in common runs once. Logits exist only for
the positions that predict a continuation, POSITIONS at a time, whatever the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from atd.errors import BadInput, RunFailed
from atd.models.model import Model
from atd.models.tokens import check_tokens
from atd.progress import Progress, Report, unheard
from atd.runtime.rows import Batch, Families, Read, Request, batches, padded_count

POSITIONS = 256  # whose logits exist at a time


@dataclass(frozen=True)
class Score:
    """What a model says of a continuation."""

    log_likelihood: float  # nats, the sum over its tokens
    greedy: bool  # each of its tokens is the likeliest


def score_continuations(
    model: Model,
    requests: Sequence[Request],
    *,
    rows: int | None = None,
    progress: Report = unheard,
) -> list[Score]:
    """Returns the scores of the requests, in their order.

    Args:
        model: what `atd.load` returns.
        requests: see `fit` for those longer than the model's context.
        rows: rows that run together; None: as many as make 2,048 tokens.
        progress: hears of the requests done after each batch.

    Raises BadInput for ids outside the vocabulary and contexts or continuations without tokens.
    Raises RunFailed where logits are NaN or infinite.
    """
    for request in requests:
        if not request.context or not request.continuation:
            raise BadInput(
                f"a context of {len(request.context)} and a continuation of "
                f"{len(request.continuation)} tokens: both must have at least one"
            )
        check_tokens((*request.context, *request.continuation), model.vocabulary)
    total, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    done: set[int] = set()
    for batch in batches(requests, rows):
        for hidden, reads in _run(model, batch):
            _add(model, hidden, reads, total, greedy)
            done |= {read.request for read in reads}
        progress(Progress("scoring", len(done), len(requests), "requests"))
    return [Score(float(sum_), bool(all_)) for sum_, all_ in zip(total, greedy, strict=True)]


def fit(request: Request, max_length: int) -> Request:
    """Returns the request with its context cut from the left, so that max_length tokens run.

    Raises BadInput for a continuation of more than max_length tokens.
    """
    length = len(request.continuation)
    if length > max_length:
        raise BadInput(
            f"a continuation of {length} tokens is longer than the model's context of {max_length}"
        )
    return Request(request.context[-(max_length + 1 - length) :], request.continuation)


def _run(model: Model, batch: Batch | Families) -> Iterator[tuple[jax.Array, tuple[Read, ...]]]:
    """What enters the head [B, T, D], and what is read off it.

    Continuations of one context overwrite each other in its cache: what lies behind a row's place
    is never attended to.
    """
    if isinstance(batch, Batch):
        yield model.hidden(batch.tokens), batch.reads
        return
    rows, width = batch.contexts.tokens.shape
    cache = model.new_cache(rows, width + batch.turns[0].tokens.shape[1])
    hidden, cache = model.append(batch.contexts.tokens, batch.lengths, cache)
    yield hidden, batch.contexts.reads
    positions, filled = cache.positions, cache.filled
    for turn in batch.turns:
        hidden, cache = model.append(turn.tokens, np.zeros_like(batch.lengths), cache)
        cache = replace(cache, positions=positions, filled=filled)
        yield hidden, turn.reads


def _add(
    model: Model, hidden: jax.Array, reads: Sequence[Read], total: np.ndarray, greedy: np.ndarray
) -> None:
    """Adds to the requests' total, and to whether they are greedy, what hidden [B, T, D] says."""
    counts = [len(read.targets) for read in reads]
    owner = np.repeat([read.request for read in reads], counts)
    row = np.repeat([read.row for read in reads], counts)
    column = np.concatenate([read.first + np.arange(len(read.targets)) for read in reads])
    target = np.concatenate([read.targets for read in reads])
    for start in range(0, len(owner), POSITIONS):
        part = slice(start, start + POSITIONS)
        count = len(owner[part])
        room = (0, padded_count(count) - count)
        at, to, wanted = (np.pad(a[part], room).astype(np.int32) for a in (row, column, target))
        log_p, likeliest = _score(model, _take(hidden, at, to), wanted)
        log_p = np.asarray(log_p)[:count].astype(np.float64)
        if not np.isfinite(log_p).all():
            raise RunFailed(
                "the model's logits are not finite: weights are NaN or infinite, or a product "
                "overflowed (atd verify searches a converted folder)"
            )
        np.add.at(total, owner[part], log_p)
        np.logical_and.at(greedy, owner[part], np.asarray(likeliest)[:count])


_take = jax.jit(lambda hidden, row, column: hidden[row, column])  # [B, T, D], [P], [P] -> [P, D]


@jax.jit
def _score(model: Model, hidden, target):
    """Of hidden [P, D]: log p of targets int32 [P], and whether they are the likeliest."""
    logits = model.logits(hidden).astype(jnp.float32)  # [P, V]
    log_p = jax.nn.log_softmax(logits)
    of_target = jnp.take_along_axis(log_p, target[:, None], axis=1)[:, 0]
    return of_target, jnp.argmax(logits, axis=1) == target
