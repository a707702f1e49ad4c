"""The Triton backend: packed matrices on NVIDIA GPUs of compute capability 8.0 or newer.

    few tokens    `gemv`      int8 tensor cores on prefixes; fastest with one scale per row
    some          `gemm`      tiles decoded in registers
    many          `decode`    decoded once into 16 bits, then XLA's own matrix product

How many is few, and the shapes of blocks of threads: `atd.kernels.settings`. All results are
deterministic: everything adds up in a fixed order. For few tokens a product is two kernels: a norm
is computed where the activations are folded, and SwiGLU or a residual where the results are
written.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from atd.kernels import packed
from atd.kernels.settings import Settings, choose
from atd.kernels.triton import decode, gemm, gemv
from atd.kernels.triton.fold import Norm
from atd.kernels.triton.geometry import ROWS, most_tokens
from atd.weights import Packed, TernaryType, Weight


@dataclass(frozen=True)
class Triton(packed.Backend):
    """A backend of `atd.kernels.matmul`.

    Attributes:
        settings: used instead of those that `atd.kernels.settings.choose` finds.
    """

    settings: Settings | None = None
    name = "triton"
    layout = "tiles"
    needs = "Triton needs 8.0 (RTX 30xx, A10, A100 or newer); backend 'xla' runs there"

    def allows(self, capability: tuple[int, int]) -> bool:
        return capability >= (8, 0)

    def fuses(self, x: jax.Array, weight: Weight, gated: bool = False) -> bool:
        """Returns whether `matmul` takes a norm and a residual, or is gated, for these."""
        type = weight.type.ternary
        if gated and type.shape[0] % (2 * ROWS):
            return False
        return way_of(self._settings(x, type), type, x.shape[0]) == "gemv"

    def multiply(
        self,
        x: jax.Array,
        weight: Packed,
        norm: Norm | None = None,
        residual: jax.Array | None = None,
        gated: bool = False,
    ) -> jax.Array:
        """Multiplies x [M, in] by weight [out, in] -> [M, out] in x's dtype.

        Args:
            norm, residual, gated: as in `gemv.matmul`, only where it `fuses`.
        """
        type, dtype, interpret = weight.type.ternary, x.dtype, self.interpret
        settings = self._settings(x, type)
        held = self.prepare(weight)
        assert isinstance(held, Packed)
        codes, scales = jnp.asarray(held.codes), jnp.asarray(held.scales)
        way = way_of(settings, type, x.shape[0])
        if way == "gemv":
            fused = {"norm": norm, "residual": residual, "gated": gated}
            return gemv.matmul(x, codes, scales, type, settings.gemv, **fused, interpret=interpret)
        assert (norm, residual, gated) == (None, None, False), "see `Triton.fuses`"
        narrow = x.astype(jnp.bfloat16) if dtype == jnp.float32 else x  # as in a dense model
        if way == "gemm":
            tiles = settings.tiles
            return gemm.matmul(narrow, codes, scales, type, tiles, dtype, interpret=interpret)
        return decode.matmul(narrow, codes, scales, type, dtype, interpret=interpret)

    def largest_difference(self, bases: int, tied: bool) -> float:
        """Returns the larger of the differences of few and of some tokens: see `packed.Backend`."""
        ways = Settings(gemv_tokens=2), Settings(gemv_tokens=0, gemm_tokens=2)
        return max(
            packed.largest_difference(replace(self, settings=way).multiply, bases, tied)
            for way in ways
        )

    def _settings(self, x: jax.Array, type: TernaryType) -> Settings:
        return self.settings or choose(packed.device_kind(), type, x.shape[0])


def way_of(settings: Settings, type: TernaryType, tokens: int) -> str:
    """Returns which way this many tokens go: gemv, gemm or decode."""
    if tokens <= settings.gemv_tokens and most_tokens(type, 1):
        return "gemv"
    return "gemm" if tokens <= settings.gemm_tokens else "decode"
