"""How kernels for weights without a code multiply by those that have a trellis code.

The M planes of a code are what the bases of free scales are, M sums over the same codes: the
kernels for those multiply, without scales. What they find is as small as the outputs; the filter of
it is left to XLA (`xla.filtered`), which fuses it with what comes next.
"""

from atd.weights import TernaryType, TrellisType


def planes_type(type: TrellisType) -> TernaryType:
    """Returns the type that kernels for free scales multiply by: [out / P, in] of M bases."""
    rows, inputs, planes = type.trits_shape
    return TernaryType((rows, inputs), planes, "row", False, type.dtype)
