"""Models with random weights in the shapes of real ones, made on the device as they are loaded: for measuring, where a
checkpoint is not at hand or would not fit.

q, k and v are one matrix, and gate and up, as `fuse` leaves them, in dense and in packed models alike.
"""

from dataclasses import dataclass

import numpy as np

from atd.ir import Attr, Block, Graph, Node, WeightRef, in_memory
from atd.kernels.tuning.samples import random_weight
from atd.weights import Dense, DenseType, PackedType, TernaryType


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    tied: bool
    theta: float = 10000.0
    context: int = 8192


SHAPES = {
    "llama3-8b": Shape(4096, 14336, 32, 8, 32, 128256, tied=False, theta=500000.0),
    "smollm2-135m": Shape(576, 1536, 9, 3, 30, 49152, tied=True),
    "tiny": Shape(64, 96, 4, 2, 2, 128, tied=False, context=256),
}


def random_graph(shape: Shape, bases: int | None = None) -> Graph:
    """Every matrix, embedding and head included, packed with N bases and tied scales, one a row; None: dense, in bf16."""
    head_dim = shape.hidden // shape.heads
    kv = shape.kv_heads * head_dim
    seeds = iter(range(1 << 30))

    def matrix(tensor: str, out: int, inputs: int) -> dict[str, WeightRef]:
        seed = next(seeds)
        type = (
            TernaryType((out, inputs), bases, "row", True, "f16")
            if bases
            else DenseType((out, inputs), "bf16")
        )
        stored = PackedType(type, "words") if isinstance(type, TernaryType) else type
        return {"weight": WeightRef(tensor, stored, lambda: random_weight(type, seed))}

    def norm(name: str, source: str, prefix: str) -> Node:
        gain = in_memory(f"{prefix}{name}.weight", Dense(np.ones(shape.hidden, np.float32)))
        return Node(name, "rms_norm", (source,), {"weight": gain}, {"eps": 1e-5})

    def block(name: str) -> Block:
        rope: dict[str, Attr] = {"head_dim": head_dim, "theta": shape.theta, "scaling": ()}
        attention = {
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": head_dim,
            "window": 0,
        }

        def linear(node: str, source: str, out: int, inputs: int) -> Node:
            return Node(node, "linear", (source,), matrix(f"{name}.{node}.weight", out, inputs))

        def part(node: str, source: str, start: int, size: int) -> Node:
            return Node(node, "slice", (source,), attrs={"start": start, "stop": start + size})

        qkv, gate_up, mixed = "self_attn.qkv_proj", "mlp.gate_up_proj", "self_attn.attention"
        nodes = (
            norm("input_layernorm", "x", f"{name}."),
            linear(qkv, "input_layernorm", shape.hidden + 2 * kv, shape.hidden),
            part("self_attn.q_proj", qkv, 0, shape.hidden),
            part("self_attn.k_proj", qkv, shape.hidden, kv),
            part("self_attn.v_proj", qkv, shape.hidden + kv, kv),
            Node("self_attn.q_rope", "rope", ("self_attn.q_proj",), attrs=rope),
            Node("self_attn.k_rope", "rope", ("self_attn.k_proj",), attrs=rope),
            Node(
                mixed,
                "attention",
                ("self_attn.q_rope", "self_attn.k_rope", "self_attn.v_proj"),
                attrs=attention,
            ),
            linear("self_attn.o_proj", mixed, shape.hidden, shape.hidden),
            Node("self_attn.residual", "add", ("x", "self_attn.o_proj")),
            norm("post_attention_layernorm", "self_attn.residual", f"{name}."),
            linear(gate_up, "post_attention_layernorm", 2 * shape.mlp, shape.hidden),
            part("mlp.gate_proj", gate_up, 0, shape.mlp),
            part("mlp.up_proj", gate_up, shape.mlp, shape.mlp),
            Node("mlp.silu_mul", "silu_mul", ("mlp.gate_proj", "mlp.up_proj")),
            linear("mlp.down_proj", "mlp.silu_mul", shape.hidden, shape.mlp),
            Node("mlp.residual", "add", ("self_attn.residual", "mlp.down_proj")),
        )
        return Block(name, nodes)

    embedding = matrix("model.embed_tokens.weight", shape.vocabulary, shape.hidden)
    if shape.tied:
        head = Node("lm_head", "linear", ("model.norm",), attrs={"tied_to": "model.embed_tokens"})
    else:
        weights = matrix("lm_head.weight", shape.vocabulary, shape.hidden)
        head = Node("lm_head", "linear", ("model.norm",), weights)
    config = {"model_type": "llama", "vocab_size": shape.vocabulary, "hidden_size": shape.hidden}
    return Graph(
        config | {"max_position_embeddings": shape.context},
        Block("model", (Node("embed_tokens", "embed", ("x",), embedding),)),
        tuple(block(f"model.layers.{i}") for i in range(shape.layers)),
        Block("", (norm("model.norm", "x", ""), head)),
    )
