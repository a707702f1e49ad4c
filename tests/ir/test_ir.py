"""The IR: its text and stored form, rewriting, and each rule of verify() broken once."""

import json
from dataclasses import replace

import numpy as np
import pytest

from atd.ir import (
    OPS,
    Block,
    Graph,
    InvalidGraph,
    Node,
    WeightRef,
    graph_from_json,
    in_memory,
    verify,
)
from atd.weights import Dense, DenseType, PackedType, TernaryType, parse_type

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
    """A decoder layer of 8 features, 2 heads and 1 key-value head of 4; 16 tokens; every op; the head is the embedding's."""
    layer = (
        norm("input_layernorm", "x", 8),
        linear("self_attn.qkv_proj", "input_layernorm", 16, 8, bias=True),
        Node("q", "slice", ("self_attn.qkv_proj",), attrs={"start": 0, "stop": 8}),
        Node("k", "slice", ("self_attn.qkv_proj",), attrs={"start": 8, "stop": 12}),
        Node("v", "slice", ("self_attn.qkv_proj",), attrs={"start": 12, "stop": 16}),
        norm("self_attn.q_norm", "q", 4, head_dim=4),
        Node("q_rope", "rope", ("self_attn.q_norm",), attrs=ROPE),
        Node("k_rope", "rope", ("k",), attrs=ROPE | {"scaling": (("type", "linear"), ("factor", 2.0))}),
        Node("attention", "attention", ("q_rope", "k_rope", "v"), attrs={"heads": 2, "kv_heads": 1, "head_dim": 4, "window": 0}),
        linear("self_attn.o_proj", "attention", 8, 8),
        Node("residual", "add", ("x", "self_attn.o_proj")),
        linear("mlp.gate_proj", "residual", 12, 8),
        linear("mlp.up_proj", "residual", 12, 8),
        Node("mlp.act", "silu_mul", ("mlp.gate_proj", "mlp.up_proj")),
        linear("mlp.down_proj", "mlp.act", 8, 12),
        Node("output", "add", ("residual", "mlp.down_proj")),
    )  # fmt: skip
    embed = Node(
        "model.embed_tokens", "embed", ("x",), {"weight": ref("model.embed_tokens.weight", 16, 8)}
    )
    head = Node("lm_head", "linear", ("model.norm",), attrs={"tied_to": "model.embed_tokens"})
    return Graph(
        {"model_type": "llama"},
        Block("", (embed,)),
        (Block("model.layers.0", layer),),
        Block("", (norm("model.norm", "x", 8, ""), head)),
    )


TEXT = """\
graph llama {
prologue {
  %model.embed_tokens = embed(%x) {weight: dense f16[16,8]}
}
block 0 model.layers.0 {
  %input_layernorm = rms_norm(%x) eps=1e-05 {weight: dense f16[8]}
  %self_attn.qkv_proj = linear(%input_layernorm) {bias: dense f16[16]; weight: dense f16[16,8]}
  %q = slice(%self_attn.qkv_proj) start=0 stop=8
  %k = slice(%self_attn.qkv_proj) start=8 stop=12
  %v = slice(%self_attn.qkv_proj) start=12 stop=16
  %self_attn.q_norm = rms_norm(%q) eps=1e-05 head_dim=4 {weight: dense f16[4]}
  %q_rope = rope(%self_attn.q_norm) head_dim=4 scaling=[] theta=10000.0
  %k_rope = rope(%k) head_dim=4 scaling=[[type,linear],[factor,2.0]] theta=10000.0
  %attention = attention(%q_rope, %k_rope, %v) head_dim=4 heads=2 kv_heads=1 window=0
  %self_attn.o_proj = linear(%attention) {weight: dense f16[8,8]}
  %residual = add(%x, %self_attn.o_proj)
  %mlp.gate_proj = linear(%residual) {weight: dense f16[12,8]}
  %mlp.up_proj = linear(%residual) {weight: dense f16[12,8]}
  %mlp.act = silu_mul(%mlp.gate_proj, %mlp.up_proj)
  %mlp.down_proj = linear(%mlp.act) {weight: dense f16[8,12]}
  %output = add(%residual, %mlp.down_proj)
}
epilogue {
  %model.norm = rms_norm(%x) eps=1e-05 {weight: dense f16[8]}
  %lm_head = linear(%model.norm) tied_to=model.embed_tokens
}
}"""


def test_text():
    assert str(tiny()) == TEXT


def test_text_of_other_types_and_attrs():
    packed = PackedType(TernaryType((8, 20), 2, 128, False, "f16"), "interleaved")
    weights = {"weight": WeightRef("a.weight", packed, lambda: pytest.fail("text needs no data"))}
    node = Node("a", "linear", ("x",), weights, {"fused": True, "parts": (1, (2, "b"))})
    expected = "%a = linear(%x) fused=true parts=[1,[2,b]] {weight: packed n=2 g=128 free layout=interleaved/1 f16[8,20]}"
    assert str(node) == expected


def test_a_good_graph_has_every_op_and_passes():
    graph = tiny()
    assert {node.op for _, node in graph.nodes()} == set(OPS)
    verify(graph)


def test_json_round_trip():
    graph = tiny()
    data = json.loads(json.dumps(graph.to_json()))

    def reference(tensor, type):
        return WeightRef(tensor, type, lambda: pytest.fail("the stored form needs no data"))

    again = graph_from_json(data, graph.config, reference)
    assert again == graph  # tensors, types, tuples in attrs
    assert str(again) == TEXT
    verify(again)
    del data["blocks"][0]["nodes"][0]["op"]
    with pytest.raises(KeyError, match="op"):
        graph_from_json(data, graph.config, reference)


def test_rewriting():
    graph = tiny()
    (block,) = graph.blocks
    assert block.full_name(block.node("self_attn.o_proj")) == "model.layers.0.self_attn.o_proj"
    assert graph.prologue.full_name(graph.prologue.nodes[0]) == "model.embed_tokens"
    packed = parse_type("packed n=2 g=4 free layout=interleaved/1 f16[8,8]")
    old = block.node("self_attn.o_proj")
    new = replace(old, weights={"weight": replace(old.weights["weight"], type=packed)})
    rewritten = graph.with_units((graph.prologue, block.replace_node(new), graph.epilogue))
    verify(rewritten)
    assert str(rewritten) == TEXT.replace("{weight: dense f16[8,8]}", f"{{weight: {packed}}}")
    assert str(graph) == TEXT  # the old one stands
    names = [name for name, _ in rewritten.weights()]
    assert names.count("model.layers.0.self_attn.qkv_proj") == 2  # bias and weight
    assert names[0] == "model.embed_tokens"


def test_data_is_read_on_demand():
    weight = Dense(np.ones((2, 3), np.float32))
    reference = in_memory("a.weight", weight)
    assert reference.type == DenseType((2, 3), "f32")
    assert reference.load() is weight


# --- each rule broken once -------------------------------------------------------------------------------------------


def change(old: str, /, **fields):
    """A breakage: the layer's node `old` with other fields. Weights are given by slot, None takes one away."""

    def apply(graph: Graph) -> Graph:
        (block,) = graph.blocks
        node, new = block.node(old), dict(fields)
        if "weights" in fields:
            weights = node.weights | fields["weights"]
            new["weights"] = {slot: ref for slot, ref in weights.items() if ref is not None}
        nodes = tuple(replace(node, **new) if other is node else other for other in block.nodes)
        return replace(graph, blocks=(replace(block, nodes=nodes),))

    return apply


def with_block(edit):
    return lambda graph: replace(graph, blocks=(edit(graph.blocks[0]),))


def weight(slot: str, *shape: int | None) -> dict:
    sizes = [size for size in shape if size is not None]
    return {"weights": {slot: ref("other", *sizes) if sizes else None}}


ATTENTION = {"heads": 2, "kv_heads": 1, "head_dim": 4, "window": 0}
BROKEN_NODES = {  # all in model.layers.0
    "unknown op": (change("output", op="subtract"), "output: unknown op 'subtract'"),
    "name twice": (change("output", name="residual"), "residual: its name is used twice in the block"),
    "name x": (change("output", name="x"), "x: its name is used twice in the block"),
    "undefined input": (change("output", inputs=("residual", "top")), "output: input %top is not defined before it"),
    "later input": (change("residual", inputs=("x", "mlp.act")), "residual: input %mlp.act is not defined before it"),
    "number of inputs": (change("output", inputs=("x",)), "output: add takes 2 inputs, not 1"),
    "slot missing": (change("input_layernorm", **weight("weight", None)), "input_layernorm: rms_norm needs a weight in slot 'weight'"),
    "slot unknown": (change("output", **weight("gain", 8)), "output: add has no slot 'gain'"),
    "attr missing": (change("input_layernorm", attrs={}), "input_layernorm: rms_norm needs the attr 'eps'"),
    "no weight": (change("mlp.up_proj", **weight("weight", None)), "mlp.up_proj: linear needs a weight in slot 'weight' or the attr 'tied_to'"),
    "gain": (change("input_layernorm", **weight("weight", 7)), "input_layernorm: the length of the gain is 7, 8 is expected"),
    "gain of heads": (change("self_attn.q_norm", **weight("weight", 8)), "self_attn.q_norm: the length of the gain is 8, 4 is expected"),
    "input features": (change("mlp.up_proj", **weight("weight", 8, 9)), "mlp.up_proj: the number of input features is 8, 9 is expected"),
    "bias": (change("self_attn.qkv_proj", **weight("bias", 8)), "self_attn.qkv_proj: the length of the bias is 8, 16 is expected"),
    "rope": (change("k_rope", attrs=ROPE | {"head_dim": 3}), "k_rope: the remainder of features by head_dim is 1, 0 is expected"),
    "heads": (change("attention", attrs=ATTENTION | {"heads": 3}), "attention: the width of input 0 (heads x head_dim) is 8, 12 is expected"),
    "kv heads": (change("attention", attrs=ATTENTION | {"kv_heads": 2}), "attention: the width of input 1 (heads x head_dim) is 4, 8 is expected"),
    "slice": (change("v", attrs={"start": 12, "stop": 17}), "v: slice [12, 17) does not lie in 16 features"),
    "empty slice": (change("v", attrs={"start": 12, "stop": 12}), "v: slice [12, 12) does not lie in 16 features"),
    "second input": (change("mlp.act", inputs=("mlp.gate_proj", "x")), "mlp.act: the width of the second input is 8, 12 is expected"),
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj"
BROKEN_GRAPHS = {
    "no embedding": (
        lambda graph: replace(graph, prologue=Block("", ())),
        "the prologue has no embed node with a weight",
    ),
    "empty block": (
        with_block(lambda block: replace(block, nodes=())),
        "model.layers.0: a block needs at least one node",
    ),
    "output of a block": (
        with_block(lambda block: replace(block, nodes=block.nodes[:-2])),
        "model.layers.0: its last node has 12 features, 8 are expected",
    ),
    "logits": (
        lambda graph: replace(graph, epilogue=Block("", graph.epilogue.nodes[:1])),
        "epilogue: its last node has 8 features, 16 are expected",
    ),
    "tensor twice": (
        change("self_attn.o_proj", weights={"weight": ref(f"{UP}.weight", 8, 8)}),
        f"{UP}: tensor {UP}.weight is model.layers.0.self_attn.o_proj's already (tie with attrs tied_to)",
    ),
}


def message(breakage) -> str:
    with pytest.raises(InvalidGraph) as error:
        verify(breakage(tiny()))
    return str(error.value)


@pytest.mark.parametrize("rule", BROKEN_NODES)
def test_broken_nodes(rule):
    breakage, expected = BROKEN_NODES[rule]
    assert message(breakage) == f"model.layers.0.{expected}"


@pytest.mark.parametrize("rule", BROKEN_GRAPHS)
def test_broken_graphs(rule):
    breakage, expected = BROKEN_GRAPHS[rule]
    assert message(breakage) == expected


def test_heads_must_share_key_value_heads_evenly():
    attrs = ATTENTION | {"heads": 3, "kv_heads": 2, "head_dim": 4}
    nodes = (
        linear("q", "x", 12, 8), linear("k", "x", 8, 8), linear("v", "x", 8, 8),
        Node("attention", "attention", ("q", "k", "v"), attrs=attrs), linear("o", "attention", 8, 12),
    )  # fmt: skip
    graph = replace(tiny(), blocks=(Block("model.layers.0", nodes),))
    with pytest.raises(
        InvalidGraph,
        match=r"model\.layers\.0\.attention: the remainder of heads by kv_heads is 1, 0",
    ):
        verify(graph)
