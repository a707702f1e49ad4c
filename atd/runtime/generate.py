"""Generates text: token ids in, token ids out, greedy or sampled with a seed."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from atd.errors import BadInput, RunFailed
from atd.ir import Graph
from atd.models.cache import bucket
from atd.models.model import Model
from atd.models.tokens import check_tokens
from atd.progress import Progress, Report, unheard

LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # below it, float32 flushes to 0


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
    progress: Report = unheard,
) -> list[int]:
    """Goes on from a prompt.

    With temperature 0 each token is the likeliest. Otherwise it is drawn from
    softmax(logits / temperature), cut to the `top_k` likeliest tokens (0: all) and then to the
    likeliest that hold `top_p` of the probability together.

    Args:
      model: what `atd.load` returns.
      prompt_tokens: ids of the prompt, at least one.
      max_new_tokens: the text ends after this number of tokens, or where the model's context
        (max_position_embeddings) ends.
      seed: the same one draws the same tokens.
      stop_tokens: the text ends with any of these.
      on_token: called with each token as it is made.
      progress: hears of the tokens made.

    Returns the new tokens, a stop token included where one ends the text.

    Raises BadInput for an empty prompt, one that fills the model's context or holds ids outside its
    vocabulary, and options out of range. Raises RunFailed where logits are NaN or infinite.
    """
    limit = check_request(
        model,
        prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    length = len(prompt_tokens) + min(max_new_tokens, limit - len(prompt_tokens))
    pick = partial(
        _pick,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        greedy=temperature == 0,
        nucleus=top_p < 1,
    )
    key = jax.random.key(seed)
    logits, cache = model.prefill(
        np.asarray([prompt_tokens], np.int32), model.new_cache(1, min(bucket(length), limit))
    )
    tokens: list[int] = []
    for position in range(len(prompt_tokens), length):
        token = pick(logits, jax.random.fold_in(key, position))
        if position + 1 < length:  # the device goes on while the host looks at this token
            logits, cache = model.decode(token, cache)
        tokens.append(int(token[0]))
        if tokens[-1] < 0:
            raise RunFailed(
                f"the model's logits at position {position} are not finite, with {len(tokens) - 1} "
                "tokens written: weights are NaN or infinite, or a product overflowed "
                "(atd verify searches a converted folder)"
            )
        if on_token:
            on_token(tokens[-1])
        progress(Progress("generating", len(tokens), length - len(prompt_tokens), "tokens"))
        if tokens[-1] in stop_tokens:
            break
    return tokens


def check_request(
    model: Model | Graph,
    prompt: Sequence[int] | np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> int:
    """Returns the number of tokens that fit, prompt included; raises BadInput as `generate` says.

    The graph of a model is enough, so that this can be asked before its weights are read.
    """
    for what, value, good, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        (
            "temperature",
            temperature,
            temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf,
            f"0 (the likeliest token) or a number of at least {LEAST_TEMPERATURE:.2g}",
        ),
        ("top_k", top_k, top_k >= 0, "0 (all tokens) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (all tokens)"),
        ("seed", seed, -(2**63) <= seed < 2**63, "an integer of 64 bits"),
    ):
        if not good:
            raise BadInput(f"{what} is {value}; expected {expected}")
    if len(prompt) == 0:
        raise BadInput("the prompt is empty; give at least one token, such as the model's BOS")
    check_tokens(prompt, model.vocabulary)
    limit = model.max_context or len(prompt) + max_new_tokens
    if len(prompt) >= limit:
        raise BadInput(
            f"the prompt has {len(prompt)} tokens and leaves no room in the model's context of "
            f"{limit}; shorten it"
        )
    return limit


@partial(jax.jit, static_argnames=("top_k", "greedy", "nucleus"))
def _pick(logits, key, temperature, top_p, top_k: int, greedy: bool, nucleus: bool):
    """Draws a token for each row of logits [B, V]: int32 [B], -1 where the largest is not finite
    (a NaN among them is)."""
    largest = jnp.max(logits, axis=-1, keepdims=True)  # [B, 1]

    def checked(token):
        return jnp.where(jnp.isfinite(largest[:, 0]), token, -1).astype(jnp.int32)

    if greedy:
        return checked(jnp.argmax(logits, axis=-1))
    logits = (logits - largest) / temperature  # so that the largest never overflows
    if top_k == 0 and not nucleus:
        return checked(jax.random.categorical(key, logits))
    kept = min(top_k or logits.shape[-1], logits.shape[-1])
    logits, tokens = jax.lax.top_k(logits, kept)  # [B, K], likeliest first
    if nucleus:
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < top_p, logits, -jnp.inf)
    chosen = jax.random.categorical(key, logits)
    return checked(jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0])
