"""What a matrix may become, and how many bytes that takes.

A *decision* is the text of an option, as its type writes it: N, group, tied or free, and dtype of
the scales ("n=2 g=row tied f16"); N, segment, taps and dtype of a trellis code ("n=2 segment=64
taps=0.42,...|1.1 f16"); or "dense".
"""

from collections.abc import Iterable, Sequence
from itertools import product

from atd.decomposition.trellis_codes import BASES, known_code
from atd.weights import (
    Code,
    DenseType,
    Group,
    PackedType,
    TernaryType,
    TrellisType,
    canonical_group,
    parse_type,
)
from atd.weights.layouts import LAYOUTS

DENSE = "dense"  # the decision of a matrix that stays as it is

SEGMENT_ROWS = (64, 128)  # of a trellis code: shorter segments lose more, longer ones gain little
LEAST_ROWS = 16  # of the last segment, where segments do not divide the rows

Candidate = TernaryType | TrellisType | DenseType  # what a matrix may become


def ternary_types(
    shape: Sequence[int],
    bases: Iterable[int],
    groups: Iterable[Group],
    scales: Iterable[str],
    dtype: str,
) -> list[TernaryType]:
    """Lists every combination for a matrix [out, in], each once.

    A group as wide as the row is "row", and one base has no ratios of scales to tie.

    Args:
        shape: (out, in).
        bases: numbers of bases N.
        groups: sizes along the inputs, "row" or "tensor".
        scales: "free", "tied".
        dtype: of the scales, "f16" for instance.
    """
    out, inputs = shape
    found = {}
    for n, group, kind in product(bases, groups, scales):
        group = canonical_group(group, inputs)
        type = TernaryType((out, inputs), n, group, kind == "tied", dtype)
        found.setdefault((n, group, type.tied or n == 1), type)
    return list(found.values())


def trellis_type(shape: Sequence[int], code: Code, dtype: str) -> TrellisType | None:
    """Returns the type of a matrix [out, in] with this code, or None where it has too few rows.

    Segments have the most rows within SEGMENT_ROWS that divide `out`; where none do, the last
    segment is a shorter one. A matrix of fewer rows is one segment.
    """
    out, period = shape[0], code.period
    if out % period or out <= code.memory:
        return None
    low, high = SEGMENT_ROWS
    lengths = [n for n in range(high, low - 1, -1) if n % period == 0]
    whole = [n for n in lengths if out % n == 0]
    ragged = [n for n in lengths if out % n >= max(LEAST_ROWS, code.memory + 1)]
    segment = out if out < low else (whole or ragged)[0]
    return TrellisType((out, shape[1]), code, segment, dtype)


def trellis_types(
    shape: Sequence[int], bases: Iterable[float], kind: str, dtype: str
) -> list[TrellisType]:
    """Lists the trellis codes of one kind for a matrix [out, in], for the N that have codes."""
    codes = [known_code(n, kind) for n in bases if n in BASES]
    found = [trellis_type(shape, code, dtype) for code in codes]
    return [type for type in found if type is not None]


def decision(type: Candidate) -> str:
    """Returns the text of what was decided for a matrix: "n=2 g=row tied f16", or "dense"."""
    return DENSE if isinstance(type, DenseType) else f"{type.options} {type.dtype}"


def decided_type(text: str, shape: Sequence[int]) -> TernaryType | TrellisType | None:
    """Returns the type of a matrix [out, in] for which this text was decided; None for "dense".

    Raises:
        ValueError: the text is no decision.
    """
    if text == DENSE:
        return None
    kind = "trellis" if "taps=" in text else "ternary"
    type = parse_type(f"{kind} {text}[{shape[0]},{shape[1]}]")
    assert isinstance(type, TernaryType | TrellisType)
    return type


def stored_bytes(type: Candidate | PackedType, layout: str) -> int:
    """Returns the bytes of a weight in a file: trits packed in `layout`, and scales."""
    if isinstance(type, TernaryType | TrellisType):
        return PackedType(type, layout).nbytes
    return type.nbytes


def can_be_packed(type: Candidate, layout: str) -> bool:
    """Returns whether the layout takes a matrix of this type."""
    return isinstance(type, DenseType) or LAYOUTS[layout].refuses(*type.trits_shape) is None
