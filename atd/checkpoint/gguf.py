"""Reads GGUF files as Hugging Face checkpoints: names, config and values in their conventions.

Architectures: llama, qwen2. A quantized tensor is what `gguf.quants.dequantize` returns, rounded to
float16; F32, F16 and BF16 stay what they are. In the llama architecture the rows of q and k lie in
interleaved pairs, (0, d/2, 1, d/2+1, ...) of each head; here they are put back in the halves of
Hugging Face.
"""

import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from atd.checkpoint.files import StoredTensor, read_bytes
from atd.checkpoint.gguf_header import PLAIN, GGUFTensor, read_header
from atd.errors import BadInput
from atd.weights import DTYPES

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CHUNK = 1 << 24  # weights dequantized at a time: their float32 values take 64 MB


def open_gguf(path: Path) -> tuple[dict, dict[str, StoredTensor]]:
    """Reads a GGUF file: (config as in config.json, tensors by Hugging Face name).

    Raises BadInput for a file or a model that cannot be used.
    """
    metadata, entries = read_header(path)
    for entry in entries.values():
        _check_dequantizes(path, entry)
    try:
        config = _config(path, metadata, entries)
    except (TypeError, ZeroDivisionError) as error:
        raise BadInput(f"{path}: a value of its metadata has the wrong type: {error}") from None
    permuted = {}
    if config["model_type"] == "llama":
        permuted = {
            "self_attn.q_proj": config["num_attention_heads"],
            "self_attn.k_proj": config["num_key_value_heads"],
        }
    tensors = {}
    for name, entry in entries.items():
        if name == "rope_freqs.weight":
            continue  # is config["rope_scaling"] now
        name = _hugging_face_name(name)
        heads = next((heads for module, heads in permuted.items() if module in name), None)
        place, load = f"{entry.name}@{entry.offset}", _loader(path, entry, heads)
        tensors[name] = StoredTensor(name, entry.shape, _dtype(entry), path, place, load)
    return config, tensors


def _hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; unknown names stay."""
    match = re.fullmatch(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)", name)
    if match is None or match["module"] not in _MODULES:
        return name
    prefix = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{prefix}{_MODULES[match['module']]}.{match['kind']}"


# --- values ---------------------------------------------------------------------------------------


def _check_dequantizes(path: Path, entry: GGUFTensor) -> None:
    if entry.quantization not in PLAIN and not _dequantizes(entry.quantization):
        raise BadInput(
            f"{path}: tensor {entry.name} is {entry.quantization.name}, "
            "which the package gguf does not dequantize"
        )


@cache
def _dequantizes(quantization: GGMLQuantizationType) -> bool:
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[quantization][1]), np.uint8), quantization)
    except NotImplementedError:
        return False
    return True


def _dtype(entry: GGUFTensor) -> str:
    return PLAIN.get(entry.quantization, "f16")


def _loader(path: Path, entry: GGUFTensor, heads: int | None) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        values = _read(path, entry)
        return values if heads is None else halves(values, heads)

    return load


def _read(path: Path, entry: GGUFTensor) -> np.ndarray:
    """The values [*entry.shape] of _dtype(entry), dequantized a few rows at a time."""
    raw = np.frombuffer(read_bytes(path, entry.offset, entry.nbytes), np.uint8)  # [nbytes]
    if raw.size < entry.nbytes:
        raise BadInput(f"{path}: tensor {entry.name} cannot be read: the file became shorter")
    if entry.quantization in PLAIN:
        return raw.view(DTYPES[_dtype(entry)]).reshape(entry.shape)
    inputs = entry.shape[-1]
    raw = raw.reshape(math.prod(entry.shape[:-1]), -1)  # [rows, bytes per row]
    values = np.empty((raw.shape[0], inputs), np.float16)
    rows = max(1, _CHUNK // inputs)
    for row in range(0, raw.shape[0], rows):
        # What float16 cannot hold becomes Inf, and Inf times 0 NaN: the converter refuses both.
        with np.errstate(over="ignore", invalid="ignore"):
            values[row : row + rows] = quants.dequantize(raw[row : row + rows], entry.quantization)
    return values.reshape(entry.shape)


def halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head, llama.cpp's pairs x0 y0 x1 y1 ... to halves x0 x1 ... y0 y1.

    Args:
      values: [heads * head_dim, ...].
      heads: their number.
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


# --- config ---------------------------------------------------------------------------------------


def _config(path: Path, metadata: dict[str, Any], entries: dict[str, GGUFTensor]) -> dict:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise BadInput(
            f"{path}: the GGUF architecture {architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    if metadata.get("split.count", 1) > 1:
        raise BadInput(
            f"{path}: one part of a split GGUF file; "
            "join the parts with llama-gguf-split --merge first"
        )

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
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise BadInput(
                f"{path}: {architecture}.{key} is {get(key)}, the head dimension {head_dim}; "
                f"a difference is not supported"
            )
    theta = get("rope.freq_base", 10000.0)
    tokens = {
        f"{kind}_token_id": metadata.get(f"tokenizer.ggml.{kind}_token_id")
        for kind in ("bos", "eos")
    }
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "vocab_size": entries["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(path, metadata, entries, get, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in entries,
        "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in entries,
        "mlp_bias": "blk.0.ffn_gate.bias" in entries,
        "use_sliding_window": False,
        "torch_dtype": "float16",
        **{key: value for key, value in tokens.items() if value is not None},
    }


def _rope_scaling(
    path: Path,
    metadata: dict,
    entries: dict[str, GGUFTensor],
    get: Callable,
    theta: float,
    head_dim: int,
) -> dict | None:
    kind = get("rope.scaling.type", "none")
    legacy = get("rope.scale_linear", 1.0)  # in files that have no rope.scaling.*
    factor = get("rope.scaling.factor", legacy)
    if kind not in ("none", "linear"):
        raise BadInput(
            f"{path}: rope scaling {kind!r} is not supported; "
            f"supported: none, linear, and llama3 (tensor rope_freqs.weight)"
        )
    if "rope_freqs.weight" in entries:
        divisors = _read(path, entries["rope_freqs.weight"]).astype(np.float64)
        return _llama3_scaling(
            path, divisors, get("rope.scaling.original_context_length", 8192), theta, head_dim
        )
    if kind == "linear" or legacy != 1.0:
        return {"rope_type": "linear", "factor": factor}
    return None


def _llama3_scaling(
    path: Path, divisors: np.ndarray, original: int, theta: float, head_dim: int
) -> dict:
    """The `llama3` rope scaling that the divisors of the frequencies [head_dim/2] come from.

    With c = original context / wavelength and Meta's low and high factors of 1 and 4: 1/divisor =
    (1 - s)/factor + s, where s = (c - 1)/(4 - 1), cut to 0..1. Raises BadInput for other divisors.
    """
    low, high = 1.0, 4.0
    factor = float(np.max(divisors)) if divisors.size else 1.0
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise BadInput(
            f"{path}: the divisors in rope_freqs.weight are not those of llama3 rope scaling "
            f"(low 1, high 4, original context {original}); other scalings are not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
