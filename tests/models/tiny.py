"""Small graphs made in memory, for tests that need no checkpoint; and files that change."""

import os
from pathlib import Path

import numpy as np

from atd.ir import Attr, Block, Graph, Node, in_memory
from atd.weights import Dense


def dense(rng: np.random.Generator, *shape: int, scale: float = 0.2) -> Dense:
    return Dense((rng.standard_normal(shape) * scale).astype(np.float32))


def loaded(graph: Graph) -> Graph:
    """The graph with its weights in memory: what passes compute lazily is computed once."""
    return graph.with_units(
        tuple(u.map_weights(lambda ref: in_memory(ref.tensor, ref.load())) for u in graph.units)
    )


def tiny_graph(
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    mlp: int = 48,
    vocabulary: int = 40,
    tied: bool = False,
    seed: int = 0,
) -> Graph:
    """A llama with random weights."""
    rng = np.random.default_rng(seed)
    head_dim = hidden // heads

    def linear(name: str, source: str, out: int, inputs: int, block: str) -> Node:
        return Node(
            name,
            "linear",
            (source,),
            {"weight": in_memory(f"{block}.{name}.weight", dense(rng, out, inputs))},
        )

    def norm(name: str, source: str, prefix: str) -> Node:
        gain = Dense(1 + dense(rng, hidden, scale=0.1).array)
        return Node(
            name,
            "rms_norm",
            (source,),
            {"weight": in_memory(f"{prefix}{name}.weight", gain)},
            {"eps": 1e-5},
        )

    def block(i: int) -> Block:
        b = f"model.layers.{i}"
        rope: dict[str, Attr] = {"head_dim": head_dim, "theta": 10000.0, "scaling": ()}
        attention: dict[str, Attr] = {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "window": 0,
        }
        return Block(
            b,
            (
                norm("input_layernorm", "x", f"{b}."),
                linear("self_attn.q_proj", "input_layernorm", hidden, hidden, b),
                linear("self_attn.k_proj", "input_layernorm", kv_heads * head_dim, hidden, b),
                linear("self_attn.v_proj", "input_layernorm", kv_heads * head_dim, hidden, b),
                Node("self_attn.q_rope", "rope", ("self_attn.q_proj",), attrs=dict(rope)),
                Node("self_attn.k_rope", "rope", ("self_attn.k_proj",), attrs=dict(rope)),
                Node(
                    "self_attn.attention",
                    "attention",
                    ("self_attn.q_rope", "self_attn.k_rope", "self_attn.v_proj"),
                    attrs=attention,
                ),
                linear("self_attn.o_proj", "self_attn.attention", hidden, hidden, b),
                Node("self_attn.residual", "add", ("x", "self_attn.o_proj")),
                norm("post_attention_layernorm", "self_attn.residual", f"{b}."),
                linear("mlp.gate_proj", "post_attention_layernorm", mlp, hidden, b),
                linear("mlp.up_proj", "post_attention_layernorm", mlp, hidden, b),
                Node("mlp.silu_mul", "silu_mul", ("mlp.gate_proj", "mlp.up_proj")),
                linear("mlp.down_proj", "mlp.silu_mul", hidden, mlp, b),
                Node("mlp.residual", "add", ("self_attn.residual", "mlp.down_proj")),
            ),
        )

    embed = Node(
        "embed_tokens",
        "embed",
        ("x",),
        {"weight": in_memory("model.embed_tokens.weight", dense(rng, vocabulary, hidden))},
    )
    head = Node("lm_head", "linear", ("model.norm",), attrs={"tied_to": "model.embed_tokens"})
    if not tied:
        head = Node(
            "lm_head",
            "linear",
            ("model.norm",),
            {"weight": in_memory("lm_head.weight", dense(rng, vocabulary, hidden))},
        )
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "max_position_embeddings": 128,
    }
    return Graph(
        config,
        Block("model", (embed,)),
        tuple(block(i) for i in range(layers)),
        Block("", (norm("model.norm", "x", ""), head)),
    )


def change_in_place(file: Path) -> None:
    """Changes the first weights of a safetensors file, and neither its size nor its time."""
    status, data = file.stat(), bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 10_000 : 2] = bytes(b ^ 1 for b in data[start : start + 10_000 : 2])
    file.unlink()
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
