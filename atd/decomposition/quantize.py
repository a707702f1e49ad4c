"""One matrix into a weight of any type: the search that its type asks for."""

from collections.abc import Sequence

import numpy as np

from atd.decomposition import error_feedback, least_squares, trellis_feedback
from atd.decomposition.options import trellis_type
from atd.decomposition.trellis_codes import gaussian_error
from atd.weights import DTYPES, Ternary, TernaryType, Trellis, TrellisType

NEARLY_GAUSSIAN = 0.3  # excess kurtosis up to which a code's error is that on Gaussians, within 8 %
SAMPLE = 256  # rows and inputs that are quantized to find the error on other weights


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
    importance: np.ndarray | None = None,
) -> Ternary | Trellis:
    """Minimises sum_o c_o (w_o - q_o) H (w_o - q_o)' by error feedback, `sweeps` of coordinate
    descent and `refits` rounds of (scales in closed form, one more sweep).

    Args:
        weight: float32 [out, in].
        type: what the matrix becomes.
        factor: that of `hessian`.
        hessian: H float32 [in, in].
        importance: c float32 [out] of the rows, which matters to trellis codes alone: without one,
            the trits of a row are no other row's.
    """
    options = {"dtype": DTYPES[type.dtype], "sweeps": sweeps, "refits": refits}
    if isinstance(type, TrellisType):
        options |= {"code": type.code, "length": type.segment, "importance": importance}
        return Trellis(*trellis_feedback.decompose(weight, factor, hessian, **options), type)
    options |= {"bases": type.bases, "group": type.group, "tied": type.tied}
    return Ternary(*error_feedback.decompose(weight, factor, hessian, **options), type)


def excess_kurtosis(weight: np.ndarray) -> float:
    """Returns the mean of z^4 less 3, z the weights in units of their row's root mean square: 0 for
    Gaussians, 3 for a Laplace distribution, -1.2 for a uniform one.
    """
    squares = np.square(weight, dtype=np.float32)
    squares /= np.maximum(squares.mean(axis=1, keepdims=True), 1e-30)
    return float(np.mean(np.square(squares))) - 3


def code_errors(weight: np.ndarray, types: Sequence[TrellisType]) -> list[float]:
    """Returns what each trellis code leaves of a matrix without second moments: sum (w - q)^2 over
    sum w^2.

    That is the code's error on Gaussians where the weights are nearly so, and is else measured on a
    sample of the matrix.

    Args:
        weight: float32 [out, in].
        types: their codes are among those of `trellis_codes`.
    """
    if types and abs(excess_kurtosis(weight)) <= NEARLY_GAUSSIAN:
        return [gaussian_error(type.code) for type in types]
    return [_measured_error(weight, type) for type in types]


def _measured_error(weight: np.ndarray, type: TrellisType) -> float:
    """What a code leaves of a sample of the matrix."""
    part = weight[:SAMPLE, :: -(-weight.shape[1] // SAMPLE)]
    sample = trellis_type(part.shape, type.code, type.dtype)
    assert sample is not None, "a code for all rows that is none for some"
    left = part - np.asarray(nearest(part, sample).dequantize())
    return float(np.sum(np.square(left)) / max(np.sum(np.square(part)), 1e-30))
