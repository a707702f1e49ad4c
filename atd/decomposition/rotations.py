"""Random Hadamard rotations: R = diag(signs) H / sqrt(n), which are orthogonal.

Sources: QuIP# 2402.04396, QuaRot 2404.00456; matrices of Sylvester (1867) and Paley (1933).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np

_SYLVESTER = 64  # largest factor; more factors are fewer operations, and more passes over memory
_CHUNK = 1 << 18  # float64 values that are rotated at a time: what stays in a core's cache


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix in factors, with x the Kronecker product:

        R = diag(signs) (I x F_1 x F_2 x ...) scale

    Each run of features as wide as the factors together is rotated alone, with signs of its own.
    """

    signs: np.ndarray  # [n]
    # Hadamard matrices of +-1, int8 so that sums are exact; the first may be orthogonal, float64.
    factors: tuple[np.ndarray, ...]
    scale: float

    @property
    def is_hadamard(self) -> bool:
        """Whether all entries are +-scale."""
        return all(factor.dtype == np.int8 for factor in self.factors)

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Returns rows @ R in float64, [..., n] -> [..., n]."""
        y, run = rows * self.signs, 1  # run: features that a step of this factor's index moves by
        for factor in reversed(self.factors):
            matrix = factor.astype(np.float64)
            y = y.reshape(-1, len(matrix), run)
            y = matrix.T @ y if run > 1 else (y[:, :, 0] @ matrix)
            run *= len(matrix)
        return y.reshape(rows.shape) * self.scale


def random_rotation(rng: np.random.Generator, width: int, copies: int = 1) -> Rotation:
    """Draws a random Hadamard rotation.

    The smallest width / 2^k for which `hadamard` knows a matrix is a factor, and 2^k Sylvester's.
    Where it knows none, a random orthogonal matrix of the odd part of the width takes its place.

    Args:
        rng: draws the signs.
        width: features, any number.
        copies: rotations side by side, which differ in their signs.
    """
    signs = rng.choice([-1.0, 1.0], copies * width)
    power = width & -width
    base = width // power
    while base <= width:
        if (matrix := hadamard(base)) is not None:
            return Rotation(signs, (matrix, *_factors(width // base)), width**-0.5)
        base *= 2
    odd = width // power
    q, r = np.linalg.qr(rng.standard_normal((odd, odd)))
    return Rotation(signs, (q * np.sign(np.diag(r)), *_factors(power)), power**-0.5)


def block_rotation(signs: np.ndarray, block: int) -> Rotation:
    """Returns diag(signs) (I x H) / sqrt(block), H Sylvester's Hadamard matrix.

    Args:
        signs: [n].
        block: the order of H, a power of two that divides n.
    """
    return Rotation(signs, tuple(_factors(block)), block**-0.5)


def hadamard(order: int) -> np.ndarray | None:
    """Returns H, int8 of entries +-1 with H H^T = order I, by one of Paley's constructions.

    With the Jacobsthal matrix Q_ij = (i - j | q) of a prime q, and x the Kronecker product:

        q = 3 mod 4, order q + 1:    I + [[0, 1], [-1, Q]]
        q = 1 mod 4, order 2 q + 2:  [[0, 1], [1, Q]] x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]

    None where neither gives one. Powers of two are Sylvester's: see `random_rotation`.
    """
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order % 4:
        return None
    if _is_prime(order - 1):
        return np.eye(order, dtype=np.int8) + _bordered(order - 1, corner=-1)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        plus, minus = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
        return np.kron(_bordered(q, corner=1), plus) + np.kron(np.eye(q + 1, dtype=np.int8), minus)
    return None


def _bordered(q: int, corner: int) -> np.ndarray:
    """[[0, 1], [corner, Q]], int8 [q + 1, q + 1], Q the Jacobsthal matrix of q."""
    legendre = np.full(q, -1, np.int8)
    legendre[np.arange(1, q) ** 2 % q] = 1
    legendre[0] = 0
    i = np.arange(q)
    matrix = np.zeros((q + 1, q + 1), np.int8)
    matrix[0, 1:], matrix[1:, 0] = 1, corner
    matrix[1:, 1:] = legendre[(i[:, None] - i) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


def sylvester(order: int) -> np.ndarray:
    """Returns Sylvester's Hadamard matrix of a power of two, int8 of entries +-1.

    H_1 = 1,   H_2n = [[1, 1], [1, -1]] x H_n. It is symmetric.
    """
    two = np.array([[1, 1], [1, -1]], np.int8)
    return reduce(np.kron, [two] * (order.bit_length() - 1), np.ones((1, 1), np.int8))


def _factors(order: int) -> list[np.ndarray]:
    """Sylvester's Hadamard matrix of a power of two, as Kronecker factors."""
    factors = []
    while order > 1:
        size = min(order, _SYLVESTER)
        factors.append(sylvester(size))
        order //= size
    return factors


def by_rows(
    rotate: Callable[[np.ndarray], np.ndarray], array: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Applies a function of rows to an array, a chunk of rows at a time.

    Args:
        rotate: takes [rows, n] and returns as much.
        array: [..., n].
        dtype: of the result.

    Returns:
        [..., n] in `dtype`.
    """
    rows = array.reshape(-1, array.shape[-1])
    out = np.empty(rows.shape, dtype)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        out[start : start + step] = rotate(rows[start : start + step])
    return out.reshape(array.shape)
