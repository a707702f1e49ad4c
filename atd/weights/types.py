"""The types of weights: what a tensor can be, known without its data.

A type's text is its stored form: `parse_type(str(t)) == t`.
"""

import math
import re
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from atd.weights.layouts import LAYOUTS

DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f64": np.dtype(np.float64),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Group = int | str  # a size, "row" or "tensor"


@dataclass(frozen=True)
class DenseType:
    """A plain array of any rank."""

    shape: tuple[int, ...]
    dtype: str  # f32, f16, bf16 or f64

    @property
    def nbytes(self) -> int:
        """Returns its bytes in a file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"dense {self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class TernaryType:
    """N trits per weight and the scales that join them.

    Trits are int8 [out, in, N], scales [rows, groups, N], or [rows, groups, 1] where tied.
    """

    shape: tuple[int, int]  # out, in
    bases: int  # N
    group: Group  # size along the inputs, "row" or "tensor"
    tied: bool  # one stored scale u per group, s_i = u 3^(N-1-i)
    dtype: str  # of the scales

    @property
    def group_size(self) -> int:
        """Returns how many inputs share a scale; the last group of a row may hold fewer."""
        return self.shape[1] if isinstance(self.group, str) else self.group

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """Returns (rows, groups per row, stored scales per group)."""
        out, inputs = self.shape
        return (
            1 if self.group == "tensor" else out,
            -(-inputs // self.group_size),
            1 if self.tied else self.bases,
        )

    @property
    def scales_nbytes(self) -> int:
        """Returns the bytes of the scales in a file."""
        return math.prod(self.scales_shape) * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Returns its bytes in a file, one per trit."""
        return math.prod(self.shape) * self.bases + self.scales_nbytes

    @property
    def options(self) -> str:
        """Returns N, group and kind of scales as they stand in the text of the type."""
        return f"n={self.bases} g={self.group} {'tied' if self.tied else 'free'}"

    def __str__(self) -> str:
        return f"ternary {self.options} {self.dtype}[{self.shape[0]},{self.shape[1]}]"


@dataclass(frozen=True)
class PackedType:
    """A `TernaryType` whose trits lie in a layout of `atd.weights.layouts`."""

    ternary: TernaryType
    layout: str  # a name of LAYOUTS

    @property
    def shape(self) -> tuple[int, int]:
        return self.ternary.shape

    @property
    def dtype(self) -> str:
        return self.ternary.dtype

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """Returns the shape of the codes, padding of the layout included."""
        return LAYOUTS[self.layout].codes_shape(*self.shape, self.ternary.bases)

    @property
    def nbytes(self) -> int:
        """Returns its bytes in a file, codes and scales."""
        layout = LAYOUTS[self.layout]
        return math.prod(self.codes_shape) * layout.dtype.itemsize + self.ternary.scales_nbytes

    def __str__(self) -> str:
        out, inputs = self.shape
        options = f"{self.ternary.options} layout={LAYOUTS[self.layout]}"
        return f"packed {options} {self.dtype}[{out},{inputs}]"


def canonical_group(group: Group, inputs: int) -> Group:
    """Returns "row" for a group at least as wide as a row, else the group."""
    return "row" if isinstance(group, int) and group >= inputs else group


WeightType = DenseType | TernaryType | PackedType
_TYPE = re.compile(
    r"(?P<kind>dense|ternary|packed)"
    r"(?: n=(?P<bases>\d+) g=(?P<group>\d+|row|tensor) (?P<scales>free|tied))?"
    r"(?: layout=(?P<layout>[\w-]+)/(?P<version>\d+))?"
    r" (?P<dtype>\w+)\[(?P<shape>[\d,]*)\]"
)


def parse_type(text: str) -> WeightType:
    """Returns the type whose text this is.

    Raises:
        ValueError: the text is no type, or names an unknown layout or layout version.
    """
    match = _TYPE.fullmatch(text)
    if match is None or match["dtype"] not in DTYPES:
        raise ValueError(f"not a weight type: {text!r}")
    shape = tuple(int(n) for n in match["shape"].split(",") if n)
    kind, layout = match["kind"], match["layout"]
    if kind == "dense" and match["bases"] is None and layout is None:
        return DenseType(shape, match["dtype"])
    if (
        kind == "dense"
        or match["bases"] is None
        or len(shape) != 2
        or (kind == "packed") != (layout is not None)
    ):
        raise ValueError(f"not a weight type: {text!r}")
    group = match["group"] if match["group"] in ("row", "tensor") else int(match["group"])
    ternary = TernaryType(
        (shape[0], shape[1]), int(match["bases"]), group, match["scales"] == "tied", match["dtype"]
    )
    if kind == "ternary":
        return ternary
    if layout not in LAYOUTS or LAYOUTS[layout].version != int(match["version"]):
        known = ", ".join(str(known) for known in LAYOUTS.values())
        raise ValueError(
            f"layout {layout}/{match['version']} is not known to this version of atd; "
            f"known: {known}"
        )
    return PackedType(ternary, layout)


def ternary_of(type: WeightType) -> TernaryType | None:
    """Returns the ternary type of a ternary or packed type, else None."""
    if isinstance(type, PackedType):
        return type.ternary
    return type if isinstance(type, TernaryType) else None


def bits_per_weight(type: WeightType) -> float:
    """Returns all stored bits, padding and scales included, over the number of weights."""
    return 8 * type.nbytes / math.prod(type.shape)
