"""Cuts matrices into groups and these into chunks of equal shape, which are fitted one per core.

Matrices that share group size, bases and dtype share one compilation, whatever their shapes. Within
a chunk of C groups weights are [C, size]; scales, levels and sums lie one column per group: [N, C],
[L, C], [C]. A *pooled* chunk is one group (the whole tensor), its rows side by side: weights are
[rows, in] and C is 1 elsewhere, which broadcasts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from atd.errors import BadInput
from atd.parallel.workers import spread
from atd.weights import Group
from atd.weights.groups import group_inputs

# Weights per chunk: its intermediates stay in a core's cache, and little is padding
CHUNK = 1 << 17
CHUNK_ON_GPU = 1 << 24  # a pass over it takes longer than the launch of its kernel


@dataclass(frozen=True)
class Groups:
    """The groups of a chunk, inside a compiled function."""

    weights: jax.Array  # float32 [C, size], or [rows, in] where pooled
    # float32 [C, size] (pooled: [1, in]), how much each error counts; None: alike
    importance: jax.Array | None
    pooled: bool

    def sum(self, values) -> jax.Array:
        """Sums the values of each group: [C, size] -> [C]."""
        sums = jnp.sum(values, axis=1, dtype=jnp.float32)
        return jnp.sum(sums, keepdims=True) if self.pooled else sums

    def weighted(self, values) -> jax.Array:
        """Multiplies values [C, size] by their importance."""
        return values if self.importance is None else values * self.importance

    def largest(self) -> jax.Array:
        """Returns the largest weight of each group, [C]."""
        largest = jnp.max(self.weights, axis=1)
        return jnp.max(largest, keepdims=True) if self.pooled else largest

    def total_importance(self) -> jax.Array:
        """Sums the importance of each group, [C]."""
        importance = 1.0 if self.importance is None else self.importance
        return self.sum(jnp.broadcast_to(importance, self.weights.shape))

    def energy(self) -> jax.Array:
        """Returns the weighted sum of squares of each group, [C]: the error of zeros."""
        return self.sum(self.weighted(jnp.square(self.weights)))


Fit = Callable[..., tuple[jax.Array, jax.Array]]


def fit_chunks(
    fit: Fit, weight, bases: int, group: Group, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Fits a matrix chunk by chunk.

    Args:
        fit: `fit(weights float32 [C, size], importance [C, size] or None, pooled=bool)` returns
            trits int8 [C, size, N] and scales [C, N or 1].
        weight: float [out, in].
        bases: N.
        group: a size along the inputs, "row" or "tensor".
        importance: float32 [in], how much errors at each input count; None: alike.

    Returns:
        Trits int8 [out, in, N] and scales [rows, groups, N or 1].

    Raises:
        BadInput: weights are not finite, or a scale overflows its dtype.
    """
    if group == "tensor":
        row = None if importance is None else importance[None]
        fitted = fit(jnp.asarray(weight, jnp.float32), row, pooled=True)
        trits, scales = map(np.asarray, fitted)
        scales = scales[:, None]
    else:
        trits, scales = _fit_rows(fit, weight, bases, group_size(weight, group), importance)
    return trits, stored_scales(scales, weight, scales.dtype)


def _fit_rows(
    fit: Fit, weight, bases: int, size: int, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """`fit_chunks` for groups within rows."""
    out, inputs = weight.shape
    groups = -(-inputs // size)  # per row
    if importance is None and inputs % size:
        # The padding of a ragged last group weighs nothing.
        importance = np.ones(inputs, np.float32)
    per_group = None if importance is None else grouped(importance[None], size)  # [groups, size]
    weights = grouped(weight, size)
    trits = np.empty((len(weights), size, bases), np.int8)

    def carry(chunk: slice) -> tuple[np.ndarray, np.ndarray]:
        part = None if per_group is None else per_group[np.arange(chunk.start, chunk.stop) % groups]
        found, scales = fit(take(weights, chunk), part, pooled=False)
        return np.asarray(found), np.asarray(scales)

    all_chunks, parts = chunks(len(weights), size), []
    # Several at a time are 1.5 times as fast as XLA's own threads; the first compiles.
    fitted = chain.from_iterable(spread(carry, part) for part in (all_chunks[:1], all_chunks[1:]))
    for chunk, (found, scales) in zip(all_chunks, fitted, strict=True):
        trits[chunk] = found[: len(weights) - chunk.start]
        parts.append(scales)
    scales = np.concatenate(parts)[: len(weights)]
    return (
        trits.reshape(out, groups * size, bases)[:, :inputs],
        scales.reshape(out, groups, scales.shape[-1]),
    )


def group_size(weight, group: Group) -> int:
    """Returns how many inputs of a matrix [out, in] share a scale, at most the whole row."""
    return weight.shape[1] if isinstance(group, str) else min(group, weight.shape[1])


def grouped(array, size: int) -> np.ndarray:
    """Lays groups one below the other, [out, in, ...] -> [out * groups, size, ...].

    Zeros fill a ragged last group.
    """
    return group_inputs(np.asarray(array), size).reshape(-1, size, *array.shape[2:])


def chunks(count: int, size: int) -> list[slice]:
    """Returns the chunks of `count` groups; the last one may reach beyond them."""
    step = max(1, (CHUNK if jax.default_backend() == "cpu" else CHUNK_ON_GPU) // size)
    return [slice(start, start + step) for start in range(0, count, step)]


def take(array: np.ndarray, chunk: slice) -> np.ndarray:
    """Returns the groups (or rows) of a chunk: int8 as they are, others as float32.

    Zeros fill a last chunk that reaches beyond the array: every chunk has the same shape.
    """
    part = array[chunk]
    part = part if part.dtype == np.int8 else part.astype(np.float32, copy=False)
    short = chunk.stop - chunk.start - len(part)
    return np.pad(part, [(0, short)] + [(0, 0)] * (part.ndim - 1)) if short else part


def stored_scales(scales, weight, dtype: DTypeLike) -> np.ndarray:
    """Returns the scales that were fitted to a matrix as they are stored.

    Raises BadInput where one overflows `dtype`, or the weights are not finite.
    """
    with np.errstate(over="ignore"):
        stored = np.asarray(scales).astype(dtype)
    if np.isfinite(stored.astype(np.float32)).all():
        return stored
    weight = np.asarray(weight, np.float32)
    if not np.isfinite(weight).all():
        count = (~np.isfinite(weight)).sum()
        raise BadInput(f"{count} of {weight.size} weights are NaN or infinite")
    raise BadInput(
        f"weights of up to {np.abs(weight).max():.3g} overflow scales of {stored.dtype}: store the "
        "scales as bfloat16 or float32 (decompose.dtype, or allocate.dtype in front of it: 'bf16' "
        "or 'f32')"
    )
