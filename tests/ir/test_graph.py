"""Graphs: their text, their stored form, rewriting, and data on demand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from atd.ir import OPS, Node, WeightRef, graph_from_json, in_memory, verify
from atd.weights import Dense, DenseType, PackedType, TernaryType, parse_type
from tests.ir.graphs import tiny

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
  %k_rope = rope(%k) head_dim=4 scaling=[linear,2.0] theta=10000.0
  %attention = attention(%q_rope, %k_rope, %v) head_dim=4 heads=2 kv_heads=1 softcap=50.0 window=0
  %self_attn.o_proj = linear(%attention) {weight: dense f16[8,8]}
  %residual = add(%x, %self_attn.o_proj)
  %mlp.gate_proj = linear(%residual) {weight: dense f16[12,8]}
  %mlp.up_proj = linear(%residual) {weight: dense f16[12,8]}
  %mlp.act = silu_mul(%mlp.gate_proj, %mlp.up_proj)
  %mlp.relu2 = relu2_mul(%mlp.act, %mlp.up_proj)
  %mlp.gelu = gelu_mul(%mlp.relu2, %mlp.up_proj)
  %mlp.hadamard = hadamard(%mlp.gelu) block=4
  %mlp.down_proj = linear(%mlp.hadamard) {weight: dense f16[8,12]}
  %output = add(%residual, %mlp.down_proj)
}
epilogue {
  %model.norm = rms_norm(%x) eps=1e-05 {weight: dense f16[8]}
  %lm_head = linear(%model.norm) tied_to=model.embed_tokens
  %softcap = softcap(%lm_head) cap=30.0
}
}"""


def test_text():
    assert str(tiny()) == TEXT


def test_text_of_other_types_and_attrs():
    packed = PackedType(TernaryType((8, 20), 2, 128, False, "f16"), "interleaved")
    weights = {"weight": WeightRef("a.weight", packed, lambda: pytest.fail("text needs no data"))}
    node = Node("a", "linear", ("x",), weights, {"fused": True, "parts": (1, (2, "b"))})
    attrs = "fused=true parts=[1,[2,b]]"
    type = "packed n=2 g=128 free layout=interleaved/1 f16[8,20]"
    assert str(node) == f"%a = linear(%x) {attrs} {{weight: {type}}}"


def test_a_good_graph_has_every_op_and_passes():
    graph = tiny()
    of_several_devices = {"all_sum", "all_gather", "share", "rounded"}
    assert {node.op for _, node in graph.nodes()} == set(OPS) - of_several_devices
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
