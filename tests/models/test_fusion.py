"""Which nodes are computed with a product, and that they give what the nodes give."""

from dataclasses import replace

import numpy as np
import pytest

from atd.ir import Block, Node, in_memory
from atd.kernels import matmul as kernels
from atd.kernels.settings import Settings
from atd.models import execute, fusion
from atd.models.fusion import Product
from atd.models.ops import Weights
from atd.pipeline import Pipeline
from atd.weights import Dense
from tests.kernels.matrices import unoptimized
from tests.models.tiny import tiny_graph

ROWS = ["decompose{bases = 2, group = 'row', scales = 'tied'}", "pack"]


def weights_of(block: Block) -> Weights:
    return {
        node.name: {slot: ref.load() for slot, ref in node.weights.items()} for node in block.nodes
    }


def read(block: Block) -> list[str]:
    """'a b c' for nodes that run together, 'a' for a node of its own."""
    return names(fusion.plan(execute.structure_of(block).block, weights_of(block)))


def names(steps: list) -> list[str]:
    return [
        step.name if isinstance(step, Node) else " ".join(n.name for n in step.nodes)
        for step in steps
    ]


def test_a_block_with_its_linears_joined():
    graph = Pipeline(["fuse"])(tiny_graph(layers=1))
    assert read(graph.blocks[0]) == [
        "input_layernorm self_attn.qkv_proj",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj "
        "self_attn.q_rope self_attn.k_rope self_attn.attention",
        "self_attn.o_proj self_attn.residual",
        "post_attention_layernorm mlp.gate_up_proj mlp.gate_proj mlp.up_proj mlp.silu_mul",
        "mlp.down_proj mlp.residual",
    ]


def test_linears_apart_norm_anew_and_gate_by_themselves():
    steps = read(tiny_graph(layers=1).blocks[0])
    assert [step for step in steps if step.startswith("input_layernorm ")] == [
        f"input_layernorm self_attn.{name}_proj" for name in "qkv"
    ]
    assert "self_attn.q_rope self_attn.k_rope self_attn.attention" in steps
    assert "mlp.silu_mul" in steps
    assert "mlp.down_proj mlp.residual" in steps


def block(*nodes: Node) -> Block:
    return Block("b", nodes)


NORM = Node("norm", "rms_norm", ("x",), attrs={"eps": 1e-5})


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ((NORM, Node("l", "linear", ("norm",)), Node("a", "add", ("l", "norm"))), ["norm", "l a"]),
        ((Node("l", "linear", ("x",)), Node("a", "add", ("l", "l"))), ["l", "a"]),
        (
            (
                Node("l", "linear", ("x",)),
                Node("m", "linear", ("x",)),
                Node("a", "add", ("l", "m")),
            ),
            ["m", "l a"],
        ),
        (
            (
                Node("l", "linear", ("x",)),
                Node("a", "add", ("x", "l")),
                Node("b", "add", ("l", "a")),
            ),
            ["l", "a", "b"],
        ),
        (
            (replace(NORM, attrs={"eps": 1e-5, "head_dim": 8}), Node("l", "linear", ("norm",))),
            ["norm", "l"],
        ),
    ],
)
def test_what_others_read_stays(nodes, wanted):
    assert names(fusion.plan(block(*nodes), {})) == wanted


ATTRS = {"head_dim": 8, "theta": 10000.0, "scaling": ()}
PARTS = tuple(
    Node(name, "slice", ("x",), attrs={"start": 8 * i, "stop": 8 * i + 8})
    for i, name in enumerate("qkv")
)
Q_ROPE, K_ROPE = (Node(f"{name}_rope", "rope", (name,), attrs=ATTRS) for name in "qk")
ATTENTION = Node(
    "a", "attention", ("q_rope", "k_rope", "v"), attrs={"heads": 1, "head_dim": 8, "window": 0}
)


def test_an_attention_takes_its_parts_where_they_lie():
    (step,) = fusion.plan(block(*PARTS, Q_ROPE, K_ROPE, ATTENTION), {})
    assert isinstance(step, fusion.Attention)
    assert step.parts == (("x", 0), ("x", 8), ("x", 16))
    norm = replace(NORM, inputs=("q",), attrs={"eps": 1e-5, "head_dim": 8})  # Qwen3's
    *before, step = fusion.plan(
        block(*PARTS, norm, replace(Q_ROPE, inputs=("norm",)), K_ROPE, ATTENTION), {}
    )
    assert isinstance(step, fusion.Attention)
    assert names([*before, step]) == ["q", "norm", "k v q_rope k_rope a"]
    assert step.parts == (("norm", 0), ("x", 8), ("x", 16))


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        (
            (*PARTS, Q_ROPE, K_ROPE, ATTENTION, Node("s", "add", ("v", "a"))),
            "q k q_rope k_rope a",
        ),  # v is read again
        ((*PARTS, Q_ROPE, K_ROPE, ATTENTION, Node("s", "add", ("k_rope", "a"))), "a"),
        ((*PARTS, Q_ROPE, replace(K_ROPE, attrs=ATTRS | {"theta": 1.0}), ATTENTION), "a"),
        ((*PARTS, Q_ROPE, replace(ATTENTION, inputs=("q_rope", "k", "v"))), "a"),
        (
            (*PARTS, Q_ROPE, K_ROPE, replace(ATTENTION, attrs=ATTENTION.attrs | {"head_dim": 4})),
            "a",
        ),
    ],
)
def test_an_attention_leaves_what_others_read_and_what_is_no_rope_of_its_own(nodes, wanted):
    steps = fusion.plan(block(*nodes), {})
    assert next(name for name in names(steps) if name.endswith("a")) == wanted


def test_a_bias_comes_before_the_residual_stream():
    nodes = (Node("l", "linear", ("x",)), Node("a", "add", ("x", "l")))
    (first, second) = fusion.plan(block(*nodes), {"l": {"bias": None}})
    assert isinstance(first, Product)
    assert (first.residual, second) == (None, nodes[1])


def with_bias(unit: Block, name: str) -> Block:
    bias = in_memory("bias", Dense(np.linspace(-1, 1, 32).astype(np.float32)))
    return replace(
        unit,
        nodes=tuple(
            replace(n, weights=n.weights | {"bias": bias}) if n.name == name else n
            for n in unit.nodes
        ),
    )


@pytest.mark.parametrize(
    ("joined", "bias"),
    [
        pytest.param(True, True, id="joined-bias"),
        pytest.param(False, False, id="apart-plain", marks=pytest.mark.slow),
        pytest.param(True, False, id="joined-plain", marks=pytest.mark.slow),
        pytest.param(False, True, id="apart-bias", marks=pytest.mark.slow),
    ],
)
def test_values_are_those_of_the_nodes(monkeypatch, joined, bias):
    graph = Pipeline([*ROWS, *(["fuse"] if joined else [])])(tiny_graph(layers=1))
    monkeypatch.setitem(
        kernels.BACKENDS, "fusing", kernels.Triton(interpret=True, settings=Settings(gemv_tokens=2))
    )
    calls = []
    fused = kernels.fused

    def counted(x, weight, *around, **how):
        if (y := fused(x, weight, *around, **how)) is not None:
            calls.append(around)
        return y

    monkeypatch.setattr(kernels, "fused", counted)
    unit = with_bias(graph.blocks[0], "self_attn.o_proj") if bias else graph.blocks[0]
    weights, x = (
        weights_of(unit),
        np.random.default_rng(0).standard_normal((1, 2, 32)).astype(np.float32),
    )

    def run(weights, x, backend):
        return execute.output(unit, weights, x, backend=backend)

    found, wanted = (
        unoptimized(run, static_argnames="backend")(weights, x, backend=backend)
        for backend in ("fusing", "xla")
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(np.asarray(wanted)).max())
    assert len(calls) == (4 if joined else 7)
    assert sum(norm is not None for norm, _, _ in calls) == (2 if joined else 5)
    assert sum(gated for _, _, gated in calls) == joined
    assert sum(residual is not None for _, residual, _ in calls) == 2 - bias


@pytest.mark.parametrize(
    "attrs",
    [
        {"rotary": 4},
        {"scaling": ("yarn", 4.0, 32, 32.0, 1.0, True, 1.1)},
        {"scaling": ("longrope", 32, (1.0,) * 4, (2.0,) * 4, 1.0)},
    ],
    ids=["part of a head", "a factor on cos and sin", "by length"],
)
def test_ropes_that_kernels_do_not_compute_run_by_themselves(attrs):
    block = tiny_graph(layers=1).blocks[0]
    for name in ("self_attn.q_rope", "self_attn.k_rope"):
        node = block.node(name)
        block = block.replace_node(replace(node, attrs=node.attrs | attrs))
    assert {"self_attn.q_rope", "self_attn.k_rope", "self_attn.attention"} <= set(read(block))


def test_an_attention_without_rope_runs_by_itself():
    block = tiny_graph(layers=1).blocks[0]
    attention = replace(
        block.node("self_attn.attention"), inputs=tuple(f"self_attn.{n}_proj" for n in "qkv")
    )
    nodes = tuple(node for node in block.nodes if node.op != "rope")
    bare = replace(block, nodes=nodes).replace_node(attention)
    assert "self_attn.attention" in read(bare)


@pytest.mark.parametrize("attrs", [{"scale": 0.5}, {"softcap": 50.0}])
def test_scores_that_kernels_do_not_compute_run_by_themselves(attrs):
    block = tiny_graph(layers=1).blocks[0]
    node = block.node("self_attn.attention")
    changed = block.replace_node(replace(node, attrs=node.attrs | attrs))
    assert {"self_attn.q_rope", "self_attn.attention"} <= set(read(changed))
