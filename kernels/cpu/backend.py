"""The CPU backend: packed matrices on processors, by a C++ library that is compiled on first use.

    gemv.h        up to MAX_TOKENS tokens: integers on prefixes, from the packed bytes; with the
                  norm before, and the residual stream or SwiGLU behind
    gemm.h        more tokens, and groups: rows decoded to float32, some at a time
    gemm8.h       more tokens of 8 bits: rows decoded to bytes
    attention.h   one new token of each sequence

Activations become integers: of 14 bits where the bases of a weight are summed apart (free scales,
trellis codes), and of 19 to 27 bits, in two parts, elsewhere. Neither costs anything that can be
measured. Where 8 bits are asked for, they have 8, in prompts as well. Results do not depend on the
number of threads. See `prefixes.h` for the mathematics.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from atd.kernels import packed
from atd.kernels.cpu import build
from atd.weights import Packed, TernaryType, TrellisType, Weight
from atd.weights.codes import Code

MAX_TOKENS = 16
MAX_INPUTS = 65536  # sums of 32 bits hold as many


@dataclass(frozen=True)
class Cpu(packed.Backend):
    """A backend of `atd.kernels.matmul`."""

    name = "cpu"
    layout = "aligned"
    rounds = True

    def device_refuses(self) -> str | None:
        platform = jax.default_backend()
        if platform != "cpu":
            return f"it runs on CPUs and this process runs on {platform}"
        return build.unavailable()

    def supports(self, x: jax.Array, weight: Weight) -> str | None:
        # in this order: what it does not multiply needs no compiler
        return self.refuses(x.dtype, weight.type) or self.device_refuses()

    def fuses(self, x: jax.Array, weight: Weight, gated: bool = False) -> bool:
        type = weight.type.ternary
        coded = isinstance(type, TrellisType)
        halves = not gated or type.shape[0] % (2 * type.segment if coded else 2) == 0
        return self._few(x, type) and halves

    def multiply(
        self,
        x: jax.Array,
        weight: Packed,
        norm: packed.Norm | None = None,
        residual: jax.Array | None = None,
        gated: bool = False,
        int8: bool = False,
    ) -> jax.Array:
        """Multiplies x [M, in] by weight [out, in] -> [M, out] in x's dtype.

        Args:
            norm, residual, gated: as in `atd.kernels.matmul.fused`, only where it `fuses`.
            int8: whether activations are `packed.rounded`.
        """
        held, type = self.prepare(weight), weight.type.ternary
        assert isinstance(held, Packed)
        matrix = jnp.asarray(held.codes), jnp.asarray(held.scales)
        attributes, wide = _attributes(type), x.astype(jnp.float32)
        if int8 and type.scales_shape[1] > 1:  # sums over groups are no integers
            wide, int8 = packed.rounded(wide), False
        result = jax.ShapeDtypeStruct((x.shape[0], type.shape[0] // (1 + gated)), jnp.float32)
        if not self._few(x, type):
            assert (norm, residual, gated) == (None, None, False), "see `Cpu.fuses`"
            call = jax.ffi.ffi_call("atd_gemm", result)
            return call(*matrix, wide, **attributes, int8=int8).astype(x.dtype)
        none = jnp.zeros(0, jnp.float32)
        gain = none if norm is None else norm.gain.astype(jnp.float32)
        added = none if residual is None else residual.astype(jnp.float32)
        options = {
            "parts": np.int64(0 if int8 else parts_of(type)),
            "eps": np.float32(0 if norm is None else norm.eps),
            "gated": gated,
        }
        call = jax.ffi.ffi_call("atd_gemv", result)
        return call(*matrix, wide, gain, added, **attributes, **options).astype(x.dtype)

    def attend(self, q, k, v, positions, cache, frequencies, heads, window):
        if self.device_refuses():
            return None
        batch, _, _, head_dim = cache[0].shape
        result = jax.ShapeDtypeStruct((batch, 1, heads * head_dim), jnp.float32)
        places = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in cache]
        aliases = {4 + i: 1 + i for i in range(len(cache))}
        call = jax.ffi.ffi_call("atd_attend", (result, *places), input_output_aliases=aliases)
        out, *cache = call(
            positions,
            *(part.astype(jnp.float32) for part, _ in (q, k, v)),
            *cache,
            frequencies=np.asarray(frequencies, np.float32),
            starts=np.asarray([start for _, start in (q, k, v)], np.int64),
            heads=np.int64(heads),
            window=np.int64(window),
        )
        return out.astype(q[0].dtype), tuple(cache)

    def refuses(self, dtype, type) -> str | None:
        if reason := super().refuses(dtype, type):
            return reason
        if type.ternary.shape[1] > MAX_INPUTS:
            return f"it multiplies up to {MAX_INPUTS} inputs; backend 'xla' multiplies any"
        return None

    def _few(self, x: jax.Array, type: TernaryType | TrellisType) -> bool:
        """Whether a product is one of integers."""
        return x.shape[0] <= MAX_TOKENS and type.scales_shape[1] == 1


def parts_of(type: TernaryType | TrellisType) -> int:
    """Returns how many parts an activation's integer has.

    Where no two neighbours of the trits in a byte are in one sum, an activation has 14 of the 16
    bits of a coefficient; else it has fewer, and a second part makes up for it.
    """
    apart = isinstance(type, TrellisType) or not type.tied
    return 1 if apart and type.bases > 1 else 2


def _attributes(type: TernaryType | TrellisType) -> dict:
    """What the library is told of a type: see `Matrix` of matrix.h."""
    coded = isinstance(type, TrellisType)
    told = {
        "rows": type.shape[0],
        "bases": type.bases,
        "period": type.code.period if coded else 1,
        "length": type.segment if coded else 0,
        "group_size": type.shape[1] if coded else type.group_size,
    }
    taps = _taps(type.code) if coded else np.zeros(0, np.float32)
    numbers = {name: np.int64(value) for name, value in told.items()}
    return {**numbers, "tied": not coded and type.tied, "taps": taps}


def _taps(code: Code) -> np.ndarray:
    """float32 [(ages + 1) planes]: taps [age, plane], then the phase of each plane."""
    table = np.zeros((code.memory + 2, code.trits), np.float32)
    for phase, trits in enumerate(code.taps):
        for i, taps in enumerate(trits):
            table[: len(taps), code.first[phase] + i] = taps
            table[-1, code.first[phase] + i] = phase
    return table.ravel()
