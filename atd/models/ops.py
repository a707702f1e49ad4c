"""The reference of every op of `atd.ir.OPS`, in jax.numpy; `atd.models.execute` runs units of them.

Values are [B, T, features] (token ids [B, T] in the prologue). Heads lie side by side in the
features. Normalization, rotary angles and softmax are computed in float32, whatever the dtype of
the values, as Hugging Face transformers does.

A cache of an attention node is (k, v), each [B, kv_heads, length, head_dim]; the key of position t
lies in place t. In 8 bits it is (k, v, scales of k, scales of v): codes int8, and a scale float32
[B, kv_heads, length] per KV head and position (`codes_of`). Places that hold no position yet, or
the padding of a prompt, are never attended to: a query at position t sees places 0 ... t, and each
of these has been written by then.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atd.decomposition.rotations import sylvester
from atd.ir import INT8, Node
from atd.kernels import matmul as kernels
from atd.models.rope import rope
from atd.weights import Dense, Weight

Cache = tuple[jax.Array, ...]
Weights = dict[str, dict[str, Weight]]  # node name -> slot -> weight

QUERIES, RUNS = 128, 16  # of whole sequences: least queries per run, most runs


def from_start(x) -> jax.Array:
    """Returns positions 0 ... T-1 of x [B, T, ...], int32 [B, T]."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def rms_norm(x, gain, eps: float, head_dim: int | None = None, over: str | None = None):
    """Returns x / sqrt(mean(x^2) + eps) * gain, the mean over the last axis.

    Args:
        x: float [..., features].
        gain: float [features], or [head_dim].
        eps: added to the mean square.
        head_dim: normalizes each run of this many features by itself (Qwen3's q and k).
        over: axis of the mesh whose devices have equal shares of the features.
    """
    width = head_dim or x.shape[-1]
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, width)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt((jax.lax.pmean(mean, over) if over else mean) + eps)
    return (normed.astype(x.dtype) * gain.astype(x.dtype)).reshape(x.shape)


def attention(
    q,
    k,
    v,
    positions,
    window: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    scales: Sequence[jax.Array] = (),
):
    """Returns causal softmax(scale q k') v, heads / kv_heads query heads per key head.

    A query at position t sees the keys at positions s <= t, and with a window only s > t - window.
    Scales of keys multiply the scores, and those of values the weights of the softmax, so that no
    keys or values exist but as codes.

    Args:
        q: float [B, T, heads, head_dim].
        k, v: float [B, kv_heads, S, head_dim]; the key of position s lies in place s.
        positions: int32 [B, T] of the queries.
        window: positions that are seen, the query's own included; 0: all.
        scale: of the scores; None: 1 / sqrt(head_dim).
        softcap: bound of the scores, cap tanh(scores / cap) before the softmax; None: there is
            none.
        scales: of k and of v, float32 [B, kv_heads, S] each, where these are codes.

    Returns:
        float [B, T, heads, head_dim].
    """
    batch, queries, heads, head_dim = q.shape
    q = q.reshape(batch, queries, k.shape[1], -1, head_dim)  # [B, T, kv_heads, group, head_dim]
    distance = positions[:, :, None] - jnp.arange(k.shape[2], dtype=jnp.int32)  # [B, T, S]
    seen = (distance >= 0) & (distance < window) if window else distance >= 0

    k_scales, v_scales = (x[:, :, None, None] for x in scales) if scales else (None, None)

    def softmax(scores):  # [B, kv_heads, group, T, S]
        scores = scores if k_scales is None else scores * k_scales
        scores = scores / math.sqrt(head_dim) if scale is None else scores * scale
        scores = capped(scores, softcap) if softcap else scores
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
        return weights if v_scales is None else weights * v_scales

    if queries > 1:
        # Heads of a group and their queries are one dimension m of products: on a CPU twice as
        # fast.
        apart = q.transpose(0, 2, 3, 1, 4)  # [B, kv_heads, group, T, head_dim]
        joined = apart.reshape(*k.shape[:2], -1, head_dim)  # [B, kv_heads, group * T, head_dim]
        scores = jnp.einsum("bkmd,bksd->bkms", joined, k, preferred_element_type=jnp.float32)
        weights = softmax(scores.reshape(*apart.shape[:-1], -1)).reshape(scores.shape)
        mixed = jnp.einsum("bkms,bksd->bkmd", weights, v, preferred_element_type=jnp.float32)
        mixed = mixed.reshape(apart.shape)  # [B, kv_heads, group, T, head_dim]
        mixed = mixed.transpose(0, 3, 1, 2, 4)  # [B, T, kv_heads, group, head_dim]
    else:  # products and sums that XLA fuses: on CPU four times faster than its dot for so few rows
        single = q[:, 0, :, :, None].astype(jnp.float32)  # [B, kv_heads, group, 1, head_dim]
        weights = softmax(jnp.sum(single * k[:, :, None], axis=-1)[:, :, :, None])
        weighted = weights[:, :, :, 0, :, None] * v[:, :, None]
        mixed = jnp.sum(weighted, axis=-2)  # [B, kv_heads, group, head_dim]
    return mixed.reshape(batch, queries, heads, head_dim).astype(q.dtype)


def sequence_attention(
    q,
    k,
    v,
    positions,
    window: int = 0,
    whole: bool = True,
    scales: Sequence[jax.Array] = (),
    **options,
):
    """Returns `attention` run by run of queries; of whole sequences each over the keys it may see.

    Half of the products are never made, and the scores of a run stay in a CPU's cache: at T = 512
    that is 3 to 4 times faster there. A run has QUERIES queries, or more where there would be more
    than RUNS of them, because each is compiled by itself. Runs over all keys are turns of a loop
    where they are of one length, so that the scores of one alone are in memory.

    Args:
        q, k, v, positions, window, scales: as in `attention`.
        whole: positions are 0 ... T-1, and there are T keys.
        options: scale and softcap of `attention`.
    """
    queries = q.shape[1]
    if not whole and queries % QUERIES == 0:

        def runs_of(x):  # [B, T, ...] -> [runs, B, QUERIES, ...]
            return x.reshape(x.shape[0], -1, QUERIES, *x.shape[2:]).swapaxes(0, 1)

        def run(parts):
            return attention(parts[0], k, v, parts[1], window, scales=scales, **options)

        mixed = jax.lax.map(run, (runs_of(q), runs_of(positions)))
        return mixed.swapaxes(0, 1).reshape(q.shape)
    step = max(QUERIES, -(-queries // RUNS))
    runs = [slice(start, min(start + step, queries)) for start in range(0, queries, step)]
    keys = [r.stop if whole else k.shape[2] for r in runs]

    def part(r: slice, stop: int):
        mine = [x[:, :, :stop] for x in scales]
        to = k[:, :, :stop], v[:, :, :stop], positions[:, r], window
        return attention(q[:, r], *to, scales=mine, **options)

    return jnp.concatenate(list(map(part, runs, keys)), axis=1)


def embed(tokens, weight: Weight, dtype=jnp.float32, over: str | None = None):
    """Returns the embeddings [..., D] of tokens int32 [...]: rows of the weight [V, D].

    over: axis of the mesh whose devices have V rows each, in their order. Of the tokens of others
    there are zeros.
    """
    if over is None:
        return kernels.take_rows(weight, tokens).astype(dtype)
    count = weight.type.shape[0]
    rows = tokens - count * jax.lax.axis_index(over)
    mine = (rows >= 0) & (rows < count)
    taken = kernels.take_rows(weight, jnp.where(mine, rows, 0))
    return jnp.where(mine[..., None], taken, 0).astype(dtype)


def reads_int8(node: Node) -> bool:
    """Returns whether a linear rounds its input to 8 bits per token: `kernels.rounded`."""
    return node.attrs.get("activations") == INT8


def linear(x, weight: Weight, bias=None, backend: str | None = None, int8: bool = False):
    """Returns x W' + b.

    Args:
        x: float [..., in].
        weight: W [out, in].
        bias: b float [out].
        backend: of `atd.kernels.matmul`, for weights that are not dense.
        int8: whether x is rounded to 8 bits per token.
    """
    y = kernels.matmul(x, weight, int8=int8, backend=None if isinstance(weight, Dense) else backend)
    return y if bias is None else y + bias.astype(y.dtype)


def silu_mul(gate, up):
    """Returns silu(gate) * up."""
    return jax.nn.silu(gate) * up


def relu2_mul(gate, up):
    """Returns max(gate, 0)^2 * up."""
    return jnp.square(jax.nn.relu(gate)) * up


def gelu_mul(gate, up):
    """Returns gelu(gate) * up, gelu(x) = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    return jax.nn.gelu(gate, approximate=True) * up


def capped(x, cap: float):
    """Returns cap tanh(x / cap), which lies between -cap and cap."""
    return cap * jnp.tanh(x / cap)


def hadamard(x, block: int):
    """Returns each run of `block` features times H / sqrt(block), H Sylvester's Hadamard matrix.

    H = H_a x H_b, the Kronecker product, is two products: 2 (a + b) operations per feature, where
    block = a b. The matrix over sqrt(block) is orthogonal and symmetric, so that it is its own
    inverse.

    Args:
        x: float [..., features].
        block: a power of two that divides the features.
    """
    b = 1 << (block.bit_length() - 1) // 2
    a = block // b
    right = sylvester(b).astype(np.float32) * np.float32(block**-0.5)
    runs = x.astype(jnp.float32).reshape(-1, b)
    runs = jnp.matmul(runs, right, precision=jax.lax.Precision.HIGHEST).reshape(-1, a, b)
    left = sylvester(a).astype(np.float32)
    mixed = jnp.matmul(left, runs, precision=jax.lax.Precision.HIGHEST)
    return mixed.reshape(x.shape).astype(x.dtype)


def in_8_bits(k, v) -> Cache:
    """Returns k, v [B, kv_heads, T, head_dim] as a cache in 8 bits of T places."""
    (k, k_scales), (v, v_scales) = codes_of(k), codes_of(v)
    return k, v, k_scales, v_scales


def codes_of(x) -> tuple[jax.Array, jax.Array]:
    """Returns x as (codes, scales), x about codes * scales:

        scales = max |x| / 127,   codes = round(x / scales)

    with the maximum over the last axis, and halves rounded to even; codes of zeros are zeros.

    Args:
        x: float [..., features].

    Returns:
        Codes int8 [..., features] from -127 to 127, and scales float32 [...].
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    inverse = jnp.where(largest > 0, 127 / largest, 0)
    codes = jnp.round(wide * inverse[..., None])
    return codes.astype(jnp.int8), largest / 127


def update_cache(cache: Cache, k, v, positions) -> Cache:
    """Writes k, v [B, kv_heads, T, head_dim] into places positions[:, 0] ... + T - 1 of a cache."""

    def write(places, new, start):  # [kv_heads, length, ...], [kv_heads, T, ...], []
        return jax.lax.dynamic_update_slice_in_dim(places, new.astype(places.dtype), start, axis=1)

    new = (k, v) if len(cache) == 2 else in_8_bits(k, v)
    return tuple(
        jax.vmap(write)(*places, positions[:, 0]) for places in zip(cache, new, strict=True)
    )


def run_node(
    node: Node,
    inputs: Sequence[jax.Array],
    weights: dict[str, Weight],
    positions: jax.Array | None = None,
    cache: Cache | None = None,
    embedding: Weight | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Executes one node.

    Args:
        inputs: the values that it reads, [B, T, features] each (token ids [B, T] of an embed).
        weights: by slot.
        positions: int32 [B, T], where each token stands in its sequence; None: 0 ... T-1.
        cache: of an attention; with positions the tokens go on from it, without them they are the
            beginning of the sequences. Of a rope: that of an attention of its block, whose length
            says how many positions there can be. None: the sequences are whole.
        embedding: the weight of a linear with `tied_to`.
        backend: of `atd.kernels.matmul`, for weights that are not dense.

    Returns:
        Its value, and its new cache if it had one.
    """
    attrs, begins = node.attrs, positions is None
    positions = from_start(inputs[0]) if positions is None else positions
    match node.op:
        case "embed":
            return embed(inputs[0], weights["weight"], over=attrs.get("over")), None
        case "rms_norm":
            gain = weights["weight"].dequantize()
            options = attrs["eps"], attrs.get("head_dim"), attrs.get("over")
            return rms_norm(inputs[0], gain, *options), None
        case "linear":
            weight = weights.get("weight") or embedding
            assert weight is not None, f"{node.name} is tied to an embedding that was not given"
            bias = weights["bias"].dequantize() if "bias" in weights else None
            return linear(inputs[0], weight, bias, backend, reads_int8(node)), None
        case "rope":
            options = attrs["head_dim"], attrs["theta"], attrs["scaling"], attrs.get("rotary")
            length = inputs[0].shape[1] if cache is None else cache[0].shape[2]
            return rope(inputs[0], positions, *options, length), None
        case "attention":
            # [B, T, heads, head_dim] each
            q, k, v = (a.reshape(*a.shape[:2], -1, attrs["head_dim"]) for a in inputs)
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, kv_heads, T, head_dim]
            seen: Cache = in_8_bits(k, v) if attrs.get("kv") == INT8 else (k, v)
            if cache is not None:
                cache = update_cache(cache, k, v, positions)
                seen = seen if begins else cache
            k, v, *scales = seen
            options = {key: attrs[key] for key in ("scale", "softcap") if key in attrs}
            options |= {"window": attrs["window"], "whole": begins, "scales": scales}
            mixed = sequence_attention(q, k, v, positions, **options)
            return mixed.reshape(inputs[0].shape), cache
        case "silu_mul":
            return silu_mul(*inputs), None
        case "relu2_mul":
            return relu2_mul(*inputs), None
        case "gelu_mul":
            return gelu_mul(*inputs), None
        case "hadamard":
            return hadamard(inputs[0], attrs["block"]), None
        case "softcap":
            return capped(inputs[0], attrs["cap"]), None
        case "add":
            return inputs[0] + inputs[1], None
        case "all_sum":
            return jax.lax.psum(inputs[0], attrs["over"]), None
        case "all_gather":
            axis = inputs[0].ndim - 1
            return jax.lax.all_gather(inputs[0], attrs["over"], axis=axis, tiled=True), None
        case "rounded":
            return kernels.rounded(inputs[0], attrs["over"]), None
        case "share":
            width = inputs[0].shape[-1] // jax.lax.axis_size(attrs["over"])
            start = jax.lax.axis_index(attrs["over"]) * width
            return jax.lax.dynamic_slice_in_dim(inputs[0], start, width, inputs[0].ndim - 1), None
        case "slice":
            return inputs[0][..., attrs["start"] : attrs["stop"]], None
    raise ValueError(f"{node.name}: op {node.op!r} has no implementation")
