"""Gains of Gemma 2 and 3 as those of plain RMS norms.

With n(x) = x / sqrt(mean(x^2) + eps) and D the hidden size, transformers has norms n(x) (1 + w), a
residual stream that begins with sqrt(D) E[token], and scores q k' / sqrt(query_pre_attn_scalar).
Graphs have none of these: the same function is that of

    embedding and head              E, as stored; the stream is divided by sqrt(D)
    norms that read the stream      1 + w, with eps / D
    norms behind o and down         (1 + w) / sqrt(D)
    norm of q (Gemma 3)             (1 + w) sqrt(head_dim / query_pre_attn_scalar)
    norm of k (Gemma 3)             1 + w

Gemma 2, which has no norm of q, has the attr `scale` in its attentions.

Source: transformers 5.24, `models/gemma2/modeling_gemma2.py`, `models/gemma3/modeling_gemma3.py`.
"""

from atd.models.config import ModelConfig


def gain_factor(model: ModelConfig, tensor: str) -> float | None:
    """Returns what 1 + w is multiplied by; None where a weight is no gain."""
    if not tensor.endswith("norm.weight"):
        return None
    if tensor.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
        return 1 / model.embedding_scale
    return model.query_scale if tensor.endswith("q_norm.weight") else 1.0
