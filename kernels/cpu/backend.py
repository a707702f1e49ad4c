"""The CPU backend: packed matrices on processors, by a C++ library that is compiled on first use.

    up to MAX_TOKENS tokens   `atd_products`   integers on prefixes, from the packed bytes
    more                      `atd_weights`    rows decoded into float32, some at a time, then XLA's
                                               own matrix product

Activations become integers: of 14 bits where the bases of a weight are summed apart (free scales,
trellis codes), and of 19 to 27 bits, in two parts, elsewhere. Neither costs anything that can be
measured. Results do not depend on the number of threads. See `prefixes.h` for the mathematics.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from atd.kernels import packed
from atd.kernels.cpu import build
from atd.weights import Packed, TernaryType, TrellisType, Weight
from atd.weights.codes import Code
from atd.weights.layouts import TRITS_PER_BYTE

MAX_TOKENS = 16
MAX_INPUTS = 65536  # sums of 32 bits hold as many
CHUNK_BYTES = 4 << 20  # of weights that are decoded at a time: what stays in a cache
MAX_CHUNKS = 32  # so that programs stay short


@dataclass(frozen=True)
class Cpu(packed.Backend):
    """A backend of `atd.kernels.matmul`."""

    name = "cpu"
    layout = "aligned"

    def device_refuses(self) -> str | None:
        platform = jax.default_backend()
        if platform != "cpu":
            return f"it runs on CPUs and this process runs on {platform}"
        return build.unavailable()

    def supports(self, x: jax.Array, weight: Weight) -> str | None:
        # in this order: what it does not multiply needs no compiler
        return self.refuses(x.dtype, weight.type) or self.device_refuses()

    def refuses(self, dtype, type) -> str | None:
        if reason := super().refuses(dtype, type):
            return reason
        if type.ternary.scales_shape[1] != 1:
            return "it multiplies weights with one scale per row; backend 'xla' multiplies groups"
        if type.ternary.shape[1] > MAX_INPUTS:
            return f"it multiplies up to {MAX_INPUTS} inputs; backend 'xla' multiplies any"
        return None

    def multiply(self, x: jax.Array, weight: Packed) -> jax.Array:
        held, wide = self.prepare(weight), x.astype(jnp.float32)
        assert isinstance(held, Packed)
        many = x.shape[0] > MAX_TOKENS
        return (_decoded(wide, held) if many else _products(wide, held)).astype(x.dtype)


def parts_of(type: TernaryType | TrellisType) -> int:
    """Returns how many parts an activation's integer has.

    Where no two neighbours of the trits in a byte are in one sum, an activation has 14 of the 16
    bits of a coefficient; else it has fewer, and a second part makes up for it.
    """
    apart = isinstance(type, TrellisType) or not type.tied
    return 1 if apart and type.bases > 1 else 2


def _products(x: jax.Array, weight: Packed) -> jax.Array:
    """x float32 [M, in] times a weight in layout `aligned` -> float32 [M, out]."""
    type, attributes = weight.type.ternary, _attributes(weight)
    shape = jax.ShapeDtypeStruct((x.shape[0], type.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call("atd_products", shape)
    return call(x, *_operands(weight), **attributes, parts=np.int64(parts_of(type)))


def _decoded(x: jax.Array, weight: Packed) -> jax.Array:
    """The same for many tokens."""
    type, (codes, scales) = weight.type.ternary, _operands(weight)
    cells = codes.shape[1]
    unit, period = (type.segment, type.code.period) if isinstance(type, TrellisType) else (1, 1)
    columns = cells * TRITS_PER_BYTE
    # Parameter p of cell c is column p cells + c of the decoded weights.
    padded = jnp.pad(x, ((0, 0), (0, columns - x.shape[1])))
    planes = padded.reshape(len(x), cells, TRITS_PER_BYTE).swapaxes(1, 2).reshape(len(x), columns)
    rows_of_chunk = max(CHUNK_BYTES // (4 * columns), type.shape[0] // MAX_CHUNKS)
    step = -(-rows_of_chunk // unit) * unit
    parts, attributes = [], _attributes(weight)
    for start in range(0, type.shape[0], step):
        rows = min(step, type.shape[0] - start)
        call = jax.ffi.ffi_call("atd_weights", jax.ShapeDtypeStruct((rows, columns), jnp.float32))
        mine = slice(start // period, (start + rows) // period)
        cut = scales if len(scales) == 1 else scales[start : start + rows]
        parts.append(call(codes[mine], cut, **attributes) @ planes.T)
    return jnp.concatenate(parts).T


def _operands(weight: Packed) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(weight.codes), jnp.asarray(weight.scales)


def _attributes(weight: Packed) -> dict:
    """What the library is told of a type: see `Code` of products.cc."""
    type = weight.type.ternary
    coded = isinstance(type, TrellisType)
    told = {
        "bases": type.bases,
        "period": type.code.period if coded else 1,
        "length": type.segment if coded else 0,
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
