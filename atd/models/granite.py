"""Multipliers of Granite (dense) as parts of weights.

transformers has a residual stream that begins with e E[token] and to which r times the outputs of
attention and MLP are added, scores a q k', and logits divided by l: e is `embedding_multiplier`, r
`residual_multiplier`, a `attention_multiplier`, l `logits_scaling`. The same function is that of

    embedding and head              E, as stored; the stream is divided by e
    norms that read the stream      eps / e^2
    o and down, biases too          times r / e
    q, its bias too                 times a sqrt(head_dim), with scores q k' / sqrt(head_dim)
    gain of the final norm          divided by l

Source: transformers 5.24, `models/granite/modeling_granite.py`.
"""

from atd.models.config import ModelConfig


def weight_factor(model: ModelConfig, tensor: str) -> float | None:
    """Returns what a stored weight is multiplied by; None where it stays."""
    module = tensor.rpartition(".")[0]
    if module == "model.norm":
        factor = 1 / model.logit_divisor
    elif module.endswith("self_attn.q_proj"):
        factor = model.query_scale
    elif module.endswith(("self_attn.o_proj", "mlp.down_proj")):
        factor = model.residual_scale / model.embedding_scale
    else:
        return None
    return None if factor == 1.0 else factor
