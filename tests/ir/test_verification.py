"""`verify`: each rule of a graph broken once."""

import math
from dataclasses import replace

import pytest

from atd.ir import Block, Graph, InvalidGraph, Node, verify
from tests.ir.graphs import ROPE, linear, ref, tiny


def change(old: str, /, **fields):
    """A breakage: the layer's node `old` with other fields. Weights are given by slot, None takes
    one away.
    """

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
YARN = ("yarn", 4.0, 32, 32.0, 1.0, True, 1.1)
BROKEN_NODES = {  # all in model.layers.0
    "unknown op": (change("output", op="subtract"), "output: unknown op 'subtract'"),
    "name twice": (
        change("output", name="residual"),
        "residual: its name is used twice in the block",
    ),
    "name x": (change("output", name="x"), "x: its name is used twice in the block"),
    "undefined input": (
        change("output", inputs=("residual", "top")),
        "output: input %top is not defined before it",
    ),
    "later input": (
        change("residual", inputs=("x", "mlp.act")),
        "residual: input %mlp.act is not defined before it",
    ),
    "number of inputs": (change("output", inputs=("x",)), "output: add takes 2 inputs, not 1"),
    "slot missing": (
        change("input_layernorm", **weight("weight", None)),
        "input_layernorm: rms_norm needs a weight in slot 'weight'",
    ),
    "slot unknown": (change("output", **weight("gain", 8)), "output: add has no slot 'gain'"),
    **{
        f"{name} {key} {value!r}": (
            change(name, attrs=attrs | {key: value}),
            f"{name}: the attr {key!r} cannot be {value!r}",
        )
        for name, attrs, key, values in (
            ("input_layernorm", {"eps": 1e-5}, "eps", (None, "x", -1.0, math.inf, math.nan)),
            ("q_rope", ROPE, "theta", (None, 0, -1.0, math.inf)),
            ("q_rope", ROPE, "head_dim", (0, -4, 4.0, True, 1 << 40)),
            ("q_rope", ROPE, "scaling", (None, ("linear",), ("linear", 0), ("yarn", 2.0))),
            ("q_rope", ROPE, "scaling", (("llama3", 8.0, 4.0, 1.0, 64), ([],))),
            ("attention", ATTENTION, "window", (None, -1, 1.5, False)),
            ("attention", ATTENTION, "kv_heads", (0, "1")),
        )
        for value in values
    },
    "embed in a block": (
        change("output", op="embed", inputs=("x",), **weight("weight", 8, 8)),
        "output: an embed, and nothing else, reads token ids, the prologue's %x",
    ),
    "attr missing": (
        change("input_layernorm", attrs={}),
        "input_layernorm: rms_norm needs the attr 'eps'",
    ),
    "no weight": (
        change("mlp.up_proj", **weight("weight", None)),
        "mlp.up_proj: linear needs a weight in slot 'weight' or the attr 'tied_to'",
    ),
    "gain": (
        change("input_layernorm", **weight("weight", 7)),
        "input_layernorm: the length of the gain is 7, 8 is expected",
    ),
    "gain of heads": (
        change("self_attn.q_norm", **weight("weight", 8)),
        "self_attn.q_norm: the length of the gain is 8, 4 is expected",
    ),
    "input features": (
        change("mlp.up_proj", **weight("weight", 8, 9)),
        "mlp.up_proj: the number of input features is 8, 9 is expected",
    ),
    "bias": (
        change("self_attn.qkv_proj", **weight("bias", 8)),
        "self_attn.qkv_proj: the length of the bias is 8, 16 is expected",
    ),
    "rope": (
        change("k_rope", attrs=ROPE | {"head_dim": 3}),
        "k_rope: the remainder of features by head_dim is 1, 0 is expected",
    ),
    "rotary of a head": (
        change("k_rope", attrs=ROPE | {"rotary": 6}),
        "k_rope: rotary is 6, at most head_dim = 4 is expected",
    ),
    "odd rotary": (
        change("k_rope", attrs=ROPE | {"rotary": 3}),
        "k_rope: the attr 'rotary' cannot be 3",
    ),
    "factors of longrope": (
        change("k_rope", attrs=ROPE | {"scaling": ("longrope", 8, (1.0,), (1.0, 2.0), 1.0)}),
        "k_rope: the number of factors of longrope is 1, 2 is expected",
    ),
    "theta of yarn": (
        change("k_rope", attrs=ROPE | {"theta": 1.0, "scaling": YARN}),
        "k_rope: theta is 1.0, and yarn needs one above 1",
    ),
    "turns of yarn": (
        change("k_rope", attrs=ROPE | {"scaling": (*YARN[:3], 1.0, 32.0, *YARN[5:])}),
        "k_rope: the attr 'scaling' cannot be ('yarn', 4.0, 32, 1.0, 32.0, True, 1.1)",
    ),
    "heads": (
        change("attention", attrs=ATTENTION | {"heads": 3}),
        "attention: the width of input 0 (heads x head_dim) is 8, 12 is expected",
    ),
    "kv heads": (
        change("attention", attrs=ATTENTION | {"kv_heads": 2}),
        "attention: the width of input 1 (heads x head_dim) is 4, 8 is expected",
    ),
    "scale": (
        change("attention", attrs=ATTENTION | {"scale": 0}),
        "attention: the attr 'scale' cannot be 0",
    ),
    "kv": (
        change("attention", attrs=ATTENTION | {"kv": "int4"}),
        "attention: the attr 'kv' cannot be 'int4'",
    ),
    "softcap": (
        change("attention", attrs=ATTENTION | {"softcap": -1.0}),
        "attention: the attr 'softcap' cannot be -1.0",
    ),
    "cap": (
        change("mlp.hadamard", op="softcap", attrs={"cap": math.inf}),
        "mlp.hadamard: the attr 'cap' cannot be inf",
    ),
    "slice": (
        change("v", attrs={"start": 12, "stop": 17}),
        "v: slice [12, 17) does not lie in 16 features",
    ),
    "empty slice": (
        change("v", attrs={"start": 12, "stop": 12}),
        "v: slice [12, 12) does not lie in 16 features",
    ),
    "block of a transform": (
        change("mlp.hadamard", attrs={"block": 8}),
        "mlp.hadamard: the remainder of features by block is 4, 0 is expected",
    ),
    "block no power of two": (
        change("mlp.hadamard", attrs={"block": 6}),
        "mlp.hadamard: the attr 'block' cannot be 6",
    ),
    "block of one": (
        change("mlp.hadamard", attrs={"block": 1}),
        "mlp.hadamard: the attr 'block' cannot be 1",
    ),
    "second input": (
        change("mlp.act", inputs=("mlp.gate_proj", "x")),
        "mlp.act: the width of the second input is 8, 12 is expected",
    ),
    "widths of gelu_mul": (
        change("mlp.gelu", inputs=("mlp.relu2", "x")),
        "mlp.gelu: the width of the second input is 8, 12 is expected",
    ),
    "widths of relu2_mul": (
        change("mlp.relu2", inputs=("mlp.act", "x")),
        "mlp.relu2: the width of the second input is 8, 12 is expected",
    ),
}
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
        f"{UP}: tensor {UP}.weight is model.layers.0.self_attn.o_proj's already "
        "(tie with attrs tied_to)",
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
        linear("q", "x", 12, 8),
        linear("k", "x", 8, 8),
        linear("v", "x", 8, 8),
        Node("attention", "attention", ("q", "k", "v"), attrs=attrs),
        linear("o", "attention", 8, 12),
    )
    graph = replace(tiny(), blocks=(Block("model.layers.0", nodes),))
    with pytest.raises(
        InvalidGraph,
        match=r"model\.layers\.0\.attention: the remainder of heads by kv_heads is 1, 0",
    ):
        verify(graph)
