"""Lets the model write its own calibration text, where there is no text like its training data.

A text is TEXT tokens drawn from the model at temperature 1 from the full softmax, so that texts
follow the model's own distribution; windows hold several, one behind the other. Short texts are on
more subjects, and a small model soon loses the thread of a long one. Before each stands one token
that is drawn uniformly from the vocabulary, special tokens excluded, and is no part of the window
(LLM-QAT, 2305.17888, draws the first token so, and keeps it). Against BOS in its place:

1. Texts differ from their first token on; after BOS many begin alike.
2. Texts begin in the middle, as windows do that are cut from a text file.
3. An instruct model needs no prompt: it writes what it was pretrained on, articles, lists, code,
   conversations.

After BOS, for families that expect it in front, a text is as long as the window.

Special tokens are drawn like any others: a text that ends is followed by the model's own separator
and another text, as in the packed documents of its training.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from atd.calibration.windows import tokens_digest
from atd.checkpoint.cache import Cache, cache_key
from atd.checkpoint.reader import checkpoint_contents
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput, RunFailed
from atd.ir import Graph
from atd.models import frontend
from atd.models.model import Model, load
from atd.models.numerics import numerics
from atd.progress import Progress, Report, unheard

VERSION = 2  # of what is drawn for a seed: part of the cache's key
TEXT = 128  # tokens of a text, or the window where that is shorter
BATCH = 64  # most texts that are drawn together: more gain nothing on a CPU
CACHE_BYTES = 1 << 29  # most bytes of keys and values, unless one text takes more
CACHE_STEP = (
    128  # positions by which keys and values grow: a step of decoding reads all that is allocated
)
RUN = 256  # tokens whose probabilities are summed together, when one is looked up
TASK = "writing calibration text"


def self_text(
    model: Model,
    tokenizer: Tokenizer | None,
    *,
    tokens: int,
    context: int,
    seed: int = 0,
    batch: int | None = None,
    after_bos: bool = False,
    progress: Report = unheard,
) -> np.ndarray:
    """Draws texts that the model writes, x_t ~ softmax(logits(x_<t)), and cuts windows from all of
    them, one behind the other.

    Equal seeds give equal windows on the same machine; `batch` changes them by rounding alone.

    Args:
        tokenizer: its special tokens, and ids it does not have, are not put before a text; None:
            any id may be.
        tokens: in all; a remainder that fills no window is left out.
        context: tokens per window.
        batch: texts drawn together; None: as many as CACHE_BYTES hold keys and values of, at most
            BATCH.
        after_bos: BOS stands before all texts, in place of any token, and a text fills its window.

    Returns:
        int32 [tokens // context, context].

    Raises:
        BadInput: for tokens, context, seed or batch that are out of range, RunFailed where the
            model's logits are not finite.
    """
    windows = _window_count(model.max_context, tokens, context, seed, batch)
    length = text_length(context, after_bos)
    texts = -(-windows * context // length)
    starts = start_ids(model.vocabulary, tokenizer, after_bos)
    first, uniforms = draws(starts, texts, length, seed)
    if batch is None:
        slots = jax.tree.leaves(model.new_cache(1, 1).blocks)
        batch = min(BATCH, CACHE_BYTES // (length * sum(slot.nbytes for slot in slots)))
    batch = max(1, min(batch, texts))
    batch = -(-texts // -(-texts // batch))  # as few batches, and of nearly equal size
    drawn = []
    for start in range(0, texts, batch):
        # The last batch is filled up, or it would be compiled anew.
        rows = np.arange(start, start + batch) % texts

        def report(position: int, start: int = start) -> None:
            done = min(start * length + batch * position, windows * context)
            progress(Progress(TASK, done, windows * context, "tokens"))

        drawn.append(_draw(model, first[rows], uniforms[rows], report))
    written = np.concatenate(drawn)[:texts]
    if (written < 0).any():
        raise RunFailed(
            "the model's logits are not finite: it cannot write its own calibration text; give a "
            "text file"
        )
    return written.reshape(-1)[: windows * context].reshape(windows, context)


def cached_self_text(
    graph_or_path: Graph | str | Path,
    tokenizer: Tokenizer | None,
    *,
    tokens: int,
    context: int,
    seed: int = 0,
    cache: Cache | None = None,
    after_bos: bool = False,
    progress: Report = unheard,
) -> np.ndarray:
    """Returns `self_text` of a checkpoint or graph, drawn once and kept in the cache.

    The key is the hash of all that the windows depend on: the graph, the content of its tensors,
    the tokens that may stand in front, the settings of jax, tokens, context, the length of a text
    and seed. A graph whose weights have no identity (see `frontend.open`) is not cached; cache
    None: neither.

    Raises:
        BadInput: for tokens, context or seed that are out of range, or a cache folder that cannot
            be written to, before a weight is read.
    """
    graph = graph_or_path if isinstance(graph_or_path, Graph) else _identified(graph_or_path)
    windows = _window_count(
        graph.config.get("max_position_embeddings"), tokens, context, seed, None
    )
    sources = [ref.source for _, ref in graph.weights()]
    key = None
    if cache is not None and all(sources):
        starts = tokens_digest(start_ids(graph.vocabulary, tokenizer, after_bos))
        cut = windows, context, text_length(context, after_bos)
        key = cache_key("self-text", [VERSION, numerics(), str(graph), sources, starts, *cut, seed])
        if (kept := cache.load(key)) is not None:
            return kept["windows"]
    model = load(graph, backend="xla-unpacked")
    sizes = {"tokens": tokens, "context": context, "seed": seed, "after_bos": after_bos}
    text = self_text(model, tokenizer, **sizes, progress=progress)
    if cache is not None and key is not None:
        cache.save(key, {"windows": text})
    return text


def _identified(path: str | Path) -> Graph:
    """The graph of a checkpoint whose weights are identified by the content of their files."""
    return frontend.open(path, digests=checkpoint_contents(path).digests)


def special_ids(tokenizer: Tokenizer | None) -> frozenset[int]:
    """Returns the ids that stand for no text: BOS, EOS, roles, padding."""
    if tokenizer is None:
        return frozenset()
    added = tokenizer.backend.get_added_tokens_decoder()
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    return frozenset(
        {id for id, token in added.items() if token.special} | {*tokenizer.eos_ids, *bos}
    )


def start_ids(vocabulary: int, tokenizer: Tokenizer | None, after_bos: bool = False) -> np.ndarray:
    """Returns the ids that may stand before a text: any that stand for text, or BOS alone."""
    if after_bos and tokenizer is not None and tokenizer.bos_id is not None:
        return np.array([tokenizer.bos_id])
    known = vocabulary if tokenizer is None else min(vocabulary, tokenizer.vocabulary_size)
    starts = np.setdiff1d(np.arange(known), list(special_ids(tokenizer)))
    return starts if len(starts) else np.arange(vocabulary)


def draws(starts: np.ndarray, texts: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws all that chance decides.

    Returns:
        The tokens before the texts, int32 [texts], all different where there are enough, and
        float32 [texts, length] uniform in [0, 1).
    """
    rng = np.random.default_rng(seed)
    first = rng.choice(starts, texts, replace=texts > len(starts)).astype(np.int32)
    return first, rng.random((texts, length), np.float32)


def text_length(context: int, after_bos: bool = False) -> int:
    """Returns how many tokens of a window are one text."""
    return context if after_bos else min(TEXT, context)


def _window_count(
    max_context: int | None, tokens: int, context: int, seed: int, batch: int | None
) -> int:
    """How many windows there will be; raises BadInput where there can be none."""
    if context < 1 or seed < 0 or (batch is not None and batch < 1):
        raise BadInput(
            f"context {context}, seed {seed}, batch {batch}: context and batch must be at least 1, "
            f"the seed at least 0"
        )
    if max_context is not None and context > max_context:
        raise BadInput(
            f"windows of {context} tokens exceed the model's context of {max_context}; "
            f"ask for shorter ones"
        )
    if tokens < context:
        raise BadInput(
            f"{tokens} calibration tokens are not one window of {context}; "
            f"ask for more, or a smaller context"
        )
    return tokens // context


def _draw(
    model: Model, first: np.ndarray, uniforms: np.ndarray, report: Callable[[int], None]
) -> np.ndarray:
    """Tokens [B] before the texts, uniforms [B, T] -> the texts int32 [B, T].

    A text's last token is drawn and never read, so T places do.
    """
    batch, length = uniforms.shape
    cache = model.new_cache(batch, min(CACHE_STEP, length))
    token, columns, drawn = jnp.asarray(first), jnp.asarray(uniforms.T), []
    for position in range(length):
        if position == cache.length:
            cache = cache.longer(min(position + CACHE_STEP, length))
        logits, cache = model.decode(token, cache)
        token = pick(logits, columns, position)
        drawn.append(token)
        # Else the host would run far ahead of the device, and of what it reports.
        if position % 8 == 7:
            token.block_until_ready()
            report(position + 1)
    report(length)
    return np.stack([np.asarray(token) for token in drawn], axis=1)


@jax.jit
def pick(logits, columns, position):
    """Draws a token of each sequence: the first whose cumulated softmax exceeds a uniform.

    Cumulated over runs of tokens first, then within one run: on a CPU in a tenth of the time that a
    Gumbel variable for each logit takes (`jax.random.categorical`).

    Args:
        logits: [B, V].
        columns: uniforms [T, B], of which row `position` is taken.

    Returns:
        int32 [B]; -1 where logits are not finite.
    """
    vocabulary = logits.shape[1]
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    padded = jnp.pad(weights, ((0, 0), (0, -vocabulary % RUN)))
    weights = padded.reshape(len(weights), -1, RUN)  # [B, runs, RUN]
    ends = jnp.cumsum(weights.sum(axis=2), axis=1)  # [B, runs]
    target = columns[position][:, None] * ends[:, -1:]  # [B, 1]
    run = jnp.minimum(jnp.sum(ends <= target, axis=1, keepdims=True), ends.shape[1] - 1)  # [B, 1]
    within = jnp.take_along_axis(weights, run[:, :, None], axis=1)[:, 0]  # [B, RUN]
    before = jnp.where(run > 0, jnp.take_along_axis(ends, jnp.maximum(run - 1, 0), axis=1), 0)
    place = jnp.sum(before + jnp.cumsum(within, axis=1) <= target, axis=1)
    # Rounding must not lead past the last likely token.
    likely = jnp.max(jnp.where(within > 0, jnp.arange(RUN), 0), axis=1)
    token = run[:, 0] * RUN + jnp.minimum(place, likely)
    return jnp.where(jnp.isfinite(ends[:, -1]), token, -1).astype(jnp.int32)
