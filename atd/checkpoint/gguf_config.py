"""The metadata of a GGUF file as a config.json.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atd.checkpoint.gguf_header import GGUFTensor
from atd.checkpoint.gguf_rope import gguf_rope_scaling
from atd.errors import BadInput

# Architecture -> (architectures, model_type) of config.json.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "granite": ("GraniteForCausalLM", "granite"),
    "olmo2": ("Olmo2ForCausalLM", "olmo2"),
    "bitnet": ("BitNetForCausalLM", "bitnet"),
    "bitnet-b1.58": ("BitNetForCausalLM", "bitnet"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
# Embedding length, blocks and feed forward length of bitnet-b1.58-2B-4T.
_BITNET_2B_4T = (2560, 30, 6912)
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # its number of layers, by which llama.cpp knows it


def check_architecture(path: Path, metadata: Mapping[str, Any]) -> str:
    """Returns the architecture of a GGUF file; raises BadInput where it is not supported."""
    architecture = metadata.get("general.architecture", "")
    if architecture not in ARCHITECTURES:
        raise BadInput(
            f"{path}: the GGUF architecture {architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return architecture


def gguf_config(
    path: Path,
    metadata: Mapping[str, Any],
    entries: Mapping[str, GGUFTensor],
    read: Callable[[GGUFTensor], np.ndarray],
) -> dict:
    """Returns what config.json says of the model of a GGUF file.

    Args:
        path: what messages name.
        metadata, entries: its header.
        read: returns the values of a tensor.

    Raises:
        BadInput: the model is not supported, or its metadata contradict themselves.
    """
    architecture = check_architecture(path, metadata)

    def get(key: str, default=None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise BadInput(f"{path}: its metadata has no {architecture}.{key}")
        if isinstance(value, list):  # one value per layer
            if len(set(value)) != 1:
                raise BadInput(
                    f"{path}: {architecture}.{key} differs between layers ({value}), "
                    "which is not supported"
                )
            value = value[0]
        # 9.999999747378752e-06 is the float32 of 1e-05: keep the short one
        with np.errstate(over="ignore"):
            return float(str(np.float32(value))) if isinstance(value, float) else value

    if "token_embd.weight" not in entries:
        raise BadInput(f"{path}: it has no tensor token_embd.weight")
    if get("expert_count", 0):
        raise BadInput(
            f"{path}: a mixture of {get('expert_count')} experts, which is not supported; "
            "dense models are"
        )
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", hidden // heads)
    if architecture == "olmo2" and get("attention.sliding_window", 0):
        raise BadInput(f"{path}: OLMo 3 (olmo2.attention.sliding_window) is not supported")
    rotary = get("rope.dimension_count", head_dim)
    equal = (
        "attention.value_length",
        *(() if architecture == "phi3" else ("rope.dimension_count",)),
    )
    for key in equal:
        if get(key, head_dim) != head_dim:
            raise BadInput(
                f"{path}: {architecture}.{key} is {get(key)}, the head dimension {head_dim}; "
                f"a difference is not supported"
            )
    theta = get("rope.freq_base", 10000.0)
    is_gemma = architecture in _GEMMA_27B
    tokens = {
        f"{kind}_token_id": metadata.get(f"tokenizer.ggml.{kind}_token_id")
        for kind in ("bos", "eos")
    }
    name, family = ARCHITECTURES[architecture]
    sizes = hidden, get("block_count"), get("feed_forward_length")
    return {
        "architectures": [name],
        "model_type": family,
        "hidden_act": _hidden_act(architecture, sizes),
        "vocab_size": entries["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": sizes[2],
        "num_hidden_layers": sizes[1],
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": gguf_rope_scaling(path, entries, get, theta, rotary, read),
        "tie_word_embeddings": "output.weight" not in entries,
        "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in entries,
        "mlp_bias": "blk.0.ffn_gate.bias" in entries,
        "use_sliding_window": False,
        "torch_dtype": "float16",
        **{key: value for key, value in tokens.items() if value is not None},
        **(_phi3_config(get, head_dim, rotary) if architecture == "phi3" else {}),
        **(_granite_config(path, get, head_dim) if architecture == "granite" else {}),
        **(_gemma_config(path, metadata, get, sizes, heads, head_dim) if is_gemma else {}),
    }


def _hidden_act(architecture: str, sizes: tuple[int, int, int]) -> str:
    """The activation of the gate, which no key of a GGUF file says.

    llama.cpp computes silu in its architecture bitnet (src/models/bitnet.cpp, LLM_FFN_SILU), as the
    models of 1bitLLM have it, and bitnet.cpp relu2 in bitnet-b1.58 (LLM_FFN_RELU_SQR). llama.cpp's
    converter writes 2B-4T, which was trained with relu2, as bitnet too: that model, known by its
    sizes, gets the activation that it was trained with.
    """
    relu2 = architecture == "bitnet-b1.58" or (architecture == "bitnet" and sizes == _BITNET_2B_4T)
    return "relu2" if relu2 else "silu"


def _phi3_config(get: Callable, head_dim: int, rotary: int) -> dict:
    """What config.json says of Phi-3 besides."""
    original = get("rope.scaling.original_context_length", get("context_length"))
    return {
        "partial_rotary_factor": rotary / head_dim,
        "original_max_position_embeddings": original,
        "sliding_window": get("attention.sliding_window", 0) or None,
    }


def _granite_config(path: Path, get: Callable, head_dim: int) -> dict:
    """The multipliers of Granite, which llama.cpp takes for absent where they are 0."""
    if not get("rope.scaling.finetuned", True):
        raise BadInput(
            f"{path}: granite.rope.scaling.finetuned is false: no rope, which is not supported"
        )
    return {
        "embedding_multiplier": get("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": get("residual_scale", 0.0) or 1.0,
        "attention_multiplier": get("attention.scale", 0.0) or head_dim**-0.5,
        "logits_scaling": get("logit_scale"),
    }


def _gemma_config(
    path: Path,
    metadata: Mapping[str, Any],
    get: Callable,
    sizes: tuple[int, int, int],
    heads: int,
    head_dim: int,
) -> dict:
    """What config.json says of Gemma 2 and 3 besides, with the defaults of src/models/gemma2.cpp
    and gemma3.cpp.
    """
    hidden, layers, _ = sizes
    architecture = metadata["general.architecture"]
    newer = architecture == "gemma3"
    if newer and get("final_logit_softcapping", 0.0):
        raise BadInput(f"{path}: gemma3.final_logit_softcapping is not supported")
    window = get("attention.sliding_window", 0 if newer else 4096)
    key = f"{architecture}.attention.sliding_window_pattern"
    pattern = metadata.get(key, 6 if newer else 2)
    if not isinstance(pattern, list):  # one in so many layers sees all of the past
        pattern = [pattern == 0 or (i + 1) % pattern > 0 for i in range(layers)]
    if len(pattern) < layers:
        raise BadInput(f"{path}: {key} has {len(pattern)} values for {layers} layers")
    kinds = ("full_attention", "sliding_attention")
    is_27b = layers == _GEMMA_27B[architecture]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if is_27b else head_dim,
        "sliding_window": window or None,
        "layer_types": [kinds[bool(windowed) and window > 0] for windowed in pattern[:layers]],
        **(
            {"rope_local_base_freq": get("rope.freq_base_swa", 10000.0)}
            if newer
            else {
                "attn_logit_softcapping": get("attn_logit_softcapping", 50.0) or None,
                "final_logit_softcapping": get("final_logit_softcapping", 30.0) or None,
            }
        ),
    }
