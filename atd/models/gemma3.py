"""Gains of Gemma 3 as those of plain RMS norms, and back.

With n(x) = x / sqrt(mean(x^2) + eps) and D the hidden size, transformers has norms n(x) (1 + w), a
residual stream that begins with sqrt(D) E[token], and scores q k' / sqrt(query_pre_attn_scalar).
Graphs have none of these: the same function is that of

    embedding and head              E, as stored; the stream is divided by sqrt(D)
    norms that read the stream      1 + w, with eps / D
    norms behind o and down         (1 + w) / sqrt(D)
    norm of q                       (1 + w) sqrt(head_dim / query_pre_attn_scalar)
    norm of k                       1 + w

Source: transformers 5.24, `models/gemma3/modeling_gemma3.py`.
"""

from atd.ir import WeightRef
from atd.ir.rewrite import map_array
from atd.models.config import GEMMA3, ModelConfig


def graph_gain(model: ModelConfig, ref: WeightRef) -> WeightRef:
    """Returns the gain that a graph has, (1 + w) times its factor in f32, of a stored w.

    Any weight but a gain, and any weight of another family, stays as it is.
    """
    if (factor := _factor(model, ref.tensor)) is None:
        return ref
    source = f"{ref.source} + 1, times {factor!r}" if ref.source else ""
    return map_array(ref, "f32", lambda stored: (1 + stored) * factor, source)


def stored_gain(model: ModelConfig, ref: WeightRef) -> WeightRef:
    """Returns the w that transformers has for the gain of a graph: the inverse of `graph_gain`."""
    if (factor := _factor(model, ref.tensor)) is None:
        return ref
    return map_array(ref, "f32", lambda gain: gain / factor - 1)


def _factor(model: ModelConfig, tensor: str) -> float | None:
    """What 1 + w is multiplied by; None where a weight is no gain of Gemma 3."""
    if model.model_type != GEMMA3 or not tensor.endswith("norm.weight"):
        return None
    if tensor.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
        return 1 / model.embedding_scale
    return model.query_scale if tensor.endswith("q_norm.weight") else 1.0
