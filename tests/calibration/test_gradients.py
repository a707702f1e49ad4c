"""Tuning: a unit's weights as functions of parameters are the stored ones at the start, and their gradients are right."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.calibration import gradients
from atd.calibration.gradients import dequantize, divergence, forward, grid_of, settled, tunable
from atd.ir import Graph, in_memory
from atd.models import execute
from atd.models.model import load
from atd.pipeline import Pipeline
from atd.weights import DTYPES, DenseType, Packed, PackedType, Ternary, TernaryType
from atd.weights.layouts import LAYOUTS
from tests.models.tiny import tiny_graph

ROWS, INPUTS = 6, 80  # with groups of 32 the last one is smaller
KINDS = [
    (True, "row", 2),
    (True, 32, 1),
    (True, 32, 3),
    (False, "row", 1),
    (False, 32, 2),
    (False, "row", 3),
]


def ternary(type: TernaryType, seed: int = 0) -> Ternary:
    """Any trits, and scales as decompose makes them: those of a group descend."""
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (*type.shape, type.bases)).astype(np.int8)
    rows, groups = (
        (1, 1) if type.group == "tensor" else (type.shape[0], -(-type.shape[1] // type.group_size))
    )
    base = 0.02 * 3.0 ** np.arange(0 if type.tied else type.bases - 1, -1, -1)
    scales = base * rng.uniform(0.8, 1.25, (rows, groups, len(base)))
    return Ternary(trits, scales.astype(DTYPES[type.dtype]), type)


def packed(weight: Ternary) -> Packed:
    layout = LAYOUTS["interleaved"]
    return Packed(layout.pack(weight.trits), weight.scales, PackedType(weight.type, layout.name))


def random(*shape, scale: float = 1.0, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


# --- one matrix ---

weigh = jax.jit(dequantize)
slopes = jax.jit(
    lambda grid, moves, given: jax.grad(lambda m: jnp.sum(dequantize(grid, m) * given))(moves)
)


@pytest.mark.parametrize(("tied", "group", "bases"), [*KINDS, (False, "tensor", 2)])
def test_a_matrix(tied, group, bases):
    """At the start nothing has changed; gradients of scales are numerical ones; those of codes go straight through."""
    weight = ternary(TernaryType((ROWS, INPUTS), bases, group, tied, "f16"))
    grid, wanted = grid_of(weight), np.asarray(weight.dequantize(), np.float32)
    again = grid_of(packed(weight))
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(grid), jax.tree.leaves(again), strict=True)
    )
    scales, theta = np.asarray(grid.scales), random(*grid.scales.shape, scale=0.05)
    start = {"scales": np.zeros_like(theta), "codes": np.zeros((ROWS, INPUTS), np.float32)}
    for moves in ({}, start):
        np.testing.assert_allclose(weigh(grid, moves), wanted, rtol=1e-6)

    given = random(ROWS, INPUTS)
    found = np.asarray(slopes(grid, {"scales": theta}, given)["scales"])
    for index in list(np.ndindex(*scales.shape))[:: max(1, scales.size // 5)]:
        step = np.zeros_like(theta)
        step[index] = 0.03
        ends = [
            (np.asarray(weigh(grid, {"scales": at}), np.float64) * given).sum()
            for at in (theta + step, theta - step)
        ]
        assert found[index] == pytest.approx((ends[0] - ends[1]) / 0.06, rel=1e-3, abs=1e-4)
    with_codes = slopes(grid, start, given)["scales"]
    np.testing.assert_allclose(
        with_codes, slopes(grid, {"scales": start["scales"]}, given)["scales"], atol=1e-5
    )

    unit = np.broadcast_to(np.repeat(scales[..., -1], grid.size, axis=1)[:, :INPUTS], wanted.shape)
    every = levels(scales, grid, tied, bases)  # [rows, in, levels]
    delta = random(ROWS, INPUTS, scale=2.0)
    latent = wanted + delta * unit
    inside = np.abs(latent) <= every.max(-1) + unit / 2
    clear = np.abs(np.abs(latent) - every.max(-1) - unit / 2) > 1e-3 * unit
    assert 0 < inside.sum() < inside.size
    gradient = np.asarray(slopes(grid, start | {"codes": delta}, given)["codes"])
    np.testing.assert_allclose(gradient[clear], (given * unit * inside)[clear], rtol=1e-5)
    made = np.asarray(weigh(grid, start | {"codes": delta}))
    np.testing.assert_allclose(
        np.abs(made - latent), np.abs(every - latent[..., None]).min(-1), atol=1e-6
    )


def levels(scales: np.ndarray, grid: gradients.Grid, tied: bool, bases: int) -> np.ndarray:
    """Every level of each weight's group, counted out."""
    sums = np.array(np.meshgrid(*[[-1, 0, 1]] * bases, indexing="ij")).reshape(bases, -1)
    each = scales * 3.0 ** np.arange(bases - 1, -1, -1) if tied else scales
    return np.repeat(each @ sums, grid.size, axis=1)[:, :INPUTS]


def test_scales_that_cross_keep_their_trits():
    """Free scales that a step brings out of order: the weights are still the levels nearest to the latent ones."""
    grid = grid_of(ternary(TernaryType((ROWS, INPUTS), 2, "row", False, "f16")))
    theta = np.zeros(grid.scales.shape, np.float32)
    theta[..., 0], theta[..., 1] = -1.0, 1.0
    scales = np.asarray(grid.scales) * np.exp(theta)
    assert (scales[..., 0] < scales[..., 1]).all()
    moves = {"scales": theta, "codes": np.zeros((ROWS, INPUTS), np.float32)}
    latent, every = np.asarray(weigh(grid, {})), levels(scales, grid, False, 2)
    made = np.asarray(weigh(grid, moves))
    np.testing.assert_allclose(
        np.abs(made - latent), np.abs(every - latent[..., None]).min(-1), atol=1e-5
    )


# --- units ---

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 16)).astype(np.int32)


def rough(graph: Graph, form: TernaryType, nodes: str = ".*", after: tuple = ()) -> Graph:
    """The graph with ternary weights of the form's kind in place of its dense matrices. (als takes its time to compile.)"""

    def node(unit, node):
        ref = node.weights.get("weight")
        if node.op not in ("linear", "embed") or ref is None or not isinstance(ref.type, DenseType):
            return node
        if not re.fullmatch(nodes, unit.full_name(node)):
            return node
        group = (
            form.group if isinstance(form.group, int) and form.group < ref.type.shape[1] else "row"
        )
        weight = ternary(replace(form, shape=ref.type.shape, group=group), seed=len(node.name))
        return replace(node, weights=node.weights | {"weight": in_memory(ref.tensor, weight)})

    units = (replace(unit, nodes=tuple(node(unit, n) for n in unit.nodes)) for unit in graph.units)
    return Pipeline(after)(graph.with_units(tuple(units)))


def tied_rotated() -> Graph:
    """A tied model, rotated: its embedding is dense and followed by rotate_in."""
    graph = Pipeline(["fold_norms", "rotate"])(tiny_graph(tied=True))
    return rough(graph, TernaryType((1, 1), 2, "row", True, "f32"), r"model\.layers\..*")


def free_fused() -> Graph:
    """All matrices, embedding and head too, with free scales in groups, packed and joined."""
    return rough(tiny_graph(), TernaryType((1, 1), 2, 32, False, "f16"), after=("pack", "fuse"))


MAKE = [tied_rotated, free_fused]


def moved(unit: gradients.Unit, scale: float, seed: int = 0) -> gradients.Parameters:
    """Parameters off their start; codes by about a level."""
    rng = np.random.default_rng(seed)
    size = {"scales": scale, "gain": scale, "codes": 20 * scale}
    return {
        name: {
            kind: jnp.asarray(rng.standard_normal(a.shape) * size[kind], jnp.float32)
            for kind, a in moves.items()
        }
        for name, moves in unit.parameters.items()
    }


def run(units, parameters):
    x = jnp.asarray(TOKENS)
    for unit, moves in zip(units, parameters, strict=True):
        x = forward(unit, moves, x)
    return np.asarray(x)


@pytest.mark.parametrize("make", MAKE)
def test_forward_is_the_loaded_model_before_and_after_tuning(make):
    graph = make()
    units = [tunable(unit, codes=True) for unit in graph.units[:-1]]
    start = np.asarray(load(graph).hidden(TOKENS))
    np.testing.assert_allclose(
        run(units, [unit.parameters for unit in units]), start, atol=2e-5, rtol=1e-4
    )
    parameters = [moved(unit, 0.03) for unit in units]
    made = replace(graph, prologue=settled(units[0], parameters[0]))
    made = replace(
        made, blocks=tuple(settled(u, p) for u, p in zip(units[1:], parameters[1:], strict=True))
    )
    hidden = np.asarray(load(made).hidden(TOKENS))
    assert np.abs(hidden - start).max() > 0.01
    tolerance = 0.05 if make is free_fused else 1e-4  # rounded scales, and codes that these move
    np.testing.assert_allclose(hidden, run(units, parameters), atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize("make", MAKE)
def test_settled_keeps_types_and_values(make):
    """What is stored is what the parameters say, but for the rounding of scales; moved gains are no longer ones."""
    graph = make()
    for block in (graph.prologue, graph.blocks[0], graph.epilogue):
        unit = tunable(block, codes=True)
        parameters = moved(unit, 0.03)
        made, wanted = settled(unit, parameters), gradients.weights(unit.fixed, parameters)
        assert [node.name for node in made.nodes] == [node.name for node in block.nodes]
        for before, after in zip(block.nodes, made.nodes, strict=True):
            for slot, ref in after.weights.items():
                assert str(ref.type) == str(before.weights[slot].type), after.name
                weight = ref.load()
                assert weight.type == ref.type
                value, asked = (
                    np.asarray(weight.dequantize(), np.float32),
                    np.asarray(wanted[after.name][slot].dequantize()),
                )
                close = np.isclose(value, asked, rtol=2e-3, atol=1e-5)
                assert close.mean() > 0.995, f"{after.name}: {1 - close.mean():.2%} differ"
            if after.op == "rms_norm":
                assert "unit_gain" not in after.attrs


def test_what_does_not_move_is_left_alone():
    graph = tied_rotated()
    block = graph.prologue
    assert any(node.name == "rotate_in" for node in block.nodes)
    unit = tunable(block, codes=True)
    assert "rotate_in" not in unit.parameters
    assert settled(unit, {}) == unit.block
    fixed = tunable(graph.blocks[0], scales=False, gains=False)
    assert fixed.parameters == {}


def test_backward_is_the_gradient_of_forward():
    """Along a random direction of scales, gains and the input."""
    unit = tunable(tied_rotated().blocks[0], codes=True)
    x, g, direction = random(2, 16, 32), random(2, 16, 32, seed=2), random(2, 16, 32, seed=3)
    at, along = moved(unit, 0.01), moved(unit, 1.0, seed=1)
    for kinds in at.values():
        if "codes" in kinds:
            kinds["codes"] = jnp.zeros_like(
                kinds["codes"]
            )  # in the middle of their levels, so that none jumps

    def f(step: float) -> float:
        moves = {
            name: {
                kind: a if kind == "codes" else a + step * along[name][kind]
                for kind, a in kinds.items()
            }
            for name, kinds in at.items()
        }
        return float((np.asarray(forward(unit, moves, x + step * direction), np.float64) * g).sum())

    moves, at_input = gradients.backward(unit, at, x, g)
    slope = float((np.asarray(at_input) * direction).sum())
    for name, kinds in moves.items():
        slope += sum(
            float((np.asarray(a) * along[name][k]).sum()) for k, a in kinds.items() if k != "codes"
        )
        assert all(np.abs(a).max() > 0 for a in kinds.values()), name
    assert slope == pytest.approx((f(3e-3) - f(-3e-3)) / 6e-3, rel=0.01)
    prologue = tunable(free_fused().prologue)
    moves, none = gradients.backward(prologue, prologue.parameters, jnp.asarray(TOKENS), g)
    assert none is None
    assert np.abs(moves["embed_tokens"]["scales"]).max() > 0


def test_units_of_one_structure_share_their_programs(monkeypatch):
    run, traced = execute.run, []
    monkeypatch.setattr(execute, "run", lambda *a, **b: (traced.append(a[0]), run(*a, **b))[1])
    x = random(3, 8, 32)  # a shape of its own, which no other test has compiled
    for block in tied_rotated().blocks:
        unit = tunable(block)
        forward(unit, unit.parameters, x)
        gradients.backward(unit, unit.parameters, x, x)
    assert len(traced) == 2  # forward and backward, once each


def test_divergence_is_the_kl_of_the_heads():
    dense = tiny_graph()
    teacher, head = (
        tunable(graph.epilogue, scales=False, gains=False) for graph in (dense, free_fused())
    )
    hidden, target = random(5, 32), random(5, 32, seed=2)
    assert float(divergence(teacher, {}, target, teacher, target, None, None)) == pytest.approx(
        0, abs=1e-6
    )

    def logs(unit, x):
        return np.asarray(jax.nn.log_softmax(forward(unit, {}, x[None])[0]), np.float64)

    p, q = logs(teacher, target), logs(head, hidden)
    wanted = (np.exp(p) * (p - q)).sum(-1).mean()
    assert float(divergence(head, {}, hidden, teacher, target, None, None)) == pytest.approx(
        wanted, rel=1e-4
    )


def test_a_tied_head_reads_the_embedding_as_it_moves():
    dense = tiny_graph(tied=True)
    graph = rough(dense, TernaryType((1, 1), 2, 32, False, "f16"), after=("pack",))
    prologue, head, teacher = (
        tunable(graph.prologue),
        tunable(graph.epilogue),
        tunable(dense.epilogue),
    )
    parameters = moved(prologue, 0.05)
    given = dense.prologue.node("embed_tokens").weights["weight"].load().dequantize()
    hidden, target = random(5, 32), random(5, 32, seed=2)

    def loss(p):
        table = gradients.table(prologue, p)
        return divergence(head, head.parameters, hidden, teacher, target, table, jnp.asarray(given))

    table = gradients.table(prologue, parameters)
    slope = jax.grad(
        lambda t: divergence(head, head.parameters, hidden, teacher, target, t, jnp.asarray(given))
    )(table)
    found = gradients.table_backward(prologue, parameters, slope)["embed_tokens"]["scales"]
    np.testing.assert_allclose(
        found, jax.grad(loss)(parameters)["embed_tokens"]["scales"], rtol=1e-3, atol=1e-6
    )
