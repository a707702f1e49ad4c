"""A small graph with every op, made by hand: shared by the tests of this folder."""

import numpy as np

from atd.ir import Block, Graph, Node, WeightRef, in_memory
from atd.weights import Dense

ROPE = {"head_dim": 4, "theta": 10000.0, "scaling": ()}


def ref(tensor: str, *shape: int) -> WeightRef:
    return in_memory(tensor, Dense(np.zeros(shape, np.float16)))


def linear(
    name: str,
    source: str,
    out: int,
    inputs: int,
    prefix: str = "model.layers.0.",
    bias: bool = False,
) -> Node:
    weights = {"weight": ref(f"{prefix}{name}.weight", out, inputs)}
    if bias:
        weights["bias"] = ref(f"{prefix}{name}.bias", out)
    return Node(name, "linear", (source,), weights)


def norm(name: str, source: str, width: int, prefix: str = "model.layers.0.", **attrs) -> Node:
    return Node(
        name,
        "rms_norm",
        (source,),
        {"weight": ref(f"{prefix}{name}.weight", width)},
        {"eps": 1e-5, **attrs},
    )


def tiny() -> Graph:
    """A decoder layer of 8 features, 2 heads and 1 key-value head of 4, with every op.

    The vocabulary has 16 tokens; the head takes the embedding's matrix.
    """
    layer = (
        norm("input_layernorm", "x", 8),
        linear("self_attn.qkv_proj", "input_layernorm", 16, 8, bias=True),
        Node("q", "slice", ("self_attn.qkv_proj",), attrs={"start": 0, "stop": 8}),
        Node("k", "slice", ("self_attn.qkv_proj",), attrs={"start": 8, "stop": 12}),
        Node("v", "slice", ("self_attn.qkv_proj",), attrs={"start": 12, "stop": 16}),
        norm("self_attn.q_norm", "q", 4, head_dim=4),
        Node("q_rope", "rope", ("self_attn.q_norm",), attrs=ROPE),
        Node(
            "k_rope",
            "rope",
            ("k",),
            attrs=ROPE | {"scaling": ("linear", 2.0)},
        ),
        Node(
            "attention",
            "attention",
            ("q_rope", "k_rope", "v"),
            attrs={"heads": 2, "kv_heads": 1, "head_dim": 4, "window": 0, "softcap": 50.0},
        ),
        linear("self_attn.o_proj", "attention", 8, 8),
        Node("residual", "add", ("x", "self_attn.o_proj")),
        linear("mlp.gate_proj", "residual", 12, 8),
        linear("mlp.up_proj", "residual", 12, 8),
        Node("mlp.act", "silu_mul", ("mlp.gate_proj", "mlp.up_proj")),
        Node("mlp.relu2", "relu2_mul", ("mlp.act", "mlp.up_proj")),
        Node("mlp.gelu", "gelu_mul", ("mlp.relu2", "mlp.up_proj")),
        Node("mlp.hadamard", "hadamard", ("mlp.gelu",), attrs={"block": 4}),
        linear("mlp.down_proj", "mlp.hadamard", 8, 12),
        Node("output", "add", ("residual", "mlp.down_proj")),
    )
    embed = Node(
        "model.embed_tokens", "embed", ("x",), {"weight": ref("model.embed_tokens.weight", 16, 8)}
    )
    head = Node("lm_head", "linear", ("model.norm",), attrs={"tied_to": "model.embed_tokens"})
    cap = Node("softcap", "softcap", ("lm_head",), attrs={"cap": 30.0})
    return Graph(
        {"model_type": "llama"},
        Block("", (embed,)),
        (Block("model.layers.0", layer),),
        Block("", (norm("model.norm", "x", 8, ""), head, cap)),
    )
