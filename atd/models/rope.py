"""Rotary position embeddings: frequencies, their scalings for long contexts, and the rotation."""

import math

import jax
import jax.numpy as jnp
import numpy as np

KNOWN = (
    "(), ('linear', factor), ('llama3', factor, low, high, original), "
    "('yarn', factor, original, fast, slow, truncate, attention), "
    "('longrope', original, short, long, attention)"
)


def rope_frequencies(width: int, theta: float, scaling: tuple, length: int = 0) -> np.ndarray:
    """Returns the angle per position of each pair of features, rescaled for longer contexts.

        f_i = theta^(-2i / width),   i = 0 ... width / 2 - 1

    Args:
        width: features per head that are rotated.
        theta: base of the geometric series.
        scaling: `()` none.
            `("linear", factor)` divides by factor.
            `("llama3", factor, low, high, original)` divides wavelengths above original / low by
            factor, keeps those below original / high, and blends between (Llama 3.1; the names are
            low_freq_factor, high_freq_factor and original_max_position_embeddings).
            `("yarn", factor, original, fast, slow, truncate, attention)` divides frequencies of
            fewer than `slow` turns in `original` positions by factor, keeps those of more than
            `fast`, and blends between, linearly in i; truncate: the bounds of i are integers.
            `("longrope", original, short, long, attention)` divides f_i by short_i, or by long_i
            where there are more than `original` positions.
            What is called attention is the factor of `rope_factor`.
        length: positions that there are or can be, which `longrope` chooses by.

    Returns:
        float32 [width / 2].

    Raises:
        ValueError: the scaling is any other.

    Sources: YaRN (2309.00071), LongRoPE (2402.13753), transformers 5.24 `modeling_rope_utils.py`.
    """
    inverse = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    match scaling:
        case ():
            scaled = inverse
        case ("linear", factor):
            scaled = inverse / factor
        case ("llama3", factor, low, high, original):
            wavelength = 2 * math.pi / inverse
            keep = np.clip((original / wavelength - low) / (high - low), 0, 1)
            scaled = (1 - keep) * inverse / factor + keep * inverse
        case ("yarn", factor, original, fast, slow, truncate, _):
            keep = _yarn_keeps(width, theta, original, fast, slow, truncate)
            scaled = (1 - keep) * inverse / factor + keep * inverse
        case ("longrope", original, short, long, _):
            scaled = inverse / np.array(long if length > original else short, np.float32)
        case _:
            raise ValueError(f"rope scaling {scaling!r} is not known; known: {KNOWN}")
    return scaled.astype(np.float32)


def _yarn_keeps(
    width: int, theta: float, original: int, fast: float, slow: float, truncate: bool
) -> np.ndarray:
    """How much of each frequency yarn keeps, 1 to 0 from those of `fast` turns to those of `slow`,
    [width / 2].
    """

    def pair(turns: float) -> float:  # i of the frequency that turns so often in `original`
        wavelength = math.log(original) - math.log(turns) - math.log(2 * math.pi)
        return width * wavelength / (2 * math.log(theta))

    first, last = pair(fast), pair(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    ramp = (np.arange(width // 2, dtype=np.float32) - first) / (last - first)
    return 1 - np.clip(ramp, 0, 1)


def rope_factor(scaling: tuple) -> float:
    """Returns what cos and sin are multiplied by: the attention factor of yarn and longrope."""
    return scaling[-1] if scaling and scaling[0] in ("yarn", "longrope") else 1.0


def rope(
    x,
    positions,
    head_dim: int,
    theta: float,
    scaling: tuple = (),
    rotary: int | None = None,
    length: int = 0,
) -> jax.Array:
    """Rotates the pairs (i, i + rotary / 2) of each head by position * frequency_i, and multiplies
    them by `rope_factor`.

    Args:
        x: float [B, T, heads head_dim].
        positions: int32 [B, T].
        head_dim: features per head.
        theta, scaling, length: as in `rope_frequencies`.
        rotary: features of each head that are rotated, its first ones; the others stay. None: all.
    """
    width = head_dim if rotary is None else rotary
    frequencies, factor = rope_frequencies(width, theta, scaling, length), rope_factor(scaling)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, width / 2]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    heads = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, head_dim)
    pairs = heads[..., :width].reshape(*heads.shape[:-1], 2, width // 2)
    first, second = pairs[..., 0, :], pairs[..., 1, :]  # [B, T, heads, width / 2]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    turned = turned.reshape(*heads.shape[:-1], width)
    if width < head_dim:
        turned = jnp.concatenate([turned, heads[..., width:]], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
