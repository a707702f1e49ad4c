"""Types of weights: their text, bits and shapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atd.weights import DenseType, PackedType, TernaryType, bits_per_weight, parse_type
from tests.weights.types import DENSE_TYPES, PACKED_TYPES, TERNARY_TYPES


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
    known = "interleaved/1, aligned/1, words/1, tiles/1, bit-ttt/1"
    with pytest.raises(ValueError, match=rf"layout {layout} is not known .* known: {known}"):
        parse_type(f"packed n=2 g=128 free layout={layout} f16[2,3]")


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
    """Worked out by hand for 14080 inputs, a multiple of 5 and of 128."""
    assert bits_per_weight(type) == pytest.approx(bits, abs=5e-4)


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
