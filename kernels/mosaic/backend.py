"""The Mosaic GPU backend: packed matrices on NVIDIA Hopper (H100, H200), the successor of the
Triton backend.

    up to MAX_TOKENS tokens   `gemv`   int8 tensor cores on prefixes; one scale per row or matrix
    more                               decoded once into 16 bits, then XLA's own matrix product

Both are deterministic: the first adds integers, the second adds up in a fixed order.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atd.kernels import packed, prefixes
from atd.weights import Packed

MAX_TOKENS = 16


@dataclass(frozen=True)
class Mosaic(packed.Backend):
    """A backend of `atd.kernels.matmul`."""

    name = "mosaic"
    layout = "words"
    needs = (
        "Mosaic's kernels need 9.0 (H100, H200); backends 'triton' (from 8.0) and 'xla' run there"
    )

    def allows(self, capability: tuple[int, int]) -> bool:
        return capability == (9, 0)  # no other has wgmma

    def refuses(self, dtype, type) -> str | None:
        if reason := super().refuses(dtype, type):
            return reason
        if type.ternary.scales_shape[1] != 1:
            return (
                "it multiplies weights with one scale per row, or one for all; backend 'triton' "
                "multiplies groups as well"
            )
        return None

    def multiply(self, x: jax.Array, weight: Packed) -> jax.Array:
        if x.shape[0] > MAX_TOKENS:
            return packed.decode_once(x, weight).astype(x.dtype)
        from atd.kernels.mosaic import gemv  # here, because it imports Mosaic: half a second

        held = packed.prepare(weight, self.layout)
        words, scales, type = jnp.asarray(held.codes), jnp.asarray(held.scales), held.type.ternary
        plan = prefixes.plan(type.bases, type.tied)

        def products(coefficients: jax.Array) -> jax.Array:
            return gemv.products(plan, coefficients, words, interpret=self.interpret)

        y = packed.by_prefixes(x, words, scales, type, products, gemv.COLUMNS[-1])
        return y.astype(x.dtype)
