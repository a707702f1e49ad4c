"""Stored names, shapes and bytes are those of the arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atd.weights import (
    DTYPES,
    DenseType,
    PackedType,
    TernaryType,
    bits_per_weight,
    build,
    stored,
    ternary_of,
)
from atd.weights.layouts import LAYOUTS
from tests.weights.types import PACKED_TYPES, TERNARY_TYPES, random_ternary


@settings(max_examples=60, deadline=None)
@given(st.one_of(TERNARY_TYPES, PACKED_TYPES))
def test_nbytes_is_what_is_stored(type):
    kind = ternary_of(type)
    assert isinstance(kind, TernaryType)
    ternary = random_ternary(kind)
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
