"""Reads GGUF files as Hugging Face checkpoints: names, config and values in their conventions.

Architectures: those of `atd.checkpoint.gguf_config`. A matrix in TQ1_0 or TQ2_0 stays ternary: one
base, a scale for each 256 inputs. Any other quantized tensor is what `gguf.quants.dequantize`
returns, rounded to float16; F32, F16 and BF16 stay what they are. In files that atd wrote, Q4_0,
Q5_0 and Q8_0 become float32, which holds them exactly. In the llama architecture the rows of q and
k lie in interleaved pairs, (0, d/2, 1, d/2+1, ...) of each head; here they are put back in the
halves of Hugging Face.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from atd.checkpoint.files import StoredTensor, read_bytes
from atd.checkpoint.gguf_config import gguf_config
from atd.checkpoint.gguf_header import OWN, PLAIN, GGUFTensor
from atd.checkpoint.gguf_parts import read_parts
from atd.checkpoint.gguf_rope import DIVISORS, LONG, SHORT
from atd.errors import BadInput
from atd.weights import DTYPES, PackedType, TernaryType, WeightType, canonical_group, stored
from atd.weights.ggml import Q4_0, Q5_0, Q8_0, TERNARY_BLOCK, TQ1_0, TQ2_0, ternary_parts
from atd.weights.layouts import DEFAULT_LAYOUT, LAYOUTS

MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "ffn_down": "mlp.down_proj",
}
_GEMMAS = ("gemma2", "gemma3")
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Where an architecture has other modules under a name, or further ones.
_OTHER_MODULES = {
    "olmo2": _POST_NORMS,
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    **dict.fromkeys(_GEMMAS, _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}),
}
_OF_ROPE = (DIVISORS, SHORT, LONG)  # tensors that are config["rope_scaling"] now
_PERMUTED = ("llama", "mistral", "smollm3", "granite")
_CHUNK = 1 << 24  # weights dequantized at a time: their float32 values take 64 MB


def open_gguf(path: Path) -> tuple[dict, dict[str, StoredTensor], dict[str, WeightType]]:
    """Reads a GGUF file, or all parts of one.

    Returns:
        Config as in config.json; tensors by Hugging Face name; types of those weights that are not
        dense, whose parts are among the tensors under the names of `atd.weights.stored`.

    Raises:
        BadInput: a file or a model cannot be used.
    """
    metadata, entries = read_parts(path)
    for entry in entries.values():
        _check_readable(entry)
    try:
        config = gguf_config(path, metadata, entries, _values)
    except (TypeError, ZeroDivisionError) as error:
        raise BadInput(f"{path}: a value of its metadata has the wrong type: {error}") from None
    heads = permuted_heads(config)
    exact = OWN in metadata
    architecture = metadata["general.architecture"]
    modules = MODULES | _OTHER_MODULES.get(architecture, {})
    tensors, types = {}, {}
    for entry in entries.values():
        if entry.name in _OF_ROPE:
            continue
        name = _hugging_face_name(entry.name, modules)
        order = next((partial(halves, heads=n) for part, n in heads.items() if part in name), None)
        if architecture in _GEMMAS and name.endswith("norm.weight"):
            order = _without_one
        if type := _ternary_type(entry):
            types[name] = type
            tensors |= {t.name: t for t in _ternary_tensors(name, type, entry, order)}
        else:
            dtype = _dtype(entry, exact)
            load = _loader(partial(_read, entry, dtype), order)
            tensors[name] = _stored(name, entry.shape, dtype, entry, load)
    return config, tensors, types


def permuted_heads(config: dict) -> dict[str, int]:
    """Returns the modules whose rows llama.cpp has in interleaved pairs, with their numbers of
    heads."""
    if config["model_type"] not in _PERMUTED:
        return {}
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}


def _hugging_face_name(name: str, modules: Mapping[str, str]) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; unknown names stay."""
    match = re.fullmatch(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)", name)
    if match is None or match["module"] not in modules:
        return name
    prefix = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{prefix}{modules[match['module']]}.{match['kind']}"


# --- values ---------------------------------------------------------------------------------------

Order = Callable[[np.ndarray], np.ndarray]  # puts values in Hugging Face's conventions


def _check_readable(entry: GGUFTensor) -> None:
    if entry.quantization not in PLAIN and not _dequantizes(entry.quantization):
        raise BadInput(
            f"{entry.file}: tensor {entry.name} is {entry.quantization.name}, "
            "which the package gguf does not dequantize"
        )
    if entry.name.endswith(".scale"):
        raise BadInput(
            f"{entry.file}: tensor {entry.name} is a factor of all outputs of a matrix, which is "
            "not supported; use the model's Hugging Face folder"
        )


@cache
def _dequantizes(quantization: GGMLQuantizationType) -> bool:
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[quantization][1]), np.uint8), quantization)
    except NotImplementedError:
        return False
    return True


def _dtype(entry: GGUFTensor, exact: bool) -> str:
    """The dtype of a tensor's values; exact: the scale times an integer is not rounded."""
    wide = exact and entry.quantization in (Q4_0, Q5_0, Q8_0)
    return PLAIN.get(entry.quantization, "f32" if wide else "f16")


def _stored(
    name: str, shape: tuple[int, ...], dtype: str, entry: GGUFTensor, load: Callable
) -> StoredTensor:
    place = f"{entry.name}@{entry.offset}"
    return StoredTensor(name, shape, dtype, entry.file, place, load)


def _loader(read: Callable[[], np.ndarray], order: Order | None) -> Callable[[], np.ndarray]:
    return read if order is None else lambda: order(read())


def _rows(entry: GGUFTensor) -> np.ndarray:
    """The bytes of a tensor, uint8 [rows, bytes per row]."""
    raw = np.frombuffer(read_bytes(entry.file, entry.offset, entry.nbytes), np.uint8)
    if raw.size < entry.nbytes:
        raise BadInput(f"{entry.file}: tensor {entry.name} cannot be read: the file became shorter")
    return raw.reshape(math.prod(entry.shape[:-1]), -1)


def _read(entry: GGUFTensor, dtype: str) -> np.ndarray:
    """The values [*entry.shape] of a dtype, dequantized a few rows at a time."""
    raw = _rows(entry)
    if entry.quantization in PLAIN:
        return raw.reshape(-1).view(DTYPES[dtype]).reshape(entry.shape)
    inputs = entry.shape[-1]
    values = np.empty((raw.shape[0], inputs), DTYPES[dtype])
    rows = max(1, _CHUNK // inputs)
    for row in range(0, raw.shape[0], rows):
        # What float16 cannot hold becomes Inf, and Inf times 0 NaN: the converter refuses both.
        with np.errstate(over="ignore", invalid="ignore"):
            values[row : row + rows] = quants.dequantize(raw[row : row + rows], entry.quantization)
    return values.reshape(entry.shape)


def _values(entry: GGUFTensor) -> np.ndarray:
    return _read(entry, _dtype(entry, exact=False))


def halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head, llama.cpp's pairs x0 y0 x1 y1 ... to halves x0 x1 ... y0 y1.

    Args:
      values: [heads * head_dim, ...].
      heads: their number.
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _without_one(gain: np.ndarray) -> np.ndarray:
    """The w of a gain 1 + w, which files of Gemma hold as the sum."""
    return gain - gain.dtype.type(1)


# --- ternary matrices -----------------------------------------------------------------------------


def _ternary_type(entry: GGUFTensor) -> PackedType | None:
    """The type of a matrix in ternary blocks; None for any other tensor."""
    if entry.quantization not in (TQ1_0, TQ2_0) or len(entry.shape) != 2 or 0 in entry.shape:
        return None
    out, inputs = entry.shape
    group = canonical_group(TERNARY_BLOCK, inputs)
    return PackedType(TernaryType((out, inputs), 1, group, False, "f16"), DEFAULT_LAYOUT)


def _ternary_tensors(
    name: str, type: PackedType, entry: GGUFTensor, order: Order | None
) -> list[StoredTensor]:
    """Codes and scales of a ternary matrix, as `atd.weights.stored` has them."""

    def parts() -> tuple[np.ndarray, np.ndarray]:
        try:
            trits, scales = ternary_parts(_rows(entry), entry.quantization)
        except ValueError as error:
            raise BadInput(f"{entry.file}: tensor {entry.name}: {error}") from None
        if not np.isfinite(scales).all():
            raise BadInput(f"{entry.file}: tensor {entry.name}: its scales hold NaN or Inf")
        return trits, scales

    def codes() -> np.ndarray:
        trits, _ = parts()
        return LAYOUTS[type.layout].pack(trits if order is None else order(trits))

    scales = _loader(lambda: parts()[1], order)
    loaders = {"codes": codes, "scales": scales}
    return [
        _stored(stored_name, shape, "u8" if field == "codes" else "f16", entry, loaders[field])
        for field, (stored_name, shape, _) in stored(name, type).items()
    ]
