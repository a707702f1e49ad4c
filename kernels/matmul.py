"""`matmul(x, weight)`: y = x W^T for a weight of any type, on the backend that suits it.

    xla                always works, and defines the result: x W^T with `weight.dequantize()` in
                       float32
    triton             packed weights on NVIDIA GPUs from compute capability 8.0
    triton-interpret   the same on a CPU, run by jax's interpreter: for tests
    cpu                packed weights with one scale per row on CPUs, where a C++ compiler is
    mosaic             packed weights with one scale per row, on Hopper; only where it is named
    mosaic-interpret   the same on a CPU: for tests

A backend has `supports(x, weight) -> str | None`, the reason why it cannot run or None, and
`matmul(x, weight)`; some take what comes before and after a product of few tokens into their
kernels (`fused`), and attention (`attend`). All see static shapes and types alone, so the choice is
made while tracing. A backend that was named and cannot run raises with its reason: it is never
replaced silently. Without a name the first of PREFERENCE that supports the call runs, and the
logger `atd.kernels` says which at level INFO, and why not one before it.
"""

import logging
from typing import Any

import jax
import numpy as np

from atd.errors import BadInput
from atd.kernels import packed, xla
from atd.kernels.cpu.backend import Cpu
from atd.kernels.mosaic.backend import Mosaic
from atd.kernels.packed import Norm, Part, rounded
from atd.kernels.triton.backend import Triton
from atd.weights import Dense, Weight

# Those with kernels for packed weights.
PACKED: dict[str, packed.Backend] = {
    "triton": Triton(),
    "triton-interpret": Triton(interpret=True),
    "cpu": Cpu(),
    "mosaic": Mosaic(),
    "mosaic-interpret": Mosaic(interpret=True),
}
BACKENDS: dict[str, Any] = {"xla": xla, **PACKED}
PREFERENCE = ("triton", "cpu", "xla")
_log = logging.getLogger("atd.kernels")


def resolve(x, weight: Weight, backend: str | None = None):
    """Returns the backend that `matmul` calls.

    Raises:
        BadInput: a named backend is unknown, or cannot run this call, with the reason.
    """
    if backend is None:
        for name in PREFERENCE:
            reason = BACKENDS[name].supports(x, weight)
            if not isinstance(weight, Dense):  # XLA's own products are no choice
                _log.info("%s: %s x %s: %s", name, x.shape, weight.type, reason or "chosen")
            if reason is None:
                return BACKENDS[name]
    if backend not in BACKENDS:
        raise BadInput(f"unknown matmul backend {backend!r}; known: {', '.join(BACKENDS)}")
    if reason := BACKENDS[backend].supports(x, weight):
        raise BadInput(
            f"matmul backend {backend!r} cannot multiply x {x.dtype}{list(x.shape)} by "
            f"{weight.type}: {reason}"
        )
    return BACKENDS[backend]


def matmul(
    x: jax.Array, weight: Weight, *, int8: bool = False, backend: str | None = None
) -> jax.Array:
    """Multiplies x [..., in] by weight [out, in], summed in float32.

    Args:
        int8: whether x is `rounded` to 8 bits per token.
        backend: a name of BACKENDS; by default the first of PREFERENCE that can.

    Returns:
        x W^T [..., out] in x's dtype.

    Raises:
        ValueError: the width of x is not the weight's.
        BadInput: the named backend is unknown or cannot run this call.
    """
    if x.shape[-1] != weight.type.shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, the weight {weight.type} takes {weight.type.shape[1]}"
        )
    rows = x.reshape(-1, x.shape[-1])  # [M, in]
    chosen = resolve(rows, weight, backend)
    if not int8:
        y = chosen.matmul(rows, weight)
    elif isinstance(chosen, packed.Backend) and chosen.rounds:
        y = chosen.matmul(rows, weight, int8=True)
    else:
        y = chosen.matmul(rounded(rows), weight)
    return y.reshape(*x.shape[:-1], -1)


def fused(
    x: jax.Array,
    weight: Weight,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    *,
    int8: bool = False,
    backend: str | None = None,
) -> jax.Array | None:
    """Multiplies as `matmul` does, with what comes before and after in the same kernels.

    Args:
        x: activations [..., in].
        weight: [out, in].
        norm: applied to x first.
        residual: [..., out], added to the product.
        gated: whether the weight is a gate above an up matrix, of which silu(gate) * up is
            computed.
        int8: whether x is `rounded` to 8 bits per token, behind the norm.

    Returns:
        [..., out], or [..., out / 2] where it is gated, in x's dtype; None where the backend has no
        such kernels for these tokens and this weight.
    """
    rows = x.reshape(-1, x.shape[-1])
    chosen = resolve(rows, weight, backend)
    if not isinstance(chosen, packed.Backend) or not chosen.fuses(rows, weight, gated):
        return None
    added = None if residual is None else residual.reshape(rows.shape[0], -1)
    options = {"norm": norm, "residual": added, "gated": gated}
    if int8 and chosen.rounds:
        options["int8"] = True
    elif int8:
        rows = rounded(norm(rows).astype(x.dtype) if norm else rows)
        options["norm"] = None
    y = chosen.matmul(rows, weight, **options)
    return y.reshape(*x.shape[:-1], -1)


def attend(
    q: Part,
    k: Part,
    v: Part,
    positions: jax.Array,
    cache: tuple[jax.Array, ...],
    frequencies: np.ndarray,
    heads: int,
    window: int,
    *,
    backend: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]] | None:
    """Attends to one new token of each sequence as `packed.Backend.attend` does.

    None where the backend has no such kernel.
    """
    chosen = PACKED.get(backend or PREFERENCE[0])
    return chosen and chosen.attend(q, k, v, positions, cache, frequencies, heads, window)


def take_rows(weight: Weight, rows: jax.Array) -> jax.Array:
    """Returns weight.dequantize()[rows], float32 [..., in], for rows int32 [...].

    No other rows are unpacked.
    """
    return xla.take_rows(weight, rows)
