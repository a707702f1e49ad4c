"""The values of weights: registered pytrees, each defined by its `dequantize()`."""

import operator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import numpy as np

from atd.weights.codes import values_of
from atd.weights.groups import spread_scales
from atd.weights.layouts import LAYOUTS
from atd.weights.types import DTYPE_NAMES, DTYPES, DenseType, PackedType, TernaryType, TrellisType


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclass(frozen=True)
class Dense:
    """A plain array of any rank: `dequantize()` is the array."""

    array: jax.Array | np.ndarray

    @property
    def type(self) -> DenseType:
        return DenseType(tuple(self.array.shape), DTYPE_NAMES[np.dtype(self.array.dtype)])

    def dequantize(self, dtype: Any = np.float32):
        """Returns the array in `dtype`."""
        return self.array.astype(dtype)


def level_weights(bases: int) -> np.ndarray:
    """Returns 3^(N-1-i) for i = 0..N-1, float32 [N]: a tied scale u makes s_i = u 3^(N-1-i)."""
    return 3.0 ** np.arange(bases - 1, -1, -1, dtype=np.float32)


@partial(jax.tree_util.register_dataclass, data_fields=["trits", "scales"], meta_fields=["type"])
@dataclass(frozen=True)
class Ternary:
    """A sum of N ternary bases with scales per group of g inputs:

        w[o, k] = sum_i s[o, k // g, i] t[o, k, i]

    summed over i in order, in float32.
    """

    trits: jax.Array | np.ndarray  # int8 [out, in, N]
    scales: jax.Array | np.ndarray  # [rows, groups, N or 1]
    type: TernaryType

    def dequantize(self, dtype: Any = np.float32):
        """Returns the weights [out, in] in `dtype`."""
        return combine(self.trits, self.scales, self.type).astype(dtype)


def combine(trits, scales, type: TernaryType):
    """Computes the weights that trits and scales stand for (see `Ternary`), of any rows.

    Args:
        trits: int8 [rows, in, N].
        scales: [rows or 1, groups, N], or u [rows or 1, groups, 1] where tied.
        type: the type of the whole matrix.

    Returns:
        float32 [rows, in], numpy or jax as `trits` are.
    """
    scales = scales.astype(np.float32)

    def spread(i: int):
        return spread_scales(scales[..., i], type.group_size, type.shape[1])

    parts = [trits[:, :, i] for i in range(type.bases)]
    if type.tied:  # exact: the integer is below 2^24, and one rounding remains
        parts = [sum(map(operator.mul, parts, level_weights(type.bases)))]
    return reduce(operator.add, (part * spread(i) for i, part in enumerate(parts)))


@partial(jax.tree_util.register_dataclass, data_fields=["trits", "scales"], meta_fields=["type"])
@dataclass(frozen=True)
class Trellis:
    """Trits that count in the rows below them as well (`TrellisType`), one scale per row:

        w[o, k] = s[o] sum_(j, i) a[p, i, j] t_i[q, k],    q = (o - j) mod L,  p = q mod P

    within segments of L rows, summed over j and then i, in float32.
    """

    trits: jax.Array | np.ndarray  # int8 [out / P, in, M]
    scales: jax.Array | np.ndarray  # [out, 1, 1]
    type: TrellisType

    def dequantize(self, dtype: Any = np.float32):
        """Returns the weights [out, in] in `dtype`."""
        values = values_of(self.trits, self.type.code, self.type.segment)
        return (values * self.scales[:, 0].astype(np.float32)).astype(dtype)


def summed(trits, scales, type: TernaryType | TrellisType) -> Ternary | Trellis:
    """Returns the weight of this type that the trits and scales make."""
    if isinstance(type, TrellisType):
        return Trellis(trits, scales, type)
    return Ternary(trits, scales, type)


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["type"])
@dataclass(frozen=True)
class Packed:
    """A ternary weight whose trits lie in a layout: `LAYOUTS[type.layout].unpack(codes)`."""

    codes: jax.Array | np.ndarray  # shape and dtype are the layout's
    scales: jax.Array | np.ndarray  # [rows, groups, N or 1]
    type: PackedType

    def unpack(self) -> Ternary | Trellis:
        """Returns the same weight with its trits one per byte."""
        ternary = self.type.ternary
        trits = LAYOUTS[self.type.layout].unpack(self.codes, *ternary.trits_shape)
        return summed(trits, self.scales, ternary)

    def dequantize(self, dtype: Any = np.float32):
        """Returns the weights [out, in] in `dtype`."""
        return self.unpack().dequantize(dtype)


Weight = Dense | Ternary | Trellis | Packed


def shapes_of(type: DenseType | TernaryType | TrellisType | PackedType) -> Weight:
    """Returns a weight of this type with shapes (`jax.ShapeDtypeStruct`) in place of arrays."""
    shape: Any = jax.ShapeDtypeStruct
    if isinstance(type, DenseType):
        return Dense(shape(type.shape, DTYPES[type.dtype]))
    if isinstance(type, PackedType):
        scales = shape(type.ternary.scales_shape, DTYPES[type.ternary.dtype])
        return Packed(shape(type.codes_shape, LAYOUTS[type.layout].dtype), scales, type)
    scales = shape(type.scales_shape, DTYPES[type.dtype])
    return summed(shape(type.trits_shape, np.int8), scales, type)


def broken(weight: Weight) -> str | None:
    """Returns what is wrong with the values of a weight, or None."""
    match weight:
        case Dense(array=array):
            return None if np.isfinite(np.asarray(array)).all() else "it holds NaN or Inf"
        case Packed():
            if count := LAYOUTS[weight.type.layout].invalid_bytes(weight.codes):
                return (
                    f"{count} bytes are no codes of layout {weight.type.layout}: "
                    "the tensor is corrupted"
                )
        case Ternary() | Trellis():
            if np.abs(np.asarray(weight.trits)).max(initial=0) > 1:
                return "it holds trits other than -1, 0, 1: the tensor is corrupted"
    return None if np.isfinite(np.asarray(weight.scales)).all() else "its scales hold NaN or Inf"
