"""The engine: which values it gives, from which, and that ways to run a unit agree."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.ir import Node
from atd.models import execute, ops
from atd.models.execute import compiled_node, dense_weights, needed, run, structure_of
from atd.pipeline import Pipeline
from tests.models.tiny import tiny_graph

UNIT = tiny_graph(layers=1).blocks[0]
WEIGHTS = dense_weights(UNIT.nodes)
X = np.random.default_rng(0).standard_normal((2, 8, 32)).astype(np.float32)


@pytest.mark.exact
def test_values_are_those_of_the_nodes_run_one_by_one():
    values = {"x": jnp.asarray(X)}
    for node in UNIT.nodes:
        inputs = [values[name] for name in node.inputs]
        values[node.name], cache = ops.run_node(node, inputs, WEIGHTS[node.name], ops.from_start(X))
        assert cache is None
    names = [node.name for node in UNIT.nodes]
    found, cache = run(UNIT, WEIGHTS, {"x": X}, names)
    assert list(found) == names
    assert cache == {}
    for name, value in found.items():
        np.testing.assert_array_equal(value, values[name], err_msg=name)
    np.testing.assert_array_equal(execute.output(UNIT, WEIGHTS, X), values[UNIT.output])


def test_each_node_compiled_by_itself():
    nodes = [node.name for node in UNIT.nodes]
    found, _ = run(UNIT, WEIGHTS, {"x": X}, nodes, run_node=compiled_node)
    wanted, _ = run(UNIT, WEIGHTS, {"x": X}, nodes)
    for name in nodes:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5, err_msg=name)


def test_only_what_is_needed_runs():
    assert [n.name for n in needed(UNIT, {"x"}, ["mlp.up_proj"])][-2:] == [
        "post_attention_layernorm",
        "mlp.up_proj",
    ]
    known = {"self_attn.residual", "mlp.up_proj"}
    assert [n.name for n in needed(UNIT, known, ["mlp.silu_mul"])] == [
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.silu_mul",
    ]
    assert needed(UNIT, {"x"}, ["x"]) == ()
    ran = []

    def watched(node, *rest):
        ran.append(node.name)
        return ops.run_node(node, *rest)

    run(UNIT, WEIGHTS, {"x": X}, ["input_layernorm"], run_node=watched)
    assert ran == ["input_layernorm"]


@pytest.mark.exact
def test_it_goes_on_from_values_inside():
    names = ["self_attn.residual", UNIT.output]
    values, _ = run(UNIT, WEIGHTS, {"x": X}, names)
    again, _ = run(UNIT, WEIGHTS, {"self_attn.residual": values["self_attn.residual"]})
    np.testing.assert_array_equal(again[UNIT.output], values[UNIT.output])


def test_the_gradient_by_an_offset_is_that_of_the_value():
    """An offset of up_proj, against a bias of it."""
    name = "mlp.up_proj"

    def by_offset(offset):
        return jnp.sum(execute.output(UNIT, WEIGHTS, X, offsets={name: offset}) ** 2)

    def by_value(value):
        known = {"self_attn.residual": residual, name: value}
        return jnp.sum(run(UNIT, WEIGHTS, known)[0][UNIT.output] ** 2)

    values, _ = run(UNIT, WEIGHTS, {"x": X}, ["self_attn.residual", name])
    residual = values["self_attn.residual"]
    found = jax.grad(by_offset)(jnp.zeros((2, 8, 48)))
    np.testing.assert_allclose(found, jax.grad(by_value)(values[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", ["wanted", "offsets"])
def test_values_inside_a_product_are_not_left_out(option, monkeypatch):
    """A kernel that computes norm, product and SwiGLU at once is not taken where a value inside is
    asked for.
    """
    (block,) = Pipeline(["fuse"])(tiny_graph(layers=1)).blocks
    weights, inner, calls = dense_weights(block.nodes), "mlp.gate_up_proj", []
    kernel = lambda *arguments: calls.append(arguments[0].nodes[-1].name)  # noqa: E731
    monkeypatch.setattr(execute, "_product", kernel)
    offsets = {inner: jnp.zeros(())} if option == "offsets" else {}
    wanted = [inner, block.output] if option == "wanted" else [block.output]
    values, _ = run(block, weights, {"x": X}, wanted, offsets=offsets)
    assert set(values) == set(wanted)
    assert "mlp.residual" in calls
    assert "mlp.silu_mul" not in calls


def test_structures_are_equal_where_compilations_can_be_shared():
    first, second = tiny_graph(layers=2).blocks
    noted = replace(first, nodes=tuple(note(node) for node in first.nodes))
    assert structure_of(first) == structure_of(second) == structure_of(noted)
    assert hash(structure_of(first)) == hash(structure_of(noted))
    other = replace(first, nodes=first.nodes[:-1])
    assert structure_of(first) != structure_of(other)
    assert all(not node.weights for node in structure_of(first).block.nodes)


def note(node: Node) -> Node:
    return replace(node, attrs=node.attrs | {"unit_gain": True})


@pytest.mark.parametrize(("width", "block"), [(2, 2), (12, 4), (96, 32), (4096, 2048)])
def test_hadamard_is_the_product_with_the_matrix(width, block):
    """Which is orthogonal and its own inverse."""
    x = np.random.default_rng(0).standard_normal((2, 3, width)).astype(np.float32)
    node = Node("h", "hadamard", ("x",), attrs={"block": block})
    found, _ = ops.run_node(node, [jnp.asarray(x)], {})
    matrix = np.array([[1.0]])
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    expected = (x.reshape(2, 3, -1, block) @ matrix).reshape(x.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    again, _ = ops.run_node(node, [found], {})
    np.testing.assert_allclose(again, x, atol=1e-5)


def test_hadamard_keeps_the_dtype():
    x = jnp.ones((1, 1, 8), jnp.bfloat16)
    assert ops.hadamard(x, 8).dtype == jnp.bfloat16
