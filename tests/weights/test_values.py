"""Values of weights: the one equation each stands for, for numpy and jax alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atd.weights import (
    Dense,
    DenseType,
    Packed,
    PackedType,
    Ternary,
    TernaryType,
    build,
    combine,
    level_weights,
)
from atd.weights.layouts import LAYOUTS
from tests.weights.types import PACKED_TYPES, TERNARY_TYPES, random_ternary


def by_definition(ternary: Ternary) -> np.ndarray:
    """w[o, k] = sum_i s[o, k // g, i] t[o, k, i] in float64, one weight at a time."""
    type, scales = ternary.type, np.asarray(ternary.scales, np.float64)
    weight = np.zeros(type.shape)
    for o, k in np.ndindex(type.shape):
        row = 0 if type.group == "tensor" else o
        group = k // type.group if isinstance(type.group, int) else 0
        s = scales[row, group]
        s = [s[0] * 3 ** (type.bases - 1 - i) for i in range(type.bases)] if type.tied else s
        weight[o, k] = sum(s[i] * ternary.trits[o, k, i] for i in range(type.bases))
    return weight


@pytest.mark.exact
@settings(max_examples=60, deadline=None)
@given(TERNARY_TYPES.filter(lambda t: t.dtype != "f64"), st.integers(0, 2**32 - 1))
def test_dequantize_is_its_equation(type, seed):
    ternary = random_ternary(type, seed)
    expected = by_definition(ternary)
    found = ternary.dequantize()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    assert ternary.dequantize(np.float16).dtype == np.float16
    rows = slice(type.shape[0] // 2, None)
    scales = ternary.scales if type.group == "tensor" else ternary.scales[rows]
    np.testing.assert_array_equal(combine(ternary.trits[rows], scales, type), found[rows])


@pytest.mark.exact
@settings(max_examples=60, deadline=None)
@given(PACKED_TYPES, st.integers(0, 2**32 - 1))
def test_packed_is_ternary_bit_for_bit(type, seed):
    ternary = random_ternary(type.ternary, seed)
    packed = Packed(LAYOUTS[type.layout].pack(ternary.trits), ternary.scales, type)
    np.testing.assert_array_equal(packed.dequantize(), ternary.dequantize())
    np.testing.assert_array_equal(packed.unpack().trits, ternary.trits)
    assert packed.unpack().type == ternary.type


@pytest.mark.exact
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("group", [7, 48, "row", "tensor"])
def test_numpy_and_jit_agree_bit_for_bit(group, tied):
    ternary = random_ternary(TernaryType((8, 50), 3, group, tied, "f16"))
    type = PackedType(ternary.type, "interleaved")
    packed = Packed(LAYOUTS["interleaved"].pack(ternary.trits), ternary.scales, type)
    on_device = jax.tree.map(jnp.asarray, packed)  # types are static: pytrees of arrays alone
    assert isinstance(on_device, Packed)
    assert len(jax.tree.leaves(on_device)) == 2
    found = jax.jit(lambda weight: weight.dequantize())(on_device)
    if tied:  # one rounding: exact
        np.testing.assert_array_equal(found, ternary.dequantize())
    np.testing.assert_allclose(
        found, ternary.dequantize(), rtol=1e-6
    )  # free: XLA may fuse multiply and add


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_tied_levels_are_a_uniform_grid(bases):
    """All 3^N codes: u times each integer from -(3^N - 1) / 2 to (3^N - 1) / 2, once."""
    count = 3**bases
    trits = np.stack(
        [np.arange(count) // 3 ** (bases - 1 - i) % 3 - 1 for i in range(bases)], axis=-1
    ).astype(np.int8)
    scale = np.float16(0.123)
    type = TernaryType((1, count), bases, "row", True, "f16")
    weight = Ternary(trits[None], np.full((1, 1, 1), scale), type).dequantize()
    np.testing.assert_array_equal(
        weight[0], np.float32(scale) * np.arange(-(count // 2), count // 2 + 1, dtype=np.float32)
    )
    np.testing.assert_array_equal(
        trits @ level_weights(bases), np.arange(-(count // 2), count // 2 + 1)
    )


def test_dense():
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    weight = Dense(array)
    assert weight.type == DenseType((2, 3), "f16")
    assert weight.dequantize().dtype == np.float32
    np.testing.assert_array_equal(weight.dequantize(), array)
    assert build(weight.type, {"array": array}).type == weight.type
    assert jax.tree.leaves(weight) == [array]
