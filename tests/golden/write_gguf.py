"""Writes a golden model as GGUF the way llama.cpp's convert_hf_to_gguf.py does: names, metadata,
order of rows.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.down_proj": "ffn_down",
}

# Where the names of an architecture differ.
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OTHER_NAMES = {
    "gemma2": GEMMA_NAMES,
    "gemma3_text": GEMMA_NAMES,
    "olmo2": GEMMA_NAMES,
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
}

TERNARY_CONFIG = {
    "model_type": "llama",
    "max_position_embeddings": 64,
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def gguf_name(name: str, family: str) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
        }[module] + f".{kind}"
    _, _, layer, module = module.split(".", 3)
    names = NAMES | OTHER_NAMES.get(family, {})
    return f"blk.{layer}.{names[module]}.{kind}"


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's LlamaModel.permute."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(
    path: Path, golden: str, quantization, metadata: dict | None = None
) -> dict[str, np.ndarray]:
    """The golden model as llama.cpp's converter writes it, matrices so quantized; returns the
    original tensors.
    """
    config = json.loads((GOLDEN / golden / "config.json").read_text())
    tensors = load_file(GOLDEN / golden / "model.safetensors")
    write_model(path, config, tensors, quantization, metadata)
    return tensors


def write_model(
    path: Path,
    config: dict,
    tensors: dict,
    quantization,
    metadata: dict | None = None,
    architecture: str = "",
    **split,
) -> None:
    """A model of Hugging Face's names as llama.cpp's converter writes it, matrices so quantized;
    `split` are options of GGUFWriter.
    """
    family = config["model_type"]
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    default = "gemma3" if family == "gemma3_text" else family
    writer = gguf.GGUFWriter(path, architecture or default, **split)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(config.get("rope_theta", 1e4))
    writer.add_token_list([f"token {i}" for i in range(2000)])  # longer than what the reader keeps
    writer.add_bos_token_id(1)
    if family == "phi3":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_dimension_count(int(config["partial_rotary_factor"] * config["head_dim"]))
        add_longrope(writer, config)
    if family == "granite":
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if family == "gemma2":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if family == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])
        windowed = config["sliding_window_pattern"]
        pattern = [(i + 1) % windowed > 0 for i in range(config["num_hidden_layers"])]
        writer.add_sliding_window_pattern(pattern)
        writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
    if "linear" in scaling.values():
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    if scaling.get("rope_type") == "llama3":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_tensor(
            "rope_freqs.weight",
            llama3_divisors(
                scaling,
                config["rope_theta"],
                config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
            ),
        )
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, array in tensors.items():
        if family in ("llama", "smollm3", "granite") and ("q_proj" in name or "k_proj" in name):
            array = permuted(
                array, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            )
        if family in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
            array = array + 1
        if array.ndim == 2 and quantization != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(
                gguf_name(name, family),
                gguf.quants.quantize(array, quantization),
                raw_dtype=quantization,
            )
        else:
            writer.add_tensor(gguf_name(name, family), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_longrope(writer: gguf.GGUFWriter, config: dict) -> None:
    """As in llama.cpp's converter of Phi-3."""
    scaling, original = config["rope_scaling"], config["original_max_position_embeddings"]
    grown = config["max_position_embeddings"] / original
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(grown) / np.log(original))))
    for kind in ("short", "long"):
        factors = np.array(scaling[f"{kind}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{kind}.weight", factors)


def llama3_divisors(scaling: dict, theta: float, head_dim: int) -> np.ndarray:
    """As in llama.cpp's convert_hf_to_gguf.py."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    divisors = []
    for wavelength in 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim):
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def ternary_model() -> dict[str, np.ndarray]:
    """A model whose linears have a scale and a trit for each weight, in blocks of 256."""
    random = np.random.default_rng(0)

    def ternary(out: int, inputs: int) -> np.ndarray:
        scales = random.uniform(0.01, 0.03, (out, inputs // 256)).astype(np.float16)
        trits = random.integers(-1, 2, (out, inputs))
        return (trits * np.repeat(scales, 256, axis=1)).astype(np.float32)

    layer = "model.layers.0"
    return {
        "model.embed_tokens.weight": random.normal(size=(32, 256)).astype(np.float32),
        "model.norm.weight": np.ones(256, np.float32),
        f"{layer}.input_layernorm.weight": np.ones(256, np.float32),
        f"{layer}.post_attention_layernorm.weight": np.ones(256, np.float32),
        f"{layer}.self_attn.q_proj.weight": ternary(256, 256),
        f"{layer}.self_attn.k_proj.weight": ternary(128, 256),
        f"{layer}.self_attn.v_proj.weight": ternary(128, 256),
        f"{layer}.self_attn.o_proj.weight": ternary(256, 256),
        f"{layer}.mlp.gate_proj.weight": ternary(512, 256),
        f"{layer}.mlp.up_proj.weight": ternary(512, 256),
        f"{layer}.mlp.down_proj.weight": ternary(256, 512),
    }
