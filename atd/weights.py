"""Weights: what a tensor can be (types) and the tensors themselves (registered pytrees), each defined by
`dequantize()`.

    dense    f16[out,in]                                        the array
    ternary  n=2 g=128 free f16[out,in]                         w = sum_i s_i t_i, trits one a byte
    packed   n=2 g=128 free layout=interleaved/1 f16[out,in]    the same, trits in a layout of `atd.layout`

The dtype is that of the array (dense) or of the scales. `g` is the group size along the inputs, `row` (one group a row)
or `tensor` (one for all). Scales lie interleaved, [rows, groups, N]. *Tied* scales store the last one alone, u [rows,
groups, 1], with s_i = u 3^(N-1-i): then w = u * integer, a uniform grid of 3^N levels. A type's text is its storage
form: `parse_type(str(t)) == t`.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from atd.layout import LAYOUTS

DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f64": np.dtype(np.float64),
}
SHORT = {dtype: name for name, dtype in DTYPES.items()}
Group = int | str  # a size, "row" or "tensor"


@dataclass(frozen=True)
class DenseType:
    """A plain array of any rank; `dtype` is one of f32, f16, bf16, f64."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"dense {self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class TernaryType:
    """N trits a weight and the scales that join them: trits int8 [out, in, N], scales [rows, groups, N or 1]."""

    shape: tuple[int, int]  # out, in
    bases: int
    group: Group  # size along the inputs, "row" or "tensor"
    tied: bool
    dtype: str  # of the scales

    @property
    def group_size(self) -> int:
        """Inputs that share a scale: the last group of a row may hold fewer."""
        return self.shape[1] if isinstance(self.group, str) else self.group

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        out, inputs = self.shape
        return 1 if self.group == "tensor" else out, -(-inputs // self.group_size), 1 if self.tied else self.bases

    @property
    def scales_nbytes(self) -> int:
        return math.prod(self.scales_shape) * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.bases + self.scales_nbytes

    def _options(self) -> str:
        return f"n={self.bases} g={self.group} {'tied' if self.tied else 'free'}"

    def __str__(self) -> str:
        return f"ternary {self._options()} {self.dtype}[{self.shape[0]},{self.shape[1]}]"


@dataclass(frozen=True)
class PackedType:
    """A `TernaryType` whose trits lie in a layout of `atd.layout`: codes uint8, scales as they were."""

    ternary: TernaryType
    layout: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.ternary.shape

    @property
    def dtype(self) -> str:
        return self.ternary.dtype

    @property
    def codes_shape(self) -> tuple[int, ...]:
        return LAYOUTS[self.layout].codes_shape(*self.shape, self.ternary.bases)

    @property
    def nbytes(self) -> int:
        return math.prod(self.codes_shape) * LAYOUTS[self.layout].dtype.itemsize + self.ternary.scales_nbytes

    def __str__(self) -> str:
        return f"packed {self.ternary._options()} layout={LAYOUTS[self.layout]} {self.dtype}[{self.shape[0]},{self.shape[1]}]"


WeightType = DenseType | TernaryType | PackedType
_TYPE = re.compile(
    r"(?P<kind>dense|ternary|packed)"
    r"(?: n=(?P<bases>\d+) g=(?P<group>\d+|row|tensor) (?P<scales>free|tied))?"
    r"(?: layout=(?P<layout>[\w-]+)/(?P<version>\d+))?"
    r" (?P<dtype>\w+)\[(?P<shape>[\d,]*)\]"
)


def parse_type(text: str) -> WeightType:
    """The type whose text this is. Raises ValueError for text that is no type, a layout or a layout version that is not known."""
    match = _TYPE.fullmatch(text)
    if match is None or match["dtype"] not in DTYPES:
        raise ValueError(f"not a weight type: {text!r}")
    shape = tuple(int(n) for n in match["shape"].split(",") if n)
    kind, layout = match["kind"], match["layout"]
    if kind == "dense" and match["bases"] is None and layout is None:
        return DenseType(shape, match["dtype"])
    if kind == "dense" or match["bases"] is None or len(shape) != 2 or (kind == "packed") != (layout is not None):
        raise ValueError(f"not a weight type: {text!r}")
    group = match["group"] if match["group"] in ("row", "tensor") else int(match["group"])
    ternary = TernaryType((shape[0], shape[1]), int(match["bases"]), group, match["scales"] == "tied", match["dtype"])
    if kind == "ternary":
        return ternary
    if layout not in LAYOUTS or LAYOUTS[layout].version != int(match["version"]):
        known = ", ".join(str(known) for known in LAYOUTS.values())
        raise ValueError(f"layout {layout}/{match['version']} is not known to this version of atd; known: {known}")
    return PackedType(ternary, layout)


def ternary_of(type: WeightType) -> TernaryType | None:
    """The ternary type behind a type that has one, packed or not."""
    return type.ternary if isinstance(type, PackedType) else type if isinstance(type, TernaryType) else None


def bits_per_weight(type: WeightType) -> float:
    """All stored bytes, padding and scales included, in bits over the number of weights."""
    return 8 * type.nbytes / math.prod(type.shape)


# --- values -----------------------------------------------------------------------------------------------------------


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclass(frozen=True)
class Dense:
    """An array as it is: `dequantize() = array`."""

    array: jax.Array | np.ndarray

    @property
    def type(self) -> DenseType:
        return DenseType(tuple(self.array.shape), SHORT[np.dtype(self.array.dtype)])

    def dequantize(self, dtype: Any = np.float32):
        return self.array.astype(dtype)


def level_weights(bases: int) -> np.ndarray:
    """3^(N-1-i), i = 0..N-1: a tied scale u makes s_i = u 3^(N-1-i)."""
    return 3.0 ** np.arange(bases - 1, -1, -1, dtype=np.float32)


@partial(jax.tree_util.register_dataclass, data_fields=["trits", "scales"], meta_fields=["type"])
@dataclass(frozen=True)
class Ternary:
    """`w[o, k] = sum_i s[o, k // g, i] t[o, k, i]`, summed over i in order, in float32."""

    trits: jax.Array | np.ndarray  # int8 [out, in, N]
    scales: jax.Array | np.ndarray  # [rows, groups, N or 1]
    type: TernaryType

    def dequantize(self, dtype: Any = np.float32):
        return combine(self.trits, self.scales, self.type).astype(dtype)


def combine(trits, scales, type: TernaryType):
    """trits [rows, in, N], scales [rows or 1, groups, N or 1] -> weights float32 [rows, in]; rows may be any part of the matrix."""
    xp = jnp if isinstance(trits, jax.Array) else np
    scales = scales.astype(np.float32)
    if type.tied:  # exact: the integer is below 2^24, and one rounding remains
        integers = sum(trits[:, :, i] * level_weights(type.bases)[i] for i in range(type.bases))
        return integers * _spread(scales[..., 0], type, xp)
    total = trits[:, :, 0] * _spread(scales[..., 0], type, xp)
    for i in range(1, type.bases):
        total = total + trits[:, :, i] * _spread(scales[..., i], type, xp)
    return total


def _spread(scale, type: TernaryType, xp):
    """[rows, groups] -> [rows, in] (or [rows, 1], which broadcasts, where a row has one group)."""
    if scale.shape[1] == 1:
        return scale
    return xp.repeat(scale, type.group_size, axis=1)[:, : type.shape[1]]


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["type"])
@dataclass(frozen=True)
class Packed:
    """A `Ternary` whose trits are `LAYOUTS[type.layout].unpack(codes)`."""

    codes: jax.Array | np.ndarray  # shape and dtype are the layout's
    scales: jax.Array | np.ndarray  # [rows, groups, N or 1]
    type: PackedType

    def unpack(self) -> Ternary:
        ternary = self.type.ternary
        trits = LAYOUTS[self.type.layout].unpack(self.codes, ternary.shape[1], ternary.bases)
        return Ternary(trits[: ternary.shape[0]], self.scales, ternary)

    def dequantize(self, dtype: Any = np.float32):
        return self.unpack().dequantize(dtype)


Weight = Dense | Ternary | Packed


# --- stored names -----------------------------------------------------------------------------------------------------


def stored(tensor: str, type: WeightType) -> dict[str, tuple[str, tuple[int, ...], np.dtype]]:
    """What lies in the file for a weight called `tensor` ("...q_proj.weight"): field -> (stored name, shape, dtype).

    Dense tensors keep their name; others become `<name>.weight_packed` (or `_trits`) and `<name>.scales`.
    """
    if isinstance(type, DenseType):
        return {"array": (tensor, type.shape, DTYPES[type.dtype])}
    ternary = type.ternary if isinstance(type, PackedType) else type
    scales = (f"{tensor.removesuffix('.weight')}.scales", ternary.scales_shape, DTYPES[ternary.dtype])
    if isinstance(type, PackedType):
        return {"codes": (f"{tensor}_packed", type.codes_shape, LAYOUTS[type.layout].dtype), "scales": scales}
    return {"trits": (f"{tensor}_trits", (*ternary.shape, ternary.bases), np.dtype(np.int8)), "scales": scales}


def build(type: WeightType, fields: dict) -> Weight:
    """The value of this type made of the arrays named as `stored` names them."""
    if isinstance(type, DenseType):
        return Dense(fields["array"])
    if isinstance(type, PackedType):
        return Packed(fields["codes"], fields["scales"], type)
    return Ternary(fields["trits"], fields["scales"], type)
