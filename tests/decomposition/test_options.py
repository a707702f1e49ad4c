"""Options of a matrix: their texts and their bytes."""

import numpy as np
import pytest

from atd.decomposition.options import (
    can_be_packed,
    decided_type,
    decision,
    stored_bytes,
    ternary_types,
)
from atd.weights import DenseType, Packed, PackedType, Ternary, TernaryType
from atd.weights.layouts import LAYOUTS


def test_options_are_told_apart_once():
    types = ternary_types((8, 64), (1, 2), (32, 64, "row"), ("tied", "free"), "f16")
    assert [decision(type) for type in types] == [
        "n=1 g=32 tied f16",
        "n=1 g=row tied f16",
        "n=2 g=32 tied f16",
        "n=2 g=32 free f16",
        "n=2 g=row tied f16",
        "n=2 g=row free f16",
    ]
    assert all(decided_type(decision(type), (8, 64)) == type for type in types)
    assert decided_type(decision(DenseType((8, 64), "f16")), (8, 64)) is None
    with pytest.raises(ValueError, match="not a weight type"):
        decided_type("n=2", (8, 64))


@pytest.mark.parametrize("shape", [(6, 64), (4, 33)])
@pytest.mark.parametrize("layout", ["interleaved", "bit-ttt"])
def test_bytes_are_those_that_are_stored(shape, layout):
    for type in ternary_types(shape, (1, 2, 3), (32, "row"), ("tied", "free"), "f16"):
        assert can_be_packed(type, layout)
        trits, scales = (
            np.zeros((*shape, type.bases), np.int8),
            np.zeros(type.scales_shape, np.float16),
        )
        packed = Packed(
            LAYOUTS[layout].pack(Ternary(trits, scales, type).trits),
            scales,
            PackedType(type, layout),
        )
        assert stored_bytes(type, layout) == packed.codes.nbytes + packed.scales.nbytes


def test_a_layout_that_refuses_is_no_option():
    assert not can_be_packed(TernaryType((6, 64), 2, "row", True, "f16"), "hf-bitnet")
    assert can_be_packed(DenseType((6, 64), "f16"), "hf-bitnet")
