"""What config.json says about a model of the llama family, validated, transformers' defaults added.

    llama      biases by attention_bias (q, k, v, o) and mlp_bias
    mistral    one sliding window for all layers
    qwen2      biases on q, k, v; sliding windows by layer
    qwen3      RMS norms on q and k, over each head; biases by attention_bias; windows as qwen2
    bitnet     relu(gate)^2 * up; RMS norms in front of o and down; biases by attention_bias
    smollm3    no rope in every fourth layer; biases by attention_bias and mlp_bias
    phi3       one window for all layers; a rope over a part of each head (`atd.models.phi3`)
    granite    multipliers of embedding, residual, scores and logits (`atd.models.granite`); biases
               by attention_bias and mlp_bias
    olmo2      norms behind o and down in place of those in front; RMS norms on q and k, over all
               heads; biases by attention_bias
    gemma2     gelu(gate) * up; norms behind o and down besides; softcaps of scores and logits; a
               window in every other layer; biases by attention_bias (`atd.models.gemma`)
    gemma3_text  gelu(gate) * up; RMS norms on q and k, and behind o and down; two ropes, one for
               layers with a window; biases by attention_bias (`atd.models.gemma`)

Source: transformers 5.24 (`models/*/configuration_*.py`, `modeling_rope_utils.py`).
"""

from dataclasses import dataclass
from typing import Any

from atd.errors import BadInput
from atd.models.config_reader import ConfigReader
from atd.models.layer_config import read_ropes, read_windows
from atd.models.rope_config import read_rope, read_ropes_by_layer, read_rotary

GEMMA2, GEMMA3, PHI3, GRANITE, OLMO2 = "gemma2", "gemma3_text", "phi3", "granite", "olmo2"
# Families that have learned nothing of texts without BOS in front: gemma-3-270m has a perplexity of
# 51 without and 15 with it.
AFTER_BOS = (GEMMA2, GEMMA3)
GEMMAS = (GEMMA2, GEMMA3)
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", PHI3, GRANITE, OLMO2, "bitnet"),
    *GEMMAS,
)
_GATES = {  # activation of the gate -> op
    "silu": "silu_mul",
    "swish": "silu_mul",
    "relu2": "relu2_mul",
    "gelu_pytorch_tanh": "gelu_mul",
}
# Families with other activations than silu: the default first.
_ACTIVATIONS = {
    "bitnet": ("relu2", "silu", "swish"),
    **dict.fromkeys(GEMMAS, ("gelu_pytorch_tanh",)),
}
_BIASED = ("llama", "qwen3", "smollm3", GRANITE, OLMO2, "bitnet", *GEMMAS)  # by attention_bias
_MLP_BIASED = ("llama", "smollm3", GRANITE)  # by mlp_bias
_TIED = ("smollm3", *GEMMAS)  # where the key is absent
# Where the key is absent; llama: all heads.
_KV_HEADS = {
    "mistral": 8,
    "qwen2": 32,
    "qwen3": 32,
    "smollm3": 4,
    "bitnet": 5,
    GEMMA2: 4,
    GEMMA3: 4,
}
_HEAD_DIMS = {
    "qwen3": 128,
    GEMMA2: 256,
    GEMMA3: 256,
}  # where the key is absent; others: hidden_size / heads
_THETAS = {"bitnet": 500000.0, "smollm3": 2e6}  # where the key is absent; others: 10000
_EPS = {"bitnet": 1e-5, PHI3: 1e-5, OLMO2: 1e-5}  # where the key is absent; others: 1e-6
# Of scores and of logits, where the key is absent (Gemma 2).
_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_MOST_LAYERS = 10_000  # more is a damaged file, and would be a graph that fills the memory


def expects_bos(config: dict) -> bool:
    """Returns whether a graph's model is of a family that expects BOS in front of a text."""
    return config["model_type"] in AFTER_BOS


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
    rope_scaling: tuple  # as `atd.models.rope.rope_frequencies` takes it
    windows: tuple[int, ...]  # positions that each layer attends to, its own included; 0: all
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    ropes: tuple[bool, ...] = ()  # whether each layer has a rope
    rotary: int = 0  # features of each head that rope rotates, its first ones
    gate: str = "silu_mul"  # the op that joins gate and up
    sub_norms: bool = False  # in front of o and down
    post_norms: bool = False  # behind o and down
    pre_norms: bool = True  # in front of q, k, v and of gate, up
    wide_qk_norm: bool = False  # that of q and k is over all heads, not over each
    windowed_rope: tuple[float, tuple] | None = None  # theta and scaling of layers with a window
    embedding_scale: float = 1.0  # of the residual stream, which is divided by it here
    query_scale: float = 1.0  # of the scores, beyond 1 / sqrt(head_dim)
    residual_scale: float = 1.0  # of what is added to the stream
    logit_divisor: float = 1.0
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # s of scores s tanh(x / s); None: x
    logit_softcap: float | None = None  # likewise of logits

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
        ConfigReader(config, str(origin)).count("max_position_embeddings")


def parse_config(config: dict, origin) -> ModelConfig:
    """Validates a config.json.

    Args:
        config: its content.
        origin: what messages name.

    Raises:
        BadInput: a key is missing, wrong, or not supported.
    """
    family = check_architecture(config, origin)
    read = ConfigReader(config, str(origin))
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
    windowed_rope, rotary = None, head_dim
    if family == GEMMA3:
        (theta, scaling), windowed_rope = read_ropes_by_layer(read, head_dim)
    else:
        rotary = read_rotary(read, head_dim)
        theta, scaling = read_rope(read, _THETAS.get(family, 10000.0), rotary)
    ropes = read_ropes(family, layers, read)
    attention_bias = family in _BIASED and read.flag("attention_bias")
    return ModelConfig(
        model_type=family,
        vocab_size=read.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.count("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps", _EPS.get(family, 1e-6)),
        tie_word_embeddings=read.flag("tie_word_embeddings", family in _TIED),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=read_windows(family, layers, ropes, read),
        ropes=ropes,
        rotary=rotary,
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family in _MLP_BIASED and read.flag("mlp_bias"),
        qk_norm=family in ("qwen3", OLMO2, GEMMA3),
        wide_qk_norm=family == OLMO2,
        gate=gate,
        sub_norms=family == "bitnet",
        post_norms=family in (OLMO2, *GEMMAS),
        pre_norms=family != OLMO2,
        windowed_rope=windowed_rope,
        **_scales(family, read, hidden, head_dim),
    )


def _gate(family: str, read: ConfigReader) -> str:
    """The op that joins gate and up, by hidden_act or hidden_activation."""
    known = _ACTIVATIONS.get(family, ("silu", "swish"))
    key = "hidden_activation" if family in GEMMAS else "hidden_act"
    activation = read.values.get(key, known[0])
    if activation not in known:
        supported = ", ".join(name for name in known if name != "swish")
        raise read.error(f"{key} {activation!r} is not supported; supported: {supported}")
    return _GATES[activation]


def _scales(family: str, read: ConfigReader, hidden: int, head_dim: int) -> dict[str, Any]:
    """The scales and softcaps of Gemma and Granite, as fields of `ModelConfig`."""
    if family == GRANITE:
        return {
            "embedding_scale": read.number("embedding_multiplier", 1.0),
            "residual_scale": read.number("residual_multiplier", 1.0),
            "logit_divisor": read.number("logits_scaling", 1.0),
            "query_scale": read.number("attention_multiplier", 1.0) * head_dim**0.5,
        }
    if family not in GEMMAS:
        return {}
    if read.flag("use_bidirectional_attention"):
        raise read.error("use_bidirectional_attention is not supported; supported: false")
    scalar = read.number("query_pre_attn_scalar", 256.0)
    if family == GEMMA3:
        for key in _SOFTCAPS:
            if read.values.get(key) is not None:
                raise read.error(f"{key} {read.values[key]!r} is not supported; supported: null")
        return {"embedding_scale": hidden**0.5, "query_scale": (head_dim / scalar) ** 0.5}
    caps = (_softcap(read, key, default) for key, default in _SOFTCAPS.items())
    fields = dict(zip(("attention_softcap", "logit_softcap"), caps, strict=True))
    return {"embedding_scale": hidden**0.5, "attention_scale": scalar**-0.5, **fields}


def _softcap(read: ConfigReader, key: str, default: float) -> float | None:
    """A softcap; null is none."""
    if key in read.values and read.values[key] is None:
        return None
    return read.number(key, default)


def both_dtypes(config: dict) -> dict:
    """Returns a config.json whose dtype stands under both of its names, where it has one.

    transformers reads `dtype` from version 5 on, and `torch_dtype` before.
    """
    names = ("dtype", "torch_dtype")
    known = [config[name] for name in names if name in config]
    return config | {name: known[0] for name in names if known and name not in config}
