"""Types of weights to draw from, and weights of a type: shared by the tests of this folder."""

import numpy as np
from hypothesis import strategies as st

from atd.weights import DTYPES, DenseType, PackedType, Ternary, TernaryType
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
