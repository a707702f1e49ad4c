"""The rope scaling of a GGUF file as `rope_scaling` of config.json has it.

    none, linear    rope.scaling.type and rope.scaling.factor
    llama3          divisors of the frequencies in a tensor, rope_freqs.weight
    yarn            rope.scaling.*; the attention factor is attn_factor (1 + 0.1 ln factor)
    longrope        divisors in rope_factors_short.weight and rope_factors_long.weight

Source: llama.cpp, `ggml_rope_yarn_corr_dims`, `rope_yarn` and `get_rope_factors`.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from atd.checkpoint.gguf_header import GGUFTensor
from atd.errors import BadInput

DIVISORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_KINDS = ("none", "linear", "yarn", "longrope")
# What yarn could have besides, and what it computes without it.
_YARN_KEYS = {"yarn_ext_factor": -1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}


def gguf_rope_scaling(
    path: Path,
    entries: Mapping[str, GGUFTensor],
    get: Callable,
    theta: float,
    rotary: int,
    read: Callable[[GGUFTensor], np.ndarray],
) -> dict | None:
    """Returns `rope_scaling` of config.json; None where the rope is not scaled.

    Args:
        path: what messages name.
        entries: the header's tensors by name.
        get: returns the value of a key of the architecture, or the default that it is given.
        theta: base of the frequencies.
        rotary: features of each head that are rotated.
        read: returns the values of a tensor.

    Raises:
        BadInput: the scaling is not supported.
    """
    kind = get("rope.scaling.type", "none")
    legacy = get("rope.scale_linear", 1.0)  # in files that have no rope.scaling.*
    factor = get("rope.scaling.factor", legacy)
    if kind not in _KINDS:
        raise BadInput(
            f"{path}: rope scaling {kind!r} is not supported; "
            f"supported: {', '.join(_KINDS)}, and llama3 (tensor {DIVISORS})"
        )
    if DIVISORS in entries:
        divisors = read(entries[DIVISORS]).astype(np.float64)
        return _llama3_scaling(
            path, divisors, get("rope.scaling.original_context_length", 8192), theta, rotary
        )
    if SHORT in entries or LONG in entries or kind == "longrope":
        return _longrope_scaling(path, entries, get, rotary, read)
    if kind == "yarn":
        return _yarn_scaling(path, get, factor)
    if factor != 1.0 and (kind == "linear" or legacy != 1.0):
        return {"rope_type": "linear", "factor": factor}
    return None


def _yarn_scaling(path: Path, get: Callable, factor: float) -> dict:
    for key, default in _YARN_KEYS.items():
        if (value := get(f"rope.scaling.{key}", default)) != default:
            raise BadInput(f"{path}: rope.scaling.{key} is {value}; supported: {default}")
    attention = get("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(max(factor, 1.0)))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original(get),
        "beta_fast": get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": get("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": attention,
    }


def _longrope_scaling(
    path: Path,
    entries: Mapping[str, GGUFTensor],
    get: Callable,
    rotary: int,
    read: Callable[[GGUFTensor], np.ndarray],
) -> dict:
    factors = []
    for name in (SHORT, LONG):
        if name not in entries:
            raise BadInput(
                f"{path}: its rope scaling is longrope, and the tensor {name} is missing"
            )
        if entries[name].shape != (rotary // 2,):
            raise BadInput(
                f"{path}: {name} has the shape {list(entries[name].shape)}, "
                f"expected {[rotary // 2]}"
            )
        factors.append(read(entries[name]).astype(float).tolist())
    return {
        "rope_type": "longrope",
        "short_factor": factors[0],
        "long_factor": factors[1],
        "original_max_position_embeddings": _original(get),
        "attention_factor": get("rope.scaling.attn_factor", 1.0),
    }


def _original(get: Callable) -> int:
    """The context that the model was first trained with."""
    return get("rope.scaling.original_context_length", get("context_length"))


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
