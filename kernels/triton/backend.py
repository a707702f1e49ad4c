"""The Triton backend: packed matrices on NVIDIA GPUs of compute capability 8.0 or newer.

    few tokens    `gemv`      int8 tensor cores on prefixes; fastest with one scale per row
    some          `gemm`      tiles decoded in registers
    many          `decode`    decoded once into 16 bits, then XLA's own matrix product

How many is few, and the shapes of blocks of threads: `atd.kernels.settings`. All results are
deterministic: everything adds up in a fixed order. For few tokens a product is two kernels: a norm
is computed where the activations are folded, and SwiGLU or a residual where the results are
written. Of weights with a trellis code `gemv` and `gemm` make the products of the planes, and XLA
filters them; `decode` filters what it decodes.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from atd.kernels import packed, xla
from atd.kernels.packed import Norm
from atd.kernels.settings import Settings, choose
from atd.kernels.trellis import planes_type
from atd.kernels.triton import attention, decode, gemm, gemv
from atd.kernels.triton.geometry import ROWS, most_tokens
from atd.weights import Packed, TernaryType, TrellisType, Weight


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
        type = weight.type.ternary
        if isinstance(type, TrellisType):
            type = planes_type(type)
        elif gated and type.shape[0] % (2 * ROWS):
            return False
        return way_of(self._settings(x, type), type, x.shape[0]) == "gemv"

    def attend(self, q, k, v, positions, cache, frequencies, heads, window):
        if self.device_refuses() or attention.refuses(cache):
            return None
        operands = q, k, v, positions, cache, frequencies, heads, window
        return attention.attend(*operands, interpret=self.interpret)

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
        held = self.prepare(weight)
        assert isinstance(held, Packed)
        if isinstance(type, TrellisType):
            return self._with_code(x, held, norm, residual, gated)
        settings = self._settings(x, type)
        codes, scales = jnp.asarray(held.codes), jnp.asarray(held.scales)
        way = way_of(settings, type, x.shape[0])
        if way == "gemv":
            fused = {"norm": norm, "residual": residual, "gated": gated}
            return gemv.matmul(x, codes, scales, type, settings.gemv, **fused, interpret=interpret)
        assert (norm, residual, gated) == (None, None, False), "see `Triton.fuses`"
        narrow = packed.narrowed(x)
        if way == "gemm":
            tiles = settings.tiles
            return gemm.matmul(narrow, codes, scales, type, tiles, dtype, interpret=interpret)
        return decode.matmul(narrow, codes, scales, type, dtype, interpret=interpret)

    def _with_code(
        self,
        x: jax.Array,
        weight: Packed,
        norm: Norm | None,
        residual: jax.Array | None,
        gated: bool,
    ) -> jax.Array:
        """`multiply` by a weight with a trellis code, in layout `tiles`."""
        assert isinstance(weight.type.ternary, TrellisType)
        type = planes_type(weight.type.ternary)
        settings, interpret = self._settings(x, type), self.interpret
        operands = jnp.asarray(weight.codes), jnp.asarray(weight.scales), type
        way, narrow = way_of(settings, type, x.shape[0]), packed.narrowed(x)
        if way == "decode":
            operands = *operands[:2], weight.type.ternary
            return decode.matmul(narrow, *operands, x.dtype, interpret=interpret)
        if way == "gemv":
            options = {"norm": norm, "planes": True, "interpret": interpret}
            found = gemv.matmul(x, *operands, settings.gemv, **options)
        else:
            found = gemm.matmul(narrow, *operands, settings.tiles, apart=True, interpret=interpret)
        y = xla.filtered(found.swapaxes(1, 2), weight)
        if gated:
            gate, up = jnp.split(y, 2, axis=1)
            y = jax.nn.silu(gate) * up
        return (y if residual is None else y + residual.astype(jnp.float32)).astype(x.dtype)

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
