"""What config.json says about a model of the llama family, validated, transformers' defaults added.

    llama      biases by attention_bias (q, k, v, o) and mlp_bias
    mistral    one sliding window for all layers
    qwen2      biases on q, k, v; sliding windows by layer
    qwen3      RMS norms on q and k, over each head; biases by attention_bias; windows as qwen2
    bitnet     relu(gate)^2 * up; RMS norms in front of o and down; biases by attention_bias
    gemma3_text  gelu(gate) * up; RMS norms on q and k, and behind o and down; two ropes, one for
               layers with a window; biases by attention_bias (`atd.models.gemma3`)

Source: transformers 5.23 (`models/*/configuration_*.py`, `modeling_rope_utils.py`).
"""

import math
from dataclasses import dataclass

from atd.errors import BadInput

GEMMA3 = "gemma3_text"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "bitnet", GEMMA3)
_GATES = {  # activation of the gate -> op
    "silu": "silu_mul",
    "swish": "silu_mul",
    "relu2": "relu2_mul",
    "gelu_pytorch_tanh": "gelu_mul",
}
# Families with other activations than silu: the default first.
_ACTIVATIONS = {"bitnet": ("relu2", "silu", "swish"), GEMMA3: ("gelu_pytorch_tanh",)}
# Where the key is absent; llama: all heads.
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "bitnet": 5, GEMMA3: 4}
_HEAD_DIMS = {"qwen3": 128, GEMMA3: 256}  # where the key is absent; others: hidden_size / heads
_LAYER_TYPES = ("full_attention", "sliding_attention")
_MOST_LAYERS = 10_000  # more is a damaged file, and would be a graph that fills the memory
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """A model of the llama family, in the names of config.json where it has the same thing."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float
    rope_scaling: tuple  # as `atd.models.ops.rope_frequencies` takes it
    windows: tuple[int, ...]  # positions that each layer attends to, its own included; 0: all
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    gate: str = "silu_mul"  # the op that joins gate and up
    sub_norms: bool = False  # in front of o and down
    post_norms: bool = False  # behind o and down
    windowed_rope: tuple[float, tuple] | None = None  # theta and scaling of layers with a window
    embedding_scale: float = 1.0  # of the residual stream, which is divided by it here
    query_scale: float = 1.0  # of the scores, beyond 1 / sqrt(head_dim)

    @property
    def stream_eps(self) -> float:
        """Returns eps of the norms that read the residual stream."""
        return self.rms_norm_eps / self.embedding_scale**2


def check_architecture(config: dict, origin) -> str:
    """Returns the model_type; raises BadInput, with what is supported, where it is another."""
    family = config.get("model_type")
    if family not in FAMILIES:
        architectures, named = config.get("architectures"), ""
        if isinstance(architectures, list) and architectures:
            named = f" ({', '.join(map(str, architectures))})"
        if family is None:
            raise BadInput(
                f"{origin}: config.json: model_type is missing{named}; "
                f"supported: {', '.join(FAMILIES)}"
            )
        raise BadInput(
            f"{origin}: the architecture {family!r}{named} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return family


def check_context(config: dict, origin) -> None:
    """Raises BadInput where max_position_embeddings is there and no positive integer."""
    if config.get("max_position_embeddings") is not None:
        _Reader(config, str(origin)).count("max_position_embeddings")


def parse_config(config: dict, origin) -> ModelConfig:
    """Validates a config.json.

    Args:
        config: its content.
        origin: what messages name.

    Raises:
        BadInput: a key is missing, wrong, or not supported.
    """
    family = check_architecture(config, origin)
    read = _Reader(config, str(origin))
    check_context(config, origin)
    gate = _gate(family, read)
    hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
    layers = read.count("num_hidden_layers")
    all_heads = config.get("num_key_value_heads", 0) is None
    kv_heads = read.count(
        "num_key_value_heads", heads if all_heads else _KV_HEADS.get(family, heads)
    )
    head_dim = read.count("head_dim", _HEAD_DIMS.get(family, hidden // heads or None))
    if layers > _MOST_LAYERS:
        raise read.error(f"num_hidden_layers is {layers}; expected at most {_MOST_LAYERS}")
    if heads % kv_heads:
        raise read.error(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise read.error(f"head_dim {head_dim} is odd; rotary embeddings need an even one")
    if family == "bitnet" and heads * head_dim != hidden:
        raise read.error(f"head_dim is {head_dim}; expected {hidden} / {heads} heads")
    if family == "llama" and hidden % heads:
        raise read.error(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    windowed_rope, query_scale = None, 1.0
    if family == GEMMA3:
        _check_gemma3(read)
        (theta, scaling), windowed_rope = _ropes_of_gemma3(read)
        query_scale = (head_dim / read.number("query_pre_attn_scalar", 256.0)) ** 0.5
    else:
        theta, scaling = _rope(read, 500000.0 if family == "bitnet" else 10000.0)
    biased = family in ("llama", "qwen3", "bitnet", GEMMA3)
    attention_bias = biased and read.flag("attention_bias")
    return ModelConfig(
        model_type=family,
        vocab_size=read.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.count("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps", 1e-5 if family == "bitnet" else 1e-6),
        tie_word_embeddings=read.flag("tie_word_embeddings", family == GEMMA3),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=_windows(family, layers, read),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and read.flag("mlp_bias"),
        qk_norm=family in ("qwen3", GEMMA3),
        gate=gate,
        sub_norms=family == "bitnet",
        post_norms=family == GEMMA3,
        windowed_rope=windowed_rope,
        embedding_scale=hidden**0.5 if family == GEMMA3 else 1.0,
        query_scale=query_scale,
    )


@dataclass(frozen=True)
class _Reader:
    """Reads typed values of a JSON object. An absent or null key has the default or is an error."""

    values: dict
    origin: str
    place: str = "config.json"

    def error(self, what: str) -> BadInput:
        return BadInput(f"{self.origin}: {self.place}: {what}")

    def _value(self, key: str, default, kind: str, valid):
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing; expected {kind}")
        if not valid(value):
            raise self.error(f"{key} is {value!r}; expected {kind}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        return self._value(key, default, "a positive integer", lambda v: type(v) is int and v > 0)

    def number(self, key: str, default: float | None = None) -> float:
        def valid(value) -> bool:
            return type(value) in (int, float) and 0 < value < math.inf

        return float(self._value(key, default, "a positive number", valid))

    def flag(self, key: str, default: bool = False) -> bool:
        return self._value(key, default, "true or false", lambda v: type(v) is bool)


def _gate(family: str, read: _Reader) -> str:
    """The op that joins gate and up, by hidden_act or hidden_activation."""
    known = _ACTIVATIONS.get(family, ("silu", "swish"))
    key = "hidden_activation" if family == GEMMA3 else "hidden_act"
    activation = read.values.get(key, known[0])
    if activation not in known:
        supported = ", ".join(name for name in known if name != "swish")
        raise read.error(f"{key} {activation!r} is not supported; supported: {supported}")
    return _GATES[activation]


def _check_gemma3(read: _Reader) -> None:
    """Raises BadInput for what models of the shape of Gemma 3 may have, and Gemma 3 has not."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if read.values.get(key) is not None:
            raise read.error(f"{key} {read.values[key]!r} is not supported; supported: null")
    if read.flag("use_bidirectional_attention"):
        raise read.error("use_bidirectional_attention is not supported; supported: false")


def _ropes_of_gemma3(read: _Reader) -> tuple[tuple[float, tuple], tuple[float, tuple]]:
    """(theta, scaling) of layers that see all of the past, and of those with a window.

    `rope_scaling`, in older files, is of the former alone.
    """
    kinds, scaling = (read.values.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if not isinstance(kinds, dict) or not set(kinds) <= set(_LAYER_TYPES):
        raise read.error(f"rope_parameters is {kinds!r}; expected {' and '.join(_LAYER_TYPES)}")
    full, local = (kinds.get(kind) or {} for kind in _LAYER_TYPES)
    if not all(isinstance(part, dict) for part in (full, local, scaling)):
        raise read.error("rope_parameters and rope_scaling must hold objects")
    whole = read.values | {"rope_scaling": None, "rope_parameters": full | scaling}
    local_theta = read.values.get("rope_local_base_freq")
    windowed = whole | {"rope_parameters": local, "rope_theta": local_theta}
    return (
        _rope(_Reader(whole, read.origin), 1e6),
        _rope(_Reader(windowed, read.origin), 10000.0),
    )


def _rope(read: _Reader, default: float) -> tuple[float, tuple]:
    """(theta, scaling), from `rope_theta` and `rope_scaling` or from `rope_parameters`."""
    config = read.values
    place = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(place) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise read.error(f"{place} is {rope!r}; expected one object for all layers")
    inner = _Reader(rope, read.origin, f"config.json: {place}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise inner.error(
            f"rope type {kind!r} is not supported; supported: {', '.join(_ROPE_TYPES)}"
        )
    for values in (rope, config):
        part = values.get("partial_rotary_factor")
        if part not in (1, None):
            raise read.error(f"partial_rotary_factor {part!r} is not supported; supported: 1.0")
    theta = inner.number("rope_theta", read.number("rope_theta", default))
    if kind == "default":
        return theta, ()
    if kind == "linear":
        return theta, ("linear", inner.number("factor"))
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if low >= high:
        raise inner.error(f"low_freq_factor {low} is not below high_freq_factor {high}")
    key = "original_max_position_embeddings"  # the outer key wins in transformers
    original = read.count(key, inner.count(key, read.count("max_position_embeddings", 2048)))
    return theta, ("llama3", inner.number("factor"), low, high, original)


def _windows(family: str, layers: int, read: _Reader) -> tuple[int, ...]:
    """The attention window of every layer."""
    config = read.values
    unlimited = family == "mistral" and config.get("sliding_window", 0) is None
    if family in ("llama", "bitnet") or unlimited:
        return (0,) * layers
    if family == "mistral":
        return (read.count("sliding_window", 4096),) * layers
    window = 0
    if family == GEMMA3 or read.flag("use_sliding_window"):
        window = (
            0 if config.get("sliding_window", 0) is None else read.count("sliding_window", 4096)
        )
    kinds = config.get("layer_types")
    if kinds is None and family == GEMMA3:
        pattern = read.count("sliding_window_pattern", 6)
        kinds = [_LAYER_TYPES[(i + 1) % pattern > 0] for i in range(layers)]
    if kinds is None:
        first = config.get("max_window_layers", 28)
        if type(first) is not int:
            raise read.error(f"max_window_layers is {first!r}; expected an integer")
        return tuple(window if i >= first else 0 for i in range(layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not set(map(str, kinds)) <= set(_LAYER_TYPES)
    ):
        raise read.error(
            f"layer_types is {kinds!r}; expected full_attention or sliding_attention for each of "
            f"{layers} layers"
        )
    if "sliding_attention" in kinds and not window:
        off = "" if family == GEMMA3 else "use_sliding_window is off or "
        raise read.error(f"layer_types has sliding_attention, but {off}sliding_window missing")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
