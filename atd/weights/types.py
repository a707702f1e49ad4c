"""The types of weights: what a tensor can be, known without its data.

A type's text is its stored form: `parse_type(str(t)) == t`.
"""

import math
import re
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from atd.weights.codes import Code, parse_code
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
    def trits_shape(self) -> tuple[int, int, int]:
        """Returns [out, in, N]."""
        return *self.shape, self.bases

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
class TrellisType:
    """A sum of trits that count in several rows each, and one scale per row.

        w[o, k] = s[o] sum_(j, i) a[p, i, j] t_i[q, k],    q = (o - j) mod L,  p = q mod P

    Trits are int8 [out / P, in, M], with P the period of the code (`atd.weights.codes.Code`) and M
    the trits that the rows of a period hold together; scales are [out, 1, 1]. Rows lie in segments
    of L; what is left behind the whole segments is a segment of its own.
    """

    shape: tuple[int, int]  # out, in
    code: Code
    segment: int  # rows
    dtype: str  # of the scales

    def __post_init__(self):
        out, code = self.shape[0], self.code
        if not 0 < self.segment <= out:
            raise ValueError(
                f"a segment has 1 to {out} rows in a matrix of {out}, not {self.segment}"
            )
        if out % code.period or self.segment % code.period:
            raise ValueError(
                f"a code of period {code.period} needs a multiple of that many rows: in the matrix "
                f"({out}) and in each segment ({self.segment})"
            )
        if (last := out % self.segment or self.segment) <= code.memory:
            raise ValueError(
                f"a trit counts in {code.memory + 1} rows, and of {out} rows in segments of "
                f"{self.segment} the last one has {last}"
            )

    @property
    def bases(self) -> int:
        """Returns M, the trits that the rows of a period hold together: N where the period is 1."""
        return self.code.trits

    @property
    def trits_shape(self) -> tuple[int, int, int]:
        """Returns [out / P, in, M]."""
        return self.shape[0] // self.code.period, self.shape[1], self.code.trits

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """Returns (rows, 1, 1)."""
        return self.shape[0], 1, 1

    @property
    def scales_nbytes(self) -> int:
        """Returns the bytes of the scales in a file."""
        return self.shape[0] * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Returns its bytes in a file, one per trit."""
        return math.prod(self.trits_shape) + self.scales_nbytes

    @property
    def options(self) -> str:
        """Returns N, segment and taps as they stand in the text of the type."""
        return f"n={self.code.bases:g} segment={self.segment} taps={self.code}"

    def __str__(self) -> str:
        return f"trellis {self.options} {self.dtype}[{self.shape[0]},{self.shape[1]}]"


@dataclass(frozen=True)
class PackedType:
    """A `TernaryType` or `TrellisType` whose trits lie in a layout of `atd.weights.layouts`."""

    ternary: TernaryType | TrellisType
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
        return LAYOUTS[self.layout].codes_shape(*self.ternary.trits_shape)

    @property
    def nbytes(self) -> int:
        """Returns its bytes in a file, codes and scales."""
        layout = LAYOUTS[self.layout]
        return math.prod(self.codes_shape) * layout.dtype.itemsize + self.ternary.scales_nbytes

    def __str__(self) -> str:
        out, inputs = self.shape
        options = f"{self.ternary.options} layout={LAYOUTS[self.layout]}"
        kind = "packed trellis" if isinstance(self.ternary, TrellisType) else "packed"
        return f"{kind} {options} {self.dtype}[{out},{inputs}]"


def canonical_group(group: Group, inputs: int) -> Group:
    """Returns "row" for a group at least as wide as a row, else the group."""
    return "row" if isinstance(group, int) and group >= inputs else group


WeightType = DenseType | TernaryType | TrellisType | PackedType
_TYPE = re.compile(
    r"(?P<kind>dense|ternary|trellis|packed trellis|packed)"
    r"(?: n=(?P<trits>[\d.]+) segment=(?P<segment>\d+) taps=(?P<taps>\S+))?"
    r"(?: n=(?P<bases>\d+) g=(?P<group>\d+|row|tensor) (?P<scales>free|tied))?"
    r"(?: layout=(?P<layout>[\w-]+)/(?P<version>\d+))?"
    r" (?P<dtype>\w+)\[(?P<shape>[\d,]*)\]"
)


def parse_type(text: str) -> WeightType:
    """Returns the type whose text this is.

    Raises:
        ValueError: the text is no type or one that cannot be, or names an unknown layout or layout
            version.
    """
    match = _TYPE.fullmatch(text)
    if match is None or match["dtype"] not in DTYPES:
        raise ValueError(f"not a weight type that this version of atd knows: {text!r}")
    shape = tuple(int(n) for n in match["shape"].split(",") if n)
    kind, layout = match["kind"], match["layout"]
    if kind == "dense" and match["bases"] is match["taps"] is layout is None:
        return DenseType(shape, match["dtype"])
    trellis = kind.endswith("trellis")
    if (
        kind == "dense"
        or len(shape) != 2
        or (match["taps"] is None) == trellis
        or (match["bases"] is None) != trellis
        or kind.startswith("packed") != (layout is not None)
    ):
        raise ValueError(f"not a weight type that this version of atd knows: {text!r}")
    ternary = _trellis_type(match, shape) if trellis else _ternary_type(match, shape)
    if layout is None:
        return ternary
    if layout not in LAYOUTS or LAYOUTS[layout].version != int(match["version"]):
        known = ", ".join(str(known) for known in LAYOUTS.values())
        raise ValueError(
            f"layout {layout}/{match['version']} is not known to this version of atd; "
            f"known: {known}"
        )
    return PackedType(ternary, layout)


def _ternary_type(match: re.Match, shape: tuple[int, ...]) -> TernaryType:
    group = match["group"] if match["group"] in ("row", "tensor") else int(match["group"])
    tied = match["scales"] == "tied"
    return TernaryType((shape[0], shape[1]), int(match["bases"]), group, tied, match["dtype"])


def _trellis_type(match: re.Match, shape: tuple[int, ...]) -> TrellisType:
    code = parse_code(match["taps"])
    if f"{code.bases:g}" != match["trits"]:
        raise ValueError(
            f"its taps make {code.bases:g} trits per weight, not {match['trits']}: {match[0]!r}"
        )
    return TrellisType((shape[0], shape[1]), code, int(match["segment"]), match["dtype"])


def ternary_of(type: WeightType) -> TernaryType | TrellisType | None:
    """Returns the type of the trits behind a weight, packed or not; None for a dense one."""
    if isinstance(type, PackedType):
        return type.ternary
    return None if isinstance(type, DenseType) else type


def bits_per_weight(type: WeightType) -> float:
    """Returns all stored bits, padding and scales included, over the number of weights."""
    return 8 * type.nbytes / math.prod(type.shape)
