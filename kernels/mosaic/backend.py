"""The Mosaic GPU backend: packed matrices on NVIDIA Hopper (H100, H200), the successor of the
Triton backend.

    up to MAX_TOKENS tokens   `gemv`   int8 tensor cores on prefixes; one scale per row or matrix
    more                               decoded once into 16 bits, then XLA's own matrix product

Both are deterministic: the first adds integers, the second adds up in a fixed order. Of weights
with a trellis code `gemv` makes the products of the planes, and XLA filters them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atd.kernels import packed, prefixes, xla
from atd.weights import Packed, TrellisType

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
        words, type = jnp.asarray(held.codes), held.type.ternary
        coded = isinstance(type, TrellisType)
        plan = prefixes.plan(type.bases, not coded and type.tied)

        def products(coefficients: jax.Array) -> jax.Array:
            return gemv.products(plan, coefficients, words, interpret=self.interpret)

        sums = packed.by_prefixes(x, plan, words.shape[1], products, gemv.COLUMNS[-1])
        if coded:
            y = xla.filtered(sums.swapaxes(1, 2), held)
        else:
            y = packed.scaled(sums, jnp.asarray(held.scales))
        return y.astype(x.dtype)
