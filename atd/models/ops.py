"""The jnp reference of every op of `atd.ir.OPS`, and `run_block`, which executes the nodes of a block in order.

Values are `[B, T, features]` (token ids `[B, T]` in the prologue). Heads lie side by side in the features, head-major. Normalisation, rotary angles and
softmax are computed in float32, whatever the dtype of the values, as Hugging Face transformers does.

A cache of one attention node is `(k, v)`, each `[B, length, kv_heads, head_dim]`; the key of position t lies in slot t. Slots that hold no position yet
(or the padding of a prompt) are never attended to: a query at position t sees slots 0..t alone, and each of these has been written before.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from atd.ir import Block
from atd.kernels import matmul as kernels
from atd.weights import Weight

Cache = tuple[jax.Array, jax.Array]
Weights = dict[str, dict[str, Weight]]  # node name -> slot -> weight


def rms_norm(x, gain, eps: float, head_dim: int | None = None):
    """x / sqrt(mean(x^2) + eps) * gain over the last axis, or over each run of `head_dim` features of it (Qwen3's q and k)."""
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, head_dim or x.shape[-1])  # [..., heads, head_dim]
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed.astype(x.dtype) * gain.astype(x.dtype)).reshape(x.shape)


def rope_frequencies(head_dim: int, theta: float, scaling: tuple) -> np.ndarray:
    """Angle a position, one for each pair of features: theta^(-2i/head_dim), i < head_dim/2, rescaled for longer contexts.

    scaling: `()` none; `("linear", factor)` divides by factor; `("llama3", factor, low_freq_factor, high_freq_factor, original_max_position_embeddings)`
    divides wavelengths above original/low_freq_factor by factor, keeps those below original/high_freq_factor and blends between (Llama 3.1).
    Raises ValueError for any other scaling.
    """
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    match scaling:
        case ():
            scaled = inverse
        case ("linear", factor):
            scaled = inverse / factor
        case ("llama3", factor, low, high, original):
            wavelength = 2 * math.pi / inverse
            keep = np.clip((original / wavelength - low) / (high - low), 0, 1)
            scaled = (1 - keep) * inverse / factor + keep * inverse
        case _:
            raise ValueError(f"rope scaling {scaling!r} is not known; known: (), ('linear', factor), ('llama3', factor, low, high, original)")
    return scaled.astype(np.float32)


def rope(x, positions, head_dim: int, theta: float, scaling: tuple = ()):
    """Rotates the pairs (i, i + head_dim/2) of each head by the angle position * frequency_i. positions int32 [B, T]."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(head_dim, theta, scaling)  # [B, T, head_dim/2]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    heads = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2, head_dim // 2)  # [B, T, heads, 2, head_dim/2]
    first, second = heads[..., 0, :], heads[..., 1, :]
    return jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2).reshape(x.shape).astype(x.dtype)


def attention(q, k, v, query_positions, key_positions, heads: int, kv_heads: int, head_dim: int, window: int = 0):
    """Causal softmax(q k^T / sqrt(head_dim)) v with `heads / kv_heads` query heads to each key head.

    q [B, T, heads*head_dim]; k, v [B, S, kv_heads*head_dim]; positions int32 [B, T] and [B, S]. A query at position t sees keys at positions
    s <= t, and with window > 0 only s > t - window (the last `window` positions, its own included).
    """
    batch, queries, _ = q.shape
    q = q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    k, v = (a.reshape(batch, -1, kv_heads, head_dim) for a in (k, v))
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    distance = query_positions[:, :, None] - key_positions[:, None, :]  # [B, T, S]
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return mixed.reshape(batch, queries, heads * head_dim).astype(q.dtype)


def embed(tokens, weight: Weight, dtype=jnp.float32):
    """tokens int32 [...] -> rows of the table [..., D]."""
    return kernels.take_rows(weight, tokens).astype(dtype)


def linear(x, weight: Weight, bias=None, backend: str | None = None):
    """x @ weight.T + bias, weight [out, in]."""
    y = kernels.matmul(x, weight, backend=backend)
    return y if bias is None else y + bias.astype(y.dtype)


def silu_mul(gate, up):
    """silu(gate) * up."""
    return jax.nn.silu(gate) * up


def cache_update(cache: Cache, k, v, positions) -> Cache:
    """Writes k, v [B, T, kv_heads*head_dim] into the slots positions[:, 0] ... + T-1 of each sequence."""

    def write(slots, new):  # [B, length, kv_heads, head_dim]
        new = new.astype(slots.dtype).reshape(*new.shape[:2], *slots.shape[2:])
        if new.shape[1] > 1:  # from the start
            return jax.lax.dynamic_update_slice_in_dim(slots, new, 0, axis=1)
        for b in range(slots.shape[0]):  # one slice a sequence: XLA's scatter on CPU is a slow loop
            slots = jax.lax.dynamic_update_slice(slots, new[b : b + 1], (b, positions[b, 0], 0, 0))
        return slots

    return write(cache[0], k), write(cache[1], v)


def run_block(block: Block, weights: Weights, x, positions, cache: dict[str, Cache] | None = None, embedding: Weight | None = None, backend: str | None = None):
    """Executes the nodes in order -> (value of the last one, new cache).

    x: the block's input. positions int32 [B, T]: where each token of x stands in its sequence. embedding: the weight that a linear with `tied_to` takes.
    cache: None, when x holds whole sequences, or `{node: (k, v)}` of the attention nodes. With a cache, x is one token of each sequence, which attends to
    the cache, or the beginning of the sequences (positions 0 to T-1), which attends to itself and fills the cache.
    """
    values = {"x": x}
    new_cache = {}
    for node in block.nodes:
        inputs = [values[name] for name in node.inputs]
        slots = weights.get(node.name, {})
        attrs = node.attrs
        match node.op:
            case "embed":
                value = embed(inputs[0], slots["weight"])
            case "rms_norm":
                value = rms_norm(inputs[0], slots["weight"].dequantize(), attrs["eps"], attrs.get("head_dim"))
            case "linear":
                bias = slots["bias"].dequantize() if "bias" in slots else None
                value = linear(inputs[0], slots.get("weight", embedding), bias, backend)
            case "rope":
                value = rope(inputs[0], positions, attrs["head_dim"], attrs["theta"], attrs["scaling"])
            case "attention":
                q, k, v = inputs
                key_positions = positions
                if cache is not None:
                    new_cache[node.name] = cache_update(cache[node.name], k, v, positions)
                    if x.shape[1] == 1:
                        k, v = new_cache[node.name]
                        key_positions = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
                value = attention(q, k, v, positions, key_positions, attrs["heads"], attrs["kv_heads"], attrs["head_dim"], attrs["window"])
            case "silu_mul":
                value = silu_mul(*inputs)
            case "add":
                value = inputs[0] + inputs[1]
            case "slice":
                value = inputs[0][..., attrs["start"] : attrs["stop"]]
            case _:
                raise ValueError(f"{block.full_name(node)}: op {node.op!r} has no implementation")
        values[node.name] = value
    return values[block.nodes[-1].name], new_cache
