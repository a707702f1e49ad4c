"""A unit's weights as functions of parameters: the stored ones at the start, right gradients, and
back to a block.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.calibration.trainable import (
    QuantizedMatrix,
    dequantize,
    merged,
    quantized_matrix,
    trainable,
    weight_at,
    weights_at,
)
from atd.decomposition.trellis_codes import known_code
from atd.weights import Packed, PackedType, Ternary, TernaryType, Trellis, TrellisType
from atd.weights.layouts import LAYOUTS
from tests.calibration.converted import free_fused, moved, ternary, tied_rotated, trellis_packed

ROWS, INPUTS = 6, 80  # with groups of 32 the last one is smaller
KINDS = [
    (True, "row", 2),
    (True, 32, 1),
    (True, 32, 3),
    (False, "row", 1),
    (False, 32, 2),
    (False, "row", 3),
]


def packed(weight: Ternary) -> Packed:
    layout = LAYOUTS["interleaved"]
    return Packed(layout.pack(weight.trits), weight.scales, PackedType(weight.type, layout.name))


def random(*shape, scale: float = 1.0, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


weigh = jax.jit(dequantize)
slopes = jax.jit(
    lambda matrix, moves, given: jax.grad(lambda m: jnp.sum(dequantize(matrix, m) * given))(moves)
)


@pytest.mark.parametrize(("tied", "group", "bases"), [*KINDS, (False, "tensor", 2)])
def test_a_matrix(tied, group, bases):
    """At the start nothing has changed; gradients of scales are numerical ones; those of codes go
    straight through.
    """
    weight = ternary(TernaryType((ROWS, INPUTS), bases, group, tied, "f16"))
    matrix, wanted = quantized_matrix(weight), np.asarray(weight.dequantize(), np.float32)
    assert isinstance(matrix, QuantizedMatrix)
    again = quantized_matrix(packed(weight))
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(matrix), jax.tree.leaves(again), strict=True)
    )
    scales, theta = np.asarray(matrix.scales), random(*matrix.scales.shape, scale=0.05)
    start = {"scales": np.zeros_like(theta), "codes": np.zeros((ROWS, INPUTS), np.float32)}
    for moves in ({}, start):
        np.testing.assert_allclose(weigh(matrix, moves), wanted, rtol=1e-6)

    given = random(ROWS, INPUTS)
    found = np.asarray(slopes(matrix, {"scales": theta}, given)["scales"])
    for index in list(np.ndindex(*scales.shape))[:: max(1, scales.size // 5)]:
        step = np.zeros_like(theta)
        step[index] = 0.03
        ends = [
            (np.asarray(weigh(matrix, {"scales": at}), np.float64) * given).sum()
            for at in (theta + step, theta - step)
        ]
        assert found[index] == pytest.approx((ends[0] - ends[1]) / 0.06, rel=1e-3, abs=1e-4)
    with_codes = slopes(matrix, start, given)["scales"]
    np.testing.assert_allclose(
        with_codes, slopes(matrix, {"scales": start["scales"]}, given)["scales"], atol=1e-5
    )

    unit = np.broadcast_to(
        np.repeat(scales[..., -1], matrix.size, axis=1)[:, :INPUTS], wanted.shape
    )
    every = levels(scales, matrix, tied, bases)  # [rows, in, levels]
    delta = random(ROWS, INPUTS, scale=2.0)
    latent = wanted + delta * unit
    inside = np.abs(latent) <= every.max(-1) + unit / 2
    clear = np.abs(np.abs(latent) - every.max(-1) - unit / 2) > 1e-3 * unit
    assert 0 < inside.sum() < inside.size
    gradient = np.asarray(slopes(matrix, start | {"codes": delta}, given)["codes"])
    np.testing.assert_allclose(gradient[clear], (given * unit * inside)[clear], rtol=1e-5)
    made = np.asarray(weigh(matrix, start | {"codes": delta}))
    np.testing.assert_allclose(
        np.abs(made - latent), np.abs(every - latent[..., None]).min(-1), atol=1e-6
    )


def levels(scales: np.ndarray, matrix: QuantizedMatrix, tied: bool, bases: int) -> np.ndarray:
    """Every level of each weight's group, counted out."""
    sums = np.array(np.meshgrid(*[[-1, 0, 1]] * bases, indexing="ij")).reshape(bases, -1)
    each = scales * 3.0 ** np.arange(bases - 1, -1, -1) if tied else scales
    return np.repeat(each @ sums, matrix.size, axis=1)[:, :INPUTS]


def test_scales_that_cross_keep_their_trits():
    """Free scales that a step brings out of order: the weights are still the levels nearest to the
    latent ones.
    """
    matrix = quantized_matrix(ternary(TernaryType((ROWS, INPUTS), 2, "row", False, "f16")))
    assert isinstance(matrix, QuantizedMatrix)
    theta = np.zeros(matrix.scales.shape, np.float32)
    theta[..., 0], theta[..., 1] = -1.0, 1.0
    scales = np.asarray(matrix.scales) * np.exp(theta)
    assert (scales[..., 0] < scales[..., 1]).all()
    moves = {"scales": theta, "codes": np.zeros((ROWS, INPUTS), np.float32)}
    latent, every = np.asarray(weigh(matrix, {})), levels(scales, matrix, False, 2)
    made = np.asarray(weigh(matrix, moves))
    np.testing.assert_allclose(
        np.abs(made - latent), np.abs(every - latent[..., None]).min(-1), atol=1e-5
    )


@pytest.mark.parametrize("bases", [2, 1.5])
def test_a_matrix_with_a_trellis_code(bases):
    """Its scales move, and its trits stay."""
    type = TrellisType((12, INPUTS), known_code(bases), 12, "f16")
    rng = np.random.default_rng(3)
    trits = rng.integers(-1, 2, type.trits_shape).astype(np.int8)
    weight = Trellis(trits, rng.uniform(0.5, 2, type.scales_shape).astype(np.float16), type)
    matrix, theta = quantized_matrix(weight), random(12, 1, 1, scale=0.1)
    wanted = np.asarray(weight.dequantize())
    np.testing.assert_allclose(weight_at(matrix, {}), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        weight_at(matrix, {"scales": jnp.asarray(theta)}), wanted * np.exp(theta[:, 0]), rtol=1e-5
    )


# --- units ---


@pytest.mark.parametrize("make", [tied_rotated, free_fused, trellis_packed])
def test_merged_keeps_types_and_values(make):
    """What is stored is what the parameters say, but for the rounding of scales; moved gains are no
    longer ones.
    """
    graph = make()
    for block in (graph.prologue, graph.blocks[0], graph.epilogue):
        unit = trainable(block, codes=True)
        parameters = moved(unit, 0.03)
        made, wanted = merged(unit, parameters), weights_at(unit, parameters)
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
    unit = trainable(block, codes=True)
    assert "rotate_in" not in unit.parameters
    assert merged(unit, {}) == unit.block
    fixed = trainable(graph.blocks[0], scales=False, gains=False)
    assert fixed.parameters == {}
