"""Weight types and values: their text, their bytes, and the one equation each stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atd.weights import (
    DTYPES,
    Dense,
    DenseType,
    Packed,
    PackedType,
    Ternary,
    TernaryType,
    bits_per_weight,
    build,
    combine,
    level_weights,
    parse_type,
    stored,
)
from atd.weights.layouts import LAYOUTS

GROUPS = st.one_of(st.integers(1, 300), st.sampled_from(["row", "tensor"]))
SIDES = st.integers(1, 90)
TERNARY_TYPES = st.builds(
    TernaryType,
    st.tuples(SIDES, SIDES),
    st.integers(1, 4),
    GROUPS,
    st.booleans(),
    st.sampled_from(list(DTYPES)),
)
DENSE_TYPES = st.builds(
    DenseType, st.lists(SIDES, max_size=3).map(tuple), st.sampled_from(list(DTYPES))
)


def packed_type(ternary: TernaryType, layout: str) -> PackedType:
    out, inputs = ternary.shape
    if layout == "hf-bitnet":  # rows by fours, one base
        ternary = TernaryType((4 * out, inputs), 1, ternary.group, ternary.tied, ternary.dtype)
    return PackedType(ternary, layout)


PACKED_TYPES = st.builds(packed_type, TERNARY_TYPES, st.sampled_from(list(LAYOUTS)))


def random_ternary(type: TernaryType, seed=0) -> Ternary:
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (*type.shape, type.bases)).astype(np.int8)
    return Ternary(trits, rng.uniform(0.001, 2, type.scales_shape).astype(DTYPES[type.dtype]), type)


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


# --- text ------------------------------------------------------------------------------------------------------------


@given(st.one_of(DENSE_TYPES, TERNARY_TYPES, PACKED_TYPES))
def test_text_is_the_storage_form(type):
    assert parse_type(str(type)) == type


def test_text_as_it_is_stored_in_files():
    """Written out, because files that exist hold it."""
    ternary = TernaryType((8, 20), 2, 128, False, "f16")
    assert str(DenseType((8, 20), "bf16")) == "dense bf16[8,20]"
    assert str(ternary) == "ternary n=2 g=128 free f16[8,20]"
    assert str(TernaryType((8, 20), 3, "row", True, "f32")) == "ternary n=3 g=row tied f32[8,20]"
    assert str(PackedType(ternary, "bit-ttt")) == "packed n=2 g=128 free layout=bit-ttt/1 f16[8,20]"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dense",
        "dense f16",
        "dense i8[2,3]",
        "dense f16[2,3] ",
        "dense n=2 g=128 free f16[2,3]",
        "dense layout=interleaved/1 f16[2,3]",
        "ternary f16[2,3]",
        "ternary n=2 g=128 f16[2,3]",
        "ternary n=2 g=col free f16[2,3]",
        "ternary n=2 g=128 free f16[2]",
        "ternary n=2 g=128 free f16[2,3,4]",
        "ternary n=2 g=128 free layout=interleaved/1 f16[2,3]",
        "packed n=2 g=128 free f16[2,3]",
        "packed layout=interleaved/1 f16[2,3]",
        "sparse f16[2,3]",
    ],
)
def test_text_that_is_no_type(text):
    with pytest.raises(ValueError, match="not a weight type"):
        parse_type(text)


@pytest.mark.parametrize("layout", ["zigzag/1", "interleaved/2"])
def test_a_layout_from_the_future(layout):
    with pytest.raises(
        ValueError,
        match=rf"layout {layout} is not known .* known: interleaved/1, aligned/1, words/1, tiles/1, bit-ttt/1",
    ):
        parse_type(f"packed n=2 g=128 free layout={layout} f16[2,3]")


# --- bytes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.one_of(TERNARY_TYPES, PACKED_TYPES))
def test_nbytes_is_what_is_stored(type):
    ternary = random_ternary(type.ternary if isinstance(type, PackedType) else type)
    values = {"trits": ternary.trits, "scales": ternary.scales}
    if isinstance(type, PackedType):
        values = {"codes": LAYOUTS[type.layout].pack(ternary.trits), "scales": ternary.scales}
    fields = stored("model.layers.0.mlp.up_proj.weight", type)
    assert {name: (value.shape, value.dtype) for name, value in values.items()} == {
        name: (shape, dtype) for name, (_, shape, dtype) in fields.items()
    }
    assert type.nbytes == sum(value.nbytes for value in values.values())
    assert bits_per_weight(type) == pytest.approx(8 * type.nbytes / ternary.trits[..., 0].size)
    assert build(type, values).type == type


@pytest.mark.parametrize(
    ("type", "bits"),
    [
        (PackedType(TernaryType((4096, 4096), 2, "tensor", False, "f32"), "interleaved"), 3.2031),
        (PackedType(TernaryType((4096, 14080), 2, 128, False, "f16"), "interleaved"), 3.45),
        (PackedType(TernaryType((4096, 14080), 2, 128, True, "f16"), "interleaved"), 3.325),
        (PackedType(TernaryType((4096, 14080), 3, 128, False, "f16"), "interleaved"), 5.175),
        (PackedType(TernaryType((4096, 14080), 2, 128, False, "f16"), "bit-ttt"), 4.25),
        (TernaryType((64, 128), 2, "row", True, "f32"), 16.25),
        (DenseType((3, 5), "bf16"), 16),
    ],
)
def test_bits_per_weight(type, bits):
    """The figures of FORMATS.md (its 14336 inputs are no multiple of 5: 14080 are)."""
    assert bits_per_weight(type) == pytest.approx(bits, abs=5e-4)


def test_stored_names():
    ternary = TernaryType((8, 20), 2, 16, True, "bf16")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert stored(name, DenseType((8, 20), "f16")) == {
        "array": (name, (8, 20), np.dtype(np.float16))
    }
    scales = ("model.layers.0.self_attn.q_proj.scales", (8, 2, 1), DTYPES["bf16"])
    assert stored(name, ternary) == {
        "trits": (f"{name}_trits", (8, 20, 2), np.dtype(np.int8)),
        "scales": scales,
    }
    packed = PackedType(ternary, "interleaved")
    assert stored(name, packed) == {
        "codes": (f"{name}_packed", (8, 4, 2), np.dtype(np.uint8)),
        "scales": scales,
    }


@pytest.mark.parametrize(
    ("group", "tied", "shape"),
    [
        (32, False, (6, 4, 3)),
        (50, False, (6, 2, 3)),
        (100, True, (6, 1, 1)),
        (1000, False, (6, 1, 3)),
        ("row", True, (6, 1, 1)),
        ("tensor", False, (1, 1, 3)),
    ],
)
def test_shape_of_the_scales(group, tied, shape):
    assert TernaryType((6, 100), 3, group, tied, "f16").scales_shape == shape


# --- values ----------------------------------------------------------------------------------------------------------


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


@settings(max_examples=60, deadline=None)
@given(PACKED_TYPES, st.integers(0, 2**32 - 1))
def test_packed_is_ternary_bit_for_bit(type, seed):
    ternary = random_ternary(type.ternary, seed)
    packed = Packed(LAYOUTS[type.layout].pack(ternary.trits), ternary.scales, type)
    np.testing.assert_array_equal(packed.dequantize(), ternary.dequantize())
    np.testing.assert_array_equal(packed.unpack().trits, ternary.trits)
    assert packed.unpack().type == ternary.type


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("group", [7, 48, "row", "tensor"])
def test_numpy_and_jit_agree_bit_for_bit(group, tied):
    type = PackedType(TernaryType((8, 50), 3, group, tied, "f16"), "interleaved")
    ternary = random_ternary(type.ternary)
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
