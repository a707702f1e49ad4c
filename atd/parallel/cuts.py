"""Cuts weights into equal shares, one per device, and says into how many they can be cut.

A share is a weight of the same kind, with the same values: scales, trits and codes of its rows or
inputs. Rows are cut in units of the layout, and in whole segments where there is a trellis code.
Inputs are cut at multiples of the group size, and packed anew.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from atd.weights import (
    Dense,
    DenseType,
    Packed,
    PackedType,
    TernaryType,
    TrellisType,
    Weight,
    WeightType,
)
from atd.weights.groups import namespace
from atd.weights.layouts import LAYOUTS, TILE_ROWS
from atd.weights.types import canonical_group, ternary_of
from atd.weights.values import summed


@dataclass(frozen=True)
class Cut:
    """Along which axis a weight is cut.

    Attributes:
        parts: rows of each of the matrices that were joined, top down: a device has its share of
            each of them. Empty: the cut is along the inputs.
    """

    parts: tuple[int, ...] = ()

    def rows_of(self, rank: int, count: int) -> list[slice]:
        """Returns which rows the device `rank` of `count` has, of each part."""
        found, start = [], 0
        for part in self.parts:
            share = part // count
            found.append(slice(start + rank * share, start + (rank + 1) * share))
            start += part
        return found


BY_INPUTS = Cut()


def row_unit(type: WeightType) -> int:
    """Returns the fewest rows that can be cut off."""
    unit = 1
    if isinstance(type, PackedType):
        tiles = TILE_ROWS if type.layout == "tiles" else 1
        unit = max(tiles, LAYOUTS[type.layout].multiple_of_rows)
    ternary = ternary_of(type)
    if isinstance(ternary, TrellisType):
        return math.lcm(unit * ternary.code.period, ternary.segment)
    return unit


def input_unit(type: WeightType) -> int:
    """Returns the fewest inputs that can be cut off."""
    ternary = ternary_of(type)
    if isinstance(ternary, TernaryType) and ternary.scales_shape[1] > 1:
        return ternary.group_size
    return 1


def share_type(type: WeightType, cut: Cut, count: int) -> WeightType:
    """Returns the type of a share of a weight that is cut into `count`.

    Biases, which have no inputs, stay whole where the cut is along those (`shares`).
    """
    if not cut.parts and len(type.shape) == 1:
        return type
    rows = sum(part // count for part in cut.parts) if cut.parts else type.shape[0]
    shape = (rows, *type.shape[1:]) if cut.parts else (rows, type.shape[1] // count)
    match type:
        case DenseType():
            return replace(type, shape=shape)
        case TernaryType():
            return replace(type, shape=shape, group=canonical_group(type.group, shape[1]))
        case TrellisType():
            return replace(type, shape=shape)
        case PackedType(ternary):
            inner = share_type(ternary, cut, count)
            assert isinstance(inner, TernaryType | TrellisType)
            return PackedType(inner, type.layout)


def shares(weight: Weight, cut: Cut, count: int) -> list[Weight]:
    """Returns the `count` shares of a weight, whose products are put side by side, or, where the
    cut is along the inputs, added up.

    A bias is added once: where the cut is along the inputs the first device has it, and the others
    have zeros.
    """
    type = share_type(weight.type, cut, count)
    if cut.parts:
        return [_rows(weight, type, cut.rows_of(rank, count)) for rank in range(count)]
    if isinstance(weight, Dense) and weight.array.ndim == 1:
        return [weight, *[Dense(0 * weight.array)] * (count - 1)]
    whole = weight.unpack() if isinstance(weight, Packed) else weight
    width = weight.type.shape[1] // count
    inputs = [slice(rank * width, (rank + 1) * width) for rank in range(count)]
    return [_inputs(whole, type, part) for part in inputs]


def _rows(weight: Weight, type: WeightType, rows: Sequence[slice]) -> Weight:
    """The share of a weight that has these rows."""
    if isinstance(weight, Dense):
        return Dense(_taken(weight.array, rows))
    scales = weight.scales if weight.scales.shape[0] == 1 else _taken(weight.scales, rows)
    ternary = ternary_of(type)
    assert ternary is not None
    period = ternary.code.period if isinstance(ternary, TrellisType) else 1
    if not isinstance(weight, Packed):
        return summed(_taken(weight.trits, rows, period), scales, ternary)
    assert isinstance(type, PackedType)
    layout = LAYOUTS[type.layout]
    if layout.row_separable or type.layout == "tiles":
        unit = period if layout.row_separable else period * TILE_ROWS
        return Packed(_taken(weight.codes, rows, unit), scales, type)
    trits = _taken(weight.unpack().trits, rows, period)
    return Packed(layout.pack(trits), scales, type)


def _taken(array, rows: Sequence[slice], unit: int = 1):
    """These rows of an array whose first axis counts in units of so many rows."""
    parts = [array[part.start // unit : part.stop // unit] for part in rows]
    return parts[0] if len(parts) == 1 else namespace(array).concatenate(parts)


def _inputs(weight: Weight, type: WeightType, inputs: slice) -> Weight:
    """The share of an unpacked weight that has these inputs, in the layout of its type."""
    if isinstance(weight, Dense):
        return Dense(weight.array[:, inputs])
    assert not isinstance(weight, Packed)
    ternary, unit, scales = ternary_of(type), input_unit(weight.type), weight.scales
    assert ternary is not None
    if scales.shape[1] > 1:
        scales = scales[:, inputs.start // unit : inputs.stop // unit]
    trits = weight.trits[:, inputs]
    if isinstance(type, PackedType):
        return Packed(LAYOUTS[type.layout].pack(trits), scales, type)
    return summed(trits, scales, ternary)
