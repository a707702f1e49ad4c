"""One matrix into a weight of any type: the search that its type asks for."""

import numpy as np

from atd.decomposition import error_feedback, least_squares, trellis_feedback
from atd.weights import DTYPES, Ternary, TernaryType, Trellis, TrellisType


def nearest(
    weight: np.ndarray, type: TernaryType | TrellisType, features=None
) -> Ternary | Trellis:
    """Minimises sum (w - q)^2: alternating least squares, or a Viterbi search for a trellis code.

    Args:
        weight: float32 [out, in].
        type: what the matrix becomes; the number of rows is that of `weight`.
        features: importances [in] that scalar codes weight errors by.
    """
    dtype = DTYPES[type.dtype]
    if isinstance(type, TrellisType):
        code, length = type.code, type.segment
        return Trellis(
            *trellis_feedback.nearest(weight, code=code, length=length, dtype=dtype), type
        )
    options = {"bases": type.bases, "group": type.group, "tied": type.tied, "dtype": dtype}
    return Ternary(*least_squares.als(weight, **options, feature_weights=features), type)


def calibrated(
    weight: np.ndarray,
    type: TernaryType | TrellisType,
    factor: error_feedback.Factor,
    hessian: np.ndarray,
    sweeps: int = 2,
    refits: int = 0,
) -> Ternary | Trellis:
    """Minimises sum_rows (w - q) H (w - q)' by error feedback, `sweeps` of coordinate descent and
    `refits` rounds of (scales in closed form, one more sweep).

    Args:
        weight: float32 [out, in].
        type: what the matrix becomes.
        factor: that of `hessian`.
        hessian: H float32 [in, in].
    """
    options = {"dtype": DTYPES[type.dtype], "sweeps": sweeps, "refits": refits}
    if isinstance(type, TrellisType):
        options |= {"code": type.code, "length": type.segment}
        return Trellis(*trellis_feedback.decompose(weight, factor, hessian, **options), type)
    options |= {"bases": type.bases, "group": type.group, "tied": type.tied}
    return Ternary(*error_feedback.decompose(weight, factor, hessian, **options), type)
