"""`matmul(x, weight)`: y = x W^T for a weight of any type, on the backend that suits it.

    xla     always works, and defines the result: fp32 products of x with `weight.dequantize()`, added up in fp32

A backend is a module with `supports(x, weight) -> str | None`, the reason why it cannot run or None, and `matmul(x,
weight)`; both see static shapes and types alone, so the choice is made while tracing. A backend that was named and
cannot run raises with its reason: it is never replaced silently.
"""

import jax

from atd.kernels import xla
from atd.weights import Weight

BACKENDS = {"xla": xla}
PREFERENCE = ("xla",)  # without a name: the first of these that supports the call


def resolve(x, weight: Weight, backend: str | None = None):
    """The module that `matmul` calls. Raises ValueError, with the reason, for a named backend that cannot run this
    call."""
    if backend is None:
        return next(BACKENDS[name] for name in PREFERENCE if BACKENDS[name].supports(x, weight) is None)
    if backend not in BACKENDS:
        raise ValueError(f"unknown matmul backend {backend!r}; known: {', '.join(BACKENDS)}")
    if reason := BACKENDS[backend].supports(x, weight):
        raise ValueError(
            f"matmul backend {backend!r} cannot multiply x {x.dtype}{list(x.shape)} by {weight.type}: {reason}"
        )
    return BACKENDS[backend]


def matmul(x: jax.Array, weight: Weight, *, backend: str | None = None) -> jax.Array:
    """x [..., in] times weight [out, in] -> [..., out] in x's dtype, summed in float32.

    Raises ValueError for a width of x that is not the weight's, and for a named backend that is unknown or cannot run.
    """
    if x.shape[-1] != weight.type.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight {weight.type} takes {weight.type.shape[1]}")
    rows = x.reshape(-1, x.shape[-1])  # [M, in]
    y = resolve(rows, weight, backend).matmul(rows, weight)
    return y.reshape(*x.shape[:-1], -1)


def take_rows(weight: Weight, rows: jax.Array) -> jax.Array:
    """weight.dequantize()[rows]: int32 [...] -> float32 [..., in], with no more than these rows unpacked."""
    return xla.take_rows(weight, rows)
