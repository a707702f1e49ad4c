"""`matmul(x, weight)`: y = x W^T for a weight of any type, on the backend that suits it.

    xla                always works, and defines the result: fp32 products of x with `weight.dequantize()`, added in fp32
    triton             packed weights on NVIDIA GPUs from compute capability 8.0
    triton-interpret   the same on a CPU, run by jax's interpreter: for tests
    mosaic             packed weights with a scale a row, on Hopper; only where it is asked for, until it is measured
    mosaic-interpret   the same on a CPU: for tests

A backend has `supports(x, weight) -> str | None`, the reason why it cannot run or None, and `matmul(x, weight)`;
Triton's takes what comes before and after a product of few tokens into its kernels (`fused`). All see static shapes and
types alone, so the choice is made while tracing. A backend that was named and cannot run raises with its reason: it is
never replaced silently. Without a name the first of PREFERENCE that supports the call runs, and the logger
`atd.kernels` says which at level INFO, and why not one before it.
"""

import logging
from typing import Any

import jax
import numpy as np

from atd.kernels import packed, xla
from atd.kernels.mosaic.backend import Mosaic
from atd.kernels.triton import attention as triton_attention
from atd.kernels.triton.backend import Norm, Triton
from atd.weights import Dense, Weight

PACKED: dict[str, packed.Backend] = {
    "triton": Triton(),
    "triton-interpret": Triton(interpret=True),
    "mosaic": Mosaic(),
    "mosaic-interpret": Mosaic(interpret=True),
}  # those with kernels for packed weights
BACKENDS: dict[str, Any] = {"xla": xla, **PACKED}
PREFERENCE = ("triton", "xla")
_log = logging.getLogger("atd.kernels")


def resolve(x, weight: Weight, backend: str | None = None):
    """The backend that `matmul` calls. Raises ValueError, with the reason, for a named one that cannot run this call."""
    if backend is None:
        for name in PREFERENCE:
            reason = BACKENDS[name].supports(x, weight)
            if not isinstance(weight, Dense):  # XLA's own products are no choice
                _log.info("%s: %s x %s: %s", name, x.shape, weight.type, reason or "chosen")
            if reason is None:
                return BACKENDS[name]
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
        raise ValueError(
            f"x has {x.shape[-1]} features, the weight {weight.type} takes {weight.type.shape[1]}"
        )
    rows = x.reshape(-1, x.shape[-1])  # [M, in]
    y = resolve(rows, weight, backend).matmul(rows, weight)
    return y.reshape(*x.shape[:-1], -1)


def fused(
    x: jax.Array,
    weight: Weight,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    *,
    backend: str | None = None,
) -> jax.Array | None:
    """`matmul` of x [..., in], normed if so asked, plus a residual [..., out]; or, gated, silu(gate) * up [..., out / 2] of gate
    and up in one matrix: all in the same kernels. None where the backend has none for these tokens and weight."""
    rows = x.reshape(-1, x.shape[-1])
    chosen = resolve(rows, weight, backend)
    if not isinstance(chosen, Triton) or not chosen.fuses(rows, weight, gated):
        return None
    added = None if residual is None else residual.reshape(rows.shape[0], -1)
    return chosen.matmul(rows, weight, norm, added, gated).reshape(*x.shape[:-1], -1)


def attend(
    q: triton_attention.Part,
    k: triton_attention.Part,
    v: triton_attention.Part,
    positions: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    frequencies: np.ndarray,
    heads: int,
    window: int,
    *,
    backend: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]] | None:
    """`triton_attention.attend` of q, k and v of one token of each sequence; None where the backend has no such kernel."""
    chosen = BACKENDS.get(backend or PREFERENCE[0])
    if not isinstance(chosen, Triton) or chosen.device_refuses() or triton_attention.refuses(cache):
        return None
    interpret = chosen.interpret
    return triton_attention.attend(
        q, k, v, positions, cache, frequencies, heads, window, interpret=interpret
    )


def take_rows(weight: Weight, rows: jax.Array) -> jax.Array:
    """weight.dequantize()[rows]: int32 [...] -> float32 [..., in], with no more than these rows unpacked."""
    return xla.take_rows(weight, rows)
