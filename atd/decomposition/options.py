"""What a matrix may become, and how many bytes that takes.

A *decision* is the text of an option: N, group, tied or free, and dtype of the scales, as
`TernaryType` writes them ("n=2 g=row tied f16"), or "dense".
"""

from collections.abc import Iterable, Sequence
from itertools import product

from atd.weights import DenseType, Group, PackedType, TernaryType, canonical_group, parse_type
from atd.weights.layouts import LAYOUTS

DENSE = "dense"  # the decision of a matrix that stays as it is

Candidate = TernaryType | DenseType  # what a matrix may become


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


def decision(type: DenseType | TernaryType) -> str:
    """Returns the text of what was decided for a matrix: "n=2 g=row tied f16", or "dense"."""
    return DENSE if isinstance(type, DenseType) else f"{type.options} {type.dtype}"


def decided_type(text: str, shape: Sequence[int]) -> TernaryType | None:
    """Returns the type of a matrix [out, in] for which this text was decided; None for "dense".

    Raises:
        ValueError: the text is no decision.
    """
    if text == DENSE:
        return None
    type = parse_type(f"ternary {text}[{shape[0]},{shape[1]}]")
    assert isinstance(type, TernaryType)
    return type


def stored_bytes(type: DenseType | TernaryType | PackedType, layout: str) -> int:
    """Returns the bytes of a weight in a file: trits packed in `layout`, and scales."""
    return PackedType(type, layout).nbytes if isinstance(type, TernaryType) else type.nbytes


def can_be_packed(type: DenseType | TernaryType, layout: str) -> bool:
    """Returns whether the layout takes a matrix of this type."""
    return isinstance(type, DenseType) or LAYOUTS[layout].refuses(*type.shape, type.bases) is None
