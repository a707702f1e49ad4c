"""Cuts: shares of a weight hold what the weight holds, in every representation."""

from itertools import pairwise

import numpy as np
import pytest

from atd.parallel.cuts import BY_INPUTS, Cut, input_unit, row_unit, share_type, shares
from atd.weights import Dense, DenseType, PackedType, TernaryType, Trellis, TrellisType, parse_code
from atd.weights.layouts import LAYOUTS
from tests.kernels.matrices import pack, ternary

OUT, INPUTS = 96, 120
FUSED = Cut((64, 32))


def trellis() -> Trellis:
    random = np.random.default_rng(0)
    type = TrellisType((OUT, INPUTS), parse_code("0.4,0.5|1.1"), 16, "f16")
    trits = random.integers(-1, 2, type.trits_shape).astype(np.int8)
    return Trellis(trits, random.uniform(0.1, 1, type.scales_shape).astype(np.float16), type)


def weights():
    random = np.random.default_rng(0)
    yield "dense", Dense(random.standard_normal((OUT, INPUTS)).astype(np.float32))
    for group in ("row", "tensor", 20):
        yield f"ternary-{group}", ternary(OUT, INPUTS, 2, group)
        for layout in LAYOUTS:
            bases = LAYOUTS[layout].only_bases or 2
            yield f"{layout}-{group}", pack(ternary(OUT, INPUTS, bases, group), layout)
    yield "trellis", trellis()
    for layout in ("aligned", "tiles", "bit-ttt"):
        yield f"trellis-{layout}", pack(trellis(), layout)


@pytest.mark.parametrize("weight", [pytest.param(w, id=name) for name, w in weights()])
@pytest.mark.parametrize("cut", [Cut((OUT,)), FUSED, BY_INPUTS], ids=("rows", "fused", "inputs"))
def test_shares_hold_the_weight(weight, cut):
    whole = np.asarray(weight.dequantize())
    if cut.parts:
        ends = np.cumsum((0, *cut.parts))
        parts = [np.split(whole[a:b], 2) for a, b in pairwise(ends)]
        expected = [np.concatenate([part[rank] for part in parts]) for rank in range(2)]
    else:
        expected = np.split(whole, 2, axis=1)
    for share, values in zip(shares(weight, cut, 2), expected, strict=True):
        assert np.array_equal(np.asarray(share.dequantize()), values)
        assert share.type == share_type(weight.type, cut, 2)
        assert type(share) is type(weight)


def test_a_bias_is_added_once():
    bias = Dense(np.arange(6, dtype=np.float32))
    by_rows = shares(bias, Cut((4, 2)), 2)
    assert [share.dequantize().tolist() for share in by_rows] == [[0, 1, 4], [2, 3, 5]]
    by_inputs = shares(bias, BY_INPUTS, 3)
    assert [share.dequantize().sum() for share in by_inputs] == [15, 0, 0]
    assert {share.type for share in by_inputs} == {share_type(bias.type, BY_INPUTS, 3)}


def test_units_are_those_of_layouts_segments_and_groups():
    wide = TernaryType((96, 120), 2, 20, False, "f16")
    coded = trellis().type
    assert row_unit(DenseType((96, 120), "bf16")) == row_unit(PackedType(wide, "aligned")) == 1
    assert row_unit(PackedType(wide, "tiles")) == 16
    assert row_unit(PackedType(wide, "hf-bitnet")) == 4
    assert row_unit(coded) == row_unit(PackedType(coded, "tiles")) == 16
    assert input_unit(wide) == input_unit(PackedType(wide, "aligned")) == 20
    assert input_unit(TernaryType((96, 120), 2, "row", False, "f16")) == 1


def test_groups_as_wide_as_a_share_are_rows():
    type = TernaryType((8, 40), 1, 20, True, "f16")
    assert share_type(type, BY_INPUTS, 2) == TernaryType((8, 20), 1, "row", True, "f16")
