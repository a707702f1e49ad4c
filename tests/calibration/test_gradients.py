"""Units run forward as the loaded model does, and gradients through them are right."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.calibration import gradients
from atd.calibration.gradients import divergence, forward
from atd.calibration.trainable import merged, trainable
from atd.ir import in_memory
from atd.models import execute
from atd.models.model import load
from atd.weights import Dense, TernaryType
from tests.calibration.converted import free_fused, moved, rough, tied_rotated, trellis_packed
from tests.models.tiny import tiny_graph

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 16)).astype(np.int32)


MAKE = [tied_rotated, free_fused]


def random(*shape, scale: float = 1.0, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def run(units, parameters):
    x = jnp.asarray(TOKENS)
    for unit, moves in zip(units, parameters, strict=True):
        x = forward(unit, moves, x)
    return np.asarray(x)


@pytest.mark.parametrize("make", [tied_rotated, pytest.param(free_fused, marks=pytest.mark.slow)])
def test_forward_is_the_loaded_model_before_and_after_they_move(make):
    graph = make()
    units = [trainable(unit, codes=True) for unit in graph.units[:-1]]
    start = np.asarray(load(graph).hidden(TOKENS))
    np.testing.assert_allclose(
        run(units, [unit.parameters for unit in units]), start, atol=2e-5, rtol=1e-4
    )
    parameters = [moved(unit, 0.03) for unit in units]
    made = replace(graph, prologue=merged(units[0], parameters[0]))
    made = replace(
        made, blocks=tuple(merged(u, p) for u, p in zip(units[1:], parameters[1:], strict=True))
    )
    hidden = np.asarray(load(made).hidden(TOKENS))
    assert np.abs(hidden - start).max() > 0.01
    tolerance = 0.05 if make is free_fused else 1e-4  # rounded scales, and codes that these move
    np.testing.assert_allclose(hidden, run(units, parameters), atol=tolerance, rtol=1e-3)


def test_backward_is_the_gradient_of_forward():
    """Along a random direction of scales, gains and the input."""
    unit = trainable(tied_rotated().blocks[0], codes=True)
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
    prologue = trainable(free_fused().prologue)
    moves, none = gradients.backward(prologue, prologue.parameters, jnp.asarray(TOKENS), g)
    assert none is None
    assert np.abs(moves["embed_tokens"]["scales"]).max() > 0


@pytest.mark.parametrize("make", [tied_rotated, trellis_packed])
def test_gradients_by_the_scales_of_rows_are_those_of_the_whole_weight(make):
    """One scale for each output takes no gradient by the weight; a bias is not scaled."""
    block = make().blocks[0]
    bias = in_memory("bias", Dense(random(32, seed=4)))
    o = block.node("self_attn.o_proj")
    unit = trainable(block.replace_node(replace(o, weights=o.weights | {"bias": bias})))
    x, g, at = random(2, 16, 32), random(2, 16, 32, seed=2), moved(unit, 0.05)
    whole = jax.grad(lambda moves: jnp.vdot(forward(unit, moves, x), g))(at)
    found, _ = gradients.backward(unit, at, x, g)
    assert found.keys() == whole.keys() >= {"self_attn.o_proj", "mlp.down_proj"}
    for name, kinds in whole.items():
        for kind, slope in kinds.items():
            np.testing.assert_allclose(found[name][kind], slope, rtol=1e-3, atol=1e-4)


def test_units_of_one_structure_share_their_programs(monkeypatch):
    run, traced = execute.run, []
    monkeypatch.setattr(execute, "run", lambda *a, **b: (traced.append(a[0]), run(*a, **b))[1])
    x = random(3, 8, 32)  # a shape of its own, which no other test has compiled
    for block in tied_rotated().blocks:
        unit = trainable(block)
        forward(unit, unit.parameters, x)
        gradients.backward(unit, unit.parameters, x, x)
    assert len(traced) == 2  # forward and backward, once each


def test_divergence_is_the_kl_of_the_heads():
    dense = tiny_graph()
    teacher, head = (
        trainable(graph.epilogue, scales=False, gains=False) for graph in (dense, free_fused())
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
        trainable(graph.prologue),
        trainable(graph.epilogue),
        trainable(dense.epilogue),
    )
    parameters = moved(prologue, 0.05)
    given = dense.prologue.node("embed_tokens").weights["weight"].load().dequantize()
    hidden, target = random(5, 32), random(5, 32, seed=2)

    def loss(p):
        table = gradients.embedding_matrix(prologue, p)
        return divergence(head, head.parameters, hidden, teacher, target, table, jnp.asarray(given))

    table = gradients.embedding_matrix(prologue, parameters)
    slope = jax.grad(
        lambda t: divergence(head, head.parameters, hidden, teacher, target, t, jnp.asarray(given))
    )(table)
    found = gradients.embedding_backward(prologue, parameters, slope)["embed_tokens"]["scales"]
    np.testing.assert_allclose(
        found, jax.grad(loss)(parameters)["embed_tokens"]["scales"], rtol=1e-3, atol=1e-6
    )
