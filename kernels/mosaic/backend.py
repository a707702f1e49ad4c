"""The Mosaic GPU backend: packed matrices on NVIDIA Hopper (H100, H200), the successor of the Triton backend.

    up to MAX_TOKENS tokens    `mosaic_gemv`   int8 tensor cores on prefixes; a scale a row (or one for all)
    more                       decoded once into 16 bits, then XLA's own matrix product

Both are deterministic: the first adds integers, the second adds up in a fixed order.
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from atd.kernels import packed, prefixes
from atd.weights import Packed, Weight

MAX_TOKENS = 16


@dataclass(frozen=True)
class Mosaic(packed.Backend):
    """A backend of `atd.kernels.matmul`."""

    def device_refuses(self) -> str | None:
        return None if self.interpret else device_refuses()

    def refuses(self, dtype, type) -> str | None:
        return refuses(dtype, type)

    def matmul(self, x: jax.Array, weight: Weight) -> jax.Array:
        """x [M, in] times weight [out, in] -> [M, out] in x's dtype. Raises RuntimeError where the device's own results
        are not those of the XLA backend (`self_test`)."""
        assert isinstance(weight, Packed)
        if not self.interpret and jax.default_backend() == "gpu":
            self_test(weight.type.ternary.bases, weight.type.ternary.tied)
        return multiply(x, weight, self.interpret)


def multiply(x: jax.Array, weight: Packed, interpret: bool = False) -> jax.Array:
    """`Mosaic.matmul` without the self-test."""
    if x.shape[0] > MAX_TOKENS:
        return packed.decode_once(x, weight).astype(x.dtype)
    from atd.kernels.mosaic import (
        gemv as mosaic_gemv,  # here, because it imports Mosaic: half a second
    )

    held = packed.prepare(weight, "words")
    assert isinstance(held, Packed)
    words, scales, type = jnp.asarray(held.codes), jnp.asarray(held.scales), held.type.ternary

    def products(coefficients: jax.Array) -> jax.Array:
        return mosaic_gemv.products(
            prefixes.plan(type.bases, type.tied), coefficients, words, interpret=interpret
        )

    return packed.by_prefixes(x, words, scales, type, products, mosaic_gemv.COLUMNS[-1]).astype(
        x.dtype
    )


def refuses(dtype, type) -> str | None:
    """Why these kernels cannot multiply activations of a dtype by a weight of a type, or None."""
    if reason := packed.refuses(dtype, type):
        return reason
    if type.ternary.scales_shape[1] != 1:
        return "it multiplies weights with one scale a row, or one for all; backend 'triton' multiplies groups as well"
    return None


def device_refuses() -> str | None:
    """Why this process's device cannot run them, or None."""
    needs = (
        "Mosaic's kernels need 9.0 (H100, H200); backends 'triton' (from 8.0) and 'xla' run there"
    )
    return packed.capability_refuses(
        lambda capability: capability == (9, 0), needs
    )  # no other has wgmma


@cache
def self_test(bases: int, tied: bool) -> None:
    """Multiplies a small matrix of N bases on this device and compares with XLA, once a process. Raises RuntimeError if they
    differ."""
    packed.self_test("mosaic", largest_difference, bases, tied)


def largest_difference(bases: int, tied: bool, *, interpret: bool = False) -> float:
    """Between the kernel and XLA: see `packed.largest_difference`."""
    return packed.largest_difference(lambda x, weight: multiply(x, weight, interpret), bases, tied)
