"""What config.json says about rotary position embeddings, in both spellings.

Source: transformers 5.24, `modeling_rope_utils.py`, `models/phi3/configuration_phi3.py`.
"""

import math

from atd.models.config_reader import ConfigReader

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
LAYER_TYPES = ("full_attention", "sliding_attention")
PARTIAL = ("phi3",)  # families that may rotate a part of each head
_LONGROPE = ("su", "yarn")  # what older files of phi3 call it
_ORIGINAL = "original_max_position_embeddings"

Rope = tuple[float, tuple]  # theta and scaling, as `atd.models.rope.rope_frequencies` takes them


def read_rope(read: ConfigReader, default: float, rotary: int) -> Rope:
    """Reads theta and scaling, from `rope_theta` and `rope_scaling` or from `rope_parameters`.

    Args:
        read: reads config.json.
        default: theta where the file has none.
        rotary: features per head that are rotated.

    Raises:
        BadInput: something is missing, wrong or not supported.
    """
    inner = _inner(read)
    kind = inner.values.get("rope_type", inner.values.get("type", "default"))
    if read.values.get("model_type") == "phi3" and kind in _LONGROPE:
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise inner.error(
            f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    theta = inner.number("rope_theta", read.number("rope_theta", default))
    match kind:
        case "default":
            return theta, ()
        case "linear":
            return theta, ("linear", inner.number("factor"))
        case "llama3":
            return theta, _llama3(read, inner)
        case "yarn":
            return theta, _yarn(read, inner, theta)
    return theta, _longrope(read, inner, rotary)


def read_rotary(read: ConfigReader, head_dim: int) -> int:
    """Returns how many features of each head are rotated, its first ones: all, but in PARTIAL."""
    inner = _inner(read)
    parts = inner.values.get("partial_rotary_factor"), read.values.get("partial_rotary_factor")
    if read.values.get("model_type") not in PARTIAL:
        for part in parts:
            if part not in (1, None):
                raise read.error(f"partial_rotary_factor {part!r} is not supported; supported: 1.0")
        return head_dim
    part = inner.number("partial_rotary_factor", read.number("partial_rotary_factor", 1.0))
    rotary = int(head_dim * part)
    if part > 1 or rotary % 2 or rotary == 0:
        raise read.error(
            f"partial_rotary_factor is {part}: {rotary} of {head_dim} features of a head; "
            "rotary embeddings need an even number of them, 2 or more"
        )
    return rotary


def read_ropes_by_layer(read: ConfigReader, head_dim: int) -> tuple[Rope, Rope]:
    """Reads the ropes of Gemma 3: of layers that see all of the past, and of those with a window.

    `rope_scaling`, in older files, is of the former alone.
    """
    kinds, scaling = (read.values.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if not isinstance(kinds, dict) or not set(kinds) <= set(LAYER_TYPES):
        raise read.error(f"rope_parameters is {kinds!r}; expected {' and '.join(LAYER_TYPES)}")
    full, local = (kinds.get(kind) or {} for kind in LAYER_TYPES)
    if not all(isinstance(part, dict) for part in (full, local, scaling)):
        raise read.error("rope_parameters and rope_scaling must hold objects")
    whole = read.values | {"rope_scaling": None, "rope_parameters": full | scaling}
    local_theta = read.values.get("rope_local_base_freq")
    windowed = whole | {"rope_parameters": local, "rope_theta": local_theta}
    readers = ConfigReader(whole, read.origin), ConfigReader(windowed, read.origin)
    of_full, of_windowed = (
        read_rope(reader, theta, read_rotary(reader, head_dim))
        for reader, theta in zip(readers, (1e6, 10000.0), strict=True)
    )
    return of_full, of_windowed


def _inner(read: ConfigReader) -> ConfigReader:
    """Reads `rope_scaling`, or `rope_parameters` where there is none."""
    place = "rope_scaling" if read.values.get("rope_scaling") else "rope_parameters"
    rope = read.values.get(place) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise read.error(f"{place} is {rope!r}; expected one object for all layers")
    return ConfigReader(rope, read.origin, f"config.json: {place}")


def _original(read: ConfigReader, inner: ConfigReader) -> int:
    """The context that the model was first trained with; the outer key wins in transformers."""
    if read.values.get("model_type") == "phi3":
        return read.count(_ORIGINAL, 4096)
    return read.count(
        _ORIGINAL, inner.count(_ORIGINAL, read.count("max_position_embeddings", 2048))
    )


def _llama3(read: ConfigReader, inner: ConfigReader) -> tuple:
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if low >= high:
        raise inner.error(f"low_freq_factor {low} is not below high_freq_factor {high}")
    return "llama3", inner.number("factor"), low, high, _original(read, inner)


def _yarn(read: ConfigReader, inner: ConfigReader, theta: float) -> tuple:
    factor, original = inner.number("factor"), _original(read, inner)
    fast, slow = inner.number("beta_fast", 32.0), inner.number("beta_slow", 1.0)
    if slow >= fast:
        raise inner.error(f"beta_slow {slow} is not below beta_fast {fast}")
    if theta <= 1:
        raise inner.error(f"rope_theta is {theta}; yarn needs one above 1")

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    attention = grown(1.0)
    if inner.values.get("mscale") and inner.values.get("mscale_all_dim"):
        attention = grown(inner.number("mscale")) / grown(inner.number("mscale_all_dim"))
    attention = inner.number("attention_factor", attention)
    return "yarn", factor, original, fast, slow, inner.flag("truncate", True), attention


def _longrope(read: ConfigReader, inner: ConfigReader, rotary: int) -> tuple:
    original = _original(read, inner)
    short, long = (inner.numbers(f"{name}_factor", rotary // 2) for name in ("short", "long"))
    factor = inner.number("factor", read.count("max_position_embeddings", 4096) / original)
    attention = 1.0
    if factor > 1 and original > 1:
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    attention = inner.number("attention_factor", attention)
    return "longrope", original, short, long, attention
