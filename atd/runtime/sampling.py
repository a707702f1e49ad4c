"""Draws the next tokens from logits: the likeliest, or at random with a seed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from atd.errors import BadInput

LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # below it, float32 flushes to 0

# logits [B, V], rows int32 [B], positions int32 [B, 1] -> tokens int32 [B]
Draw = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    With temperature 0 each token is the likeliest. Otherwise it is drawn from
    softmax(logits / temperature), cut to the `top_k` likeliest tokens (0: all) and then to the
    likeliest that hold `top_p` of the probability together.

    Raises BadInput for options out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0  # the same one draws the same tokens

    def __post_init__(self):
        heat = self.temperature
        for what, good, expected in (
            (
                "temperature",
                heat == 0 or LEAST_TEMPERATURE <= heat < math.inf,
                f"0 (the likeliest token) or a number of at least {LEAST_TEMPERATURE:.2g}",
            ),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)"),
            ("seed", -(2**63) <= self.seed < 2**63, "an integer of 64 bits"),
        ):
            if not good:
                raise BadInput(f"{what} is {getattr(self, what)}; expected {expected}")

    def draw(self) -> Draw:
        """Returns the compiled function that draws a token for each row of logits.

        What is drawn depends on the seed, on the row's number and on the position of the token, and
        on no other row. It is -1 where the largest logit is not finite (a NaN among them is).
        """
        return partial(
            _draw,
            jax.random.key(self.seed),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            greedy=self.temperature == 0,
            nucleus=self.top_p < 1,
        )


@partial(jax.jit, static_argnames=("top_k", "greedy", "nucleus"))
def _draw(
    key, logits, rows, positions, temperature, top_p, top_k: int, greedy: bool, nucleus: bool
):
    """Draws as `Sampling.draw` says; nucleus: whether top_p cuts anything."""
    largest = jnp.max(logits, axis=-1, keepdims=True)  # [B, 1]

    def checked(token):
        return jnp.where(jnp.isfinite(largest[:, 0]), token, -1).astype(jnp.int32)

    if greedy:
        return checked(jnp.argmax(logits, axis=-1))
    of_row = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))
    categorical = jax.vmap(jax.random.categorical)
    keys = of_row(rows, positions[:, 0])  # [B]
    logits = (logits - largest) / temperature  # so that the largest never overflows
    if top_k == 0 and not nucleus:
        return checked(categorical(keys, logits))
    kept = min(top_k or logits.shape[-1], logits.shape[-1])
    logits, tokens = jax.lax.top_k(logits, kept)  # [B, K], likeliest first
    if nucleus:
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < top_p, logits, -jnp.inf)
    chosen = categorical(keys, logits)
    return checked(jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0])
