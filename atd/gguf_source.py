"""GGUF files as Hugging Face checkpoints: names, config and values in Hugging Face's conventions.

Architectures: llama, qwen2. A quantized tensor is the float16 rounding of what `gguf.quants.dequantize` returns; F32,
F16 and BF16 stay what they are. In the llama architecture the rows of q and k lie in interleaved pairs, those of
(0, d/2, 1, d/2+1, ...) of each head; here they are put back in Hugging Face's halves.

The header is parsed here, not by `gguf.GGUFReader`: that one makes an array of every token and merge, which takes 2.6 s
for a vocabulary of 49152.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from atd.errors import BadInput
from atd.store import StoredTensor, read_bytes
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
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # GGUF value type -> struct
_STRING, _ARRAY = 8, 9
_KEEP = 1024  # longer arrays of the metadata are the tokenizer's, and are skipped
_CHUNK = 1 << 24  # weights dequantized at a time: their float32 values take 64 MB


def open_gguf(path: Path) -> tuple[dict, dict[str, StoredTensor]]:
    """(config as in config.json, tensors by Hugging Face name).

    Raises BadInput for a file or a model that cannot be used.
    """
    metadata, entries = _read_header(path)
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
    status = path.stat()
    tensors = {}
    for name, entry in entries.items():
        if name == "rope_freqs.weight":
            continue  # is config["rope_scaling"] now
        name = _hugging_face_name(name)
        heads = next((heads for module, heads in permuted.items() if module in name), None)
        source = f"{path.name} {status.st_size} {status.st_mtime_ns} {entry.name}@{entry.offset}"
        tensors[name] = StoredTensor(name, entry.shape, entry.dtype, source, _loader(path, entry, heads))
    return config, tensors


def _hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; a name without counterpart stays."""
    match = re.fullmatch(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)", name)
    if match is None or match["module"] not in _MODULES:
        return name
    prefix = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{prefix}{_MODULES[match['module']]}.{match['kind']}"


# --- header -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int  # in the file
    nbytes: int

    @property
    def dtype(self) -> str:
        return _PLAIN.get(self.quantization, "f16")


_PLAIN = {GGMLQuantizationType[name.upper()]: name for name in ("f32", "f16", "bf16", "f64")}


class _Cursor:
    """Reads values one after the other; struct.error past the end."""

    def __init__(self, data: mmap.mmap | bytes):
        self.data, self.offset = data, 0

    def scalar(self, code: str):
        (value,) = struct.unpack_from(f"<{code}", self.data, self.offset)
        self.offset += struct.calcsize(f"<{code}")
        return value

    def skip_string(self) -> None:
        (length,) = struct.unpack_from("<Q", self.data, self.offset)
        self.offset += 8 + length

    def string(self) -> str:
        start = self.offset + 8
        self.skip_string()
        if self.offset > len(self.data):
            raise struct.error("string past the end")
        return self.data[start : self.offset].decode("utf-8")

    def value(self, kind: int):
        """A metadata value; None for an array that is longer than _KEEP."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if count <= _KEEP and kind != _ARRAY:
            return [self.value(kind) for _ in range(count)]
        if kind == _STRING:
            for _ in range(count):
                self.skip_string()
        else:
            self.offset += count * struct.calcsize(f"<{_SCALARS[kind]}")
        return None


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """(metadata without long arrays, tensors by GGUF name)."""
    if read_bytes(path, 0, 4) != b"GGUF":
        raise BadInput(f"{path}: not a GGUF file: it does not start with 'GGUF'")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse_header(path, data)
        except (struct.error, OverflowError, IndexError):
            raise BadInput(
                f"{path}: its header goes past the end of the file ({len(data)} bytes): truncated; download it again"
            ) from None
        except (KeyError, UnicodeDecodeError) as error:
            raise BadInput(f"{path}: broken GGUF header: unknown value {error}; download it again") from None


def _parse_header(path: Path, data: mmap.mmap) -> tuple[dict[str, Any], dict[str, _Entry]]:
    cursor = _Cursor(data)
    cursor.offset = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise BadInput(
            f"{path}: GGUF version {version} (or a big-endian file); little-endian versions 2 and 3 are read"
        )
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = {}
    for _ in range(tensor_count):
        name, dimensions = cursor.string(), cursor.scalar("I")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        if name in infos:
            raise BadInput(f"{path}: tensor {name} stands there twice")
        infos[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
    alignment = metadata.get("general.alignment", 32) or 32
    start = -(-cursor.offset // alignment) * alignment
    return metadata, {name: _entry(path, name, info, start, len(data)) for name, info in infos.items()}


def _entry(path: Path, name: str, info: tuple[tuple[int, ...], int, int], start: int, size: int) -> _Entry:
    shape, kind, offset = info
    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError:
        raise BadInput(
            f"{path}: tensor {name} has the quantization type {kind}, which the package gguf does not know"
        ) from None
    if quantization not in _PLAIN and not _dequantizes(quantization):
        raise BadInput(f"{path}: tensor {name} is {quantization.name}, which the package gguf does not dequantize")
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if not shape or shape[-1] % block:
        raise BadInput(
            f"{path}: tensor {name} {list(shape)}: "
            f"its rows are no multiple of the {block} weights of a {quantization.name} block"
        )
    entry = _Entry(name, shape, quantization, start + offset, math.prod(shape) // block * block_bytes)
    end = entry.offset + entry.nbytes
    if end > size:
        raise BadInput(
            f"{path}: tensor {name} ends at byte {end}, past the end of the file ({size} bytes): "
            f"truncated; download it again"
        )
    return entry


@cache
def _dequantizes(quantization: GGMLQuantizationType) -> bool:
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[quantization][1]), np.uint8), quantization)
    except NotImplementedError:
        return False
    return True


# --- values -----------------------------------------------------------------------------------------------------------


def _loader(path: Path, entry: _Entry, heads: int | None) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        raw = np.frombuffer(read_bytes(path, entry.offset, entry.nbytes), np.uint8)
        if raw.size < entry.nbytes:
            raise BadInput(f"{path}: tensor {entry.name} cannot be read: the file became shorter")
        values = _values(raw, entry)
        return values if heads is None else halves(values, heads)

    return load


def _values(raw: np.ndarray, entry: _Entry) -> np.ndarray:
    """bytes [nbytes] -> values of entry.dtype [*shape], a few rows at a time where they are dequantized."""
    if entry.quantization in _PLAIN:
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)
    inputs = entry.shape[-1]
    raw = raw.reshape(math.prod(entry.shape[:-1]), -1)  # [rows, bytes a row]
    values = np.empty((raw.shape[0], inputs), np.float16)
    rows = max(1, _CHUNK // inputs)
    for row in range(0, raw.shape[0], rows):
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes Inf, which the converter refuses by name
            values[row : row + rows] = quants.dequantize(raw[row : row + rows], entry.quantization).astype(np.float16)
    return values.reshape(entry.shape)


def halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from llama.cpp's pairs, x0 y0 x1 y1 ..., to Hugging Face's halves, x0 x1 ... y0 y1 ..."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


# --- config -----------------------------------------------------------------------------------------------------------


def _config(path: Path, metadata: dict[str, Any], entries: dict[str, _Entry]) -> dict:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise BadInput(
            f"{path}: the GGUF architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if metadata.get("split.count", 1) > 1:
        raise BadInput(f"{path}: one part of a split GGUF file; join the parts with llama-gguf-split --merge first")

    def get(key: str, default=None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise BadInput(f"{path}: its metadata has no {architecture}.{key}")
        if isinstance(value, list):  # one value a layer
            if len(set(value)) != 1:
                raise BadInput(f"{path}: {architecture}.{key} differs between layers ({value}), which is not supported")
            value = value[0]
        # 9.999999747378752e-06 is the float32 of 1e-05: keep the short one
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if "token_embd.weight" not in entries:
        raise BadInput(f"{path}: it has no tensor token_embd.weight")
    if get("expert_count", 0):
        raise BadInput(f"{path}: a mixture of {get('expert_count')} experts, which is not supported; dense models are")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise BadInput(
                f"{path}: {architecture}.{key} is {get(key)}, the head dimension {head_dim}; "
                f"a difference is not supported"
            )
    theta = get("rope.freq_base", 10000.0)
    tokens = {f"{kind}_token_id": metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
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
    path: Path, metadata: dict, entries: dict[str, _Entry], get: Callable, theta: float, head_dim: int
) -> dict | None:
    kind = get("rope.scaling.type", "none")
    legacy = get("rope.scale_linear", 1.0)  # files from before rope.scaling.*
    factor = get("rope.scaling.factor", legacy)
    if kind not in ("none", "linear"):
        raise BadInput(
            f"{path}: rope scaling {kind!r} is not supported; "
            f"supported: none, linear, and llama3 (tensor rope_freqs.weight)"
        )
    if "rope_freqs.weight" in entries:
        entry = entries["rope_freqs.weight"]
        divisors = _values(np.frombuffer(read_bytes(path, entry.offset, entry.nbytes), np.uint8), entry).astype(
            np.float64
        )
        return _llama3_scaling(path, divisors, get("rope.scaling.original_context_length", 8192), theta, head_dim)
    if kind == "linear" or legacy != 1.0:
        return {"rope_type": "linear", "factor": factor}
    return None


def _llama3_scaling(path: Path, divisors: np.ndarray, original: int, theta: float, head_dim: int) -> dict:
    """The `llama3` rope scaling that the divisors of the frequencies [head_dim/2] come from.

    With c = original context / wavelength and Meta's low and high factors of 1 and 4: 1/divisor = (1 - s)/factor + s,
    where s = (c - 1)/(4 - 1), cut to 0..1. Raises BadInput for other divisors.
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
