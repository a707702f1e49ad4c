"""Matrices, second moments and dequantized weights, shared by the tests of this folder."""

import ml_dtypes
import numpy as np

from atd.decomposition.second_moments import DAMPING
from atd.weights import DTYPE_NAMES, TernaryType, combine

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KINDS = ("gaussian", "laplace", "student", "sparse")


def weights(kind: str, shape=(24, 192), seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    draw = {
        "gaussian": rng.standard_normal,
        "laplace": lambda shape: rng.laplace(size=shape),
        "student": lambda shape: rng.standard_t(3, size=shape),
        "sparse": lambda shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    }[kind]
    return draw(shape).astype(np.float32)


def dequantize(trits, scales, group, tied=False) -> np.ndarray:
    type = TernaryType(trits.shape[:2], trits.shape[2], group, tied, DTYPE_NAMES[scales.dtype])
    assert scales.shape == type.scales_shape
    assert trits.dtype == np.int8
    assert abs(trits).max(initial=0) <= 1
    return np.asarray(combine(trits, scales, type))


def relative_rmse(weight, approximation) -> float:
    """|weight - approximation| / |weight|, Frobenius norms in float64."""
    weight, approximation = np.asarray(weight, np.float64), np.asarray(approximation, np.float64)
    return float(np.linalg.norm(weight - approximation) / np.linalg.norm(weight))


def moment(inputs, tokens=400, seed=0, decay=1.0) -> np.ndarray:
    """The second moment of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(decay * rng.standard_normal(inputs))
    x = rng.standard_normal((tokens, inputs)) @ rng.standard_normal((inputs, inputs)) * sizes
    return (x.T @ x / tokens / inputs).astype(np.float32)


def gaussian(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def damped(hessian, damping=DAMPING) -> np.ndarray:
    return hessian + damping * np.mean(np.diagonal(hessian)) * np.eye(len(hessian))
