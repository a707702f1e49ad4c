"""Says how much errors at each token of a text count: by how uncertain the model is there.

Where the model is sure of the next token, small errors do not change what it says. With p its
distribution, labels drawn from it, the gradient of -log p(label) at the logits has the expected
square

    u = sum_v p_v (1 - p_v)

which is 0 where one token has all of p. Second moments of the inputs of linears weigh a token's
products by the root of u: u itself is what the last linears feel, while those before it also feel
the tokens that follow.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from atd.calibration.room import Room
from atd.calibration.sensitivity import HEAD
from atd.calibration.streams import Stream, batches_of
from atd.calibration.windows import tokens_digest
from atd.checkpoint.cache import Cache, cache_key
from atd.errors import RunFailed
from atd.ir import Graph
from atd.models.execute import Structure, dense_weights, output, structure_of
from atd.models.numerics import numerics
from atd.models.ops import Weights
from atd.progress import Progress, Report, unheard
from atd.weights import Dense, Weight

VERSION = 2  # of what is computed: part of the cache's key


def token_counts(
    graph: Graph,
    windows: np.ndarray,
    room: Room | None = None,
    cache: Cache | None = None,
    progress: Report = unheard,
) -> np.ndarray:
    """Returns how much each token counts: u^(1/2) over its mean, float32 [windows, context].

    It is kept in the cache by the identity of the graph's weights and the windows. Where the model
    is certain of all tokens, they count alike.

    Args:
        graph: the dense model.
        windows: int32 [windows, context].
        room: for the residual stream; without a limit by default.
        cache: None: none.
        progress: hears of each unit.

    Raises:
        RunFailed: the model's logits are not finite.
    """
    sources, key = [ref.source for _, ref in graph.weights()], None
    if cache is not None and all(sources):
        made_from = [VERSION, numerics(), str(graph), sources, tokens_digest(windows)]
        key = cache_key("token-counts", made_from)
        if (kept := cache.load(key)) is not None:
            return kept["counts"]
    counts = np.sqrt(_uncertainty(graph, windows, room or Room(), progress))
    if not np.isfinite(counts).all():
        raise RunFailed(
            "the model's logits on the calibration text are not finite, so that nothing says how "
            "much tokens count: leave out decompose.uncertainty, or look for what overflows"
        )
    mean = counts.mean(dtype=np.float64)
    counts = (counts / mean if mean else np.ones_like(counts)).astype(np.float32)
    if cache is not None and key is not None:
        cache.save(key, {"counts": counts})
    return counts


def _uncertainty(graph: Graph, windows: np.ndarray, room: Room, progress: Report) -> np.ndarray:
    """u at each token, float32 [windows, context]."""
    stream = Stream("uncertainty", batches_of(np.asarray(windows, np.int32)), room)
    for done, unit in enumerate(graph.units[:-1]):
        stream.enter(unit)
        stream.leave()
        progress(Progress("reading calibration text", done + 1, len(graph.units), "units"))
    weights, embedding = dense_weights(graph.epilogue.nodes), None
    if graph.is_tied:
        embedding = Dense(jnp.asarray(graph.prologue.nodes[0].weights["weight"].dense()))
    look = partial(_at_logits, structure_of(graph.epilogue), weights, embedding)
    found = []
    for x in stream.inputs():
        flat = x.reshape(-1, x.shape[-1])  # [positions, D]
        parts = range(0, len(flat), HEAD)
        found += [np.asarray(look(flat[None, start : start + HEAD])) for start in parts]
    stream.close()
    return np.concatenate(found).reshape(windows.shape)


@partial(jax.jit, static_argnames="structure")
def _at_logits(structure: Structure, weights: Weights, embedding: Weight | None, x):
    """u [P] of the epilogue's input x [1, P, D]."""
    logits = output(structure.block, weights, x, embedding=embedding)[0]  # [P, V]
    logp = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logp) * -jnp.expm1(logp), axis=-1)
