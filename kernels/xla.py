"""The XLA backend: it multiplies by weights of every type on every device, and defines the result.

Weights stay in memory as stored; a chunk of rows is dequantized and multiplied at a time.

On a CPU the time goes into moving bytes between registers, not into arithmetic, so what is
dequantized is never put back in the order of the inputs. The codes of a row fall apart into
*planes* of equal length: plane p holds the p-th parameter of every byte (or cell of N bytes), and

    y = sum_p W_p x_p,        W_p [rows, cells], x_p = the columns of x that plane p holds,

where all of W_p comes out of one vectorised expression over the codes, and the activations, which
are few, are permuted instead of the weights. That is about four times as fast as unpacking in the
order of the inputs.

A weight with a trellis code is M planes of trits, multiplied one by one; the code's taps are a
short filter over the products of its rows (`atd.weights.codes.values_of`).

On a GPU a dense matrix of 16 bits takes its activations in the same 16 bits, as its library's
products do.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atd.weights import (
    Dense,
    Packed,
    PackedType,
    Ternary,
    TernaryType,
    Trellis,
    TrellisType,
    Weight,
    combine,
    level_weights,
    ternary_of,
)
from atd.weights.codes import rows_of, values_of
from atd.weights.groups import spread_scales
from atd.weights.layouts import LAYOUTS, TRITS_PER_BYTE, bytes_of, words_of_tiles

CHUNK_BYTES = {"cpu": 2 << 20}  # of float32 weights at a time: what stays in a core's cache
CHUNK_BYTES_ELSEWHERE = 64 << 20

Array = jax.Array | np.ndarray
Cut = Callable[[Array], jax.Array]  # takes some rows of an array [out, ...]


def supports(x: jax.Array, weight: Weight) -> str | None:
    """Returns None: it multiplies everything."""
    return None


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """Multiplies x [M, in] by weight [out, in] -> [M, out] in x's dtype."""
    wide = x.astype(jnp.float32)
    match weight:
        case Dense(array) if array.dtype == jnp.float32:
            y = _dot(array, wide.T).T  # in this order: x W^T of one row is 20 times slower on CPU
        case Dense(array) if array.dtype.itemsize == 2 and jax.default_backend() == "gpu":
            y = tensor_cores(x, jnp.asarray(array))
        case Dense(array):
            # x keeps its precision; and XLA's 16-bit dot on CPU is ten times slower than this.
            y = _by_rows([wide], array.shape[0], lambda cut: [cut(array).astype(jnp.float32)])
        case Ternary(trits, scales, type):

            def weights(cut: Cut) -> Sequence[Array]:
                return [combine(cut(trits), _cut_scales(cut, scales), type)]

            y = _by_rows([wide], type.shape[0], weights)
        case Trellis(trits, _, type):

            def planes(cut: Cut) -> Sequence[Array]:
                return [jnp.moveaxis(jnp.asarray(cut(trits)), -1, 0).astype(jnp.float32)]

            y = filtered(_by_rows([wide], len(trits), planes, type.code.trits), weight)
        case Packed() if weight.type.layout in ("words", "tiles"):
            y = _packed(wide, _as_bytes(weight))
        case Packed(type=PackedType(TrellisType(), "hf-bitnet")):
            return matmul(x, weight.unpack())
        case Packed() if weight.type.layout == "hf-bitnet":
            y = _hf_bitnet(wide, weight)
        case Packed():
            y = _packed(wide, weight)
    return y.astype(x.dtype)


def tensor_cores(
    x: jax.Array, array: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Multiplies x [M, in] by a matrix [out, in] of 16 bits, in these 16 bits.

    Returns [M, out] in dtype, summed in float32.
    """
    x, dimensions = x.astype(array.dtype), (((1,), (1,)), ((), ()))
    return lax.dot_general(x, array, dimensions, preferred_element_type=dtype)


def take_rows(weight: Weight, rows: jax.Array) -> jax.Array:
    """Returns weight.dequantize()[rows], float32 [..., in], for rows int32 [...].

    No other rows are unpacked.
    """
    flat = rows.reshape(-1)
    match weight:
        case Dense(array):
            taken = jnp.asarray(array)[flat].astype(jnp.float32)
        case Packed(codes, scales, type):
            layout, (_, inputs, bases) = LAYOUTS[type.layout], type.ternary.trits_shape

            def take(some: jax.Array) -> jax.Array:
                return layout.take(jnp.asarray(codes), some, inputs, bases)

            taken = _combine_rows(take, scales, type.ternary, flat)
        case Ternary(trits, scales, type) | Trellis(trits, scales, type):
            taken = _combine_rows(lambda some: jnp.asarray(trits)[some], scales, type, flat)
    return taken.reshape(*rows.shape, -1)


def _combine_rows(
    take: Cut, scales: Array, type: TernaryType | TrellisType, rows: jax.Array
) -> jax.Array:
    """Weights float32 [n, in] of some rows, int [n]; `take` has the trits of rows."""
    mine = _cut_scales(lambda a: a[rows], jnp.asarray(scales))
    if isinstance(type, TrellisType):
        values = rows_of(take, rows, type.code, type.segment, type.shape[0])
        return values * mine[:, 0].astype(jnp.float32)
    return jnp.asarray(combine(take(rows), mine, type))


def filtered(products: jax.Array, weight: Trellis | Packed) -> jax.Array:
    """Makes the product of a weight with a trellis code of those of its planes.

    Args:
        products: T_i x, float32 [M, rows / P, planes].

    Returns:
        float32 [M, rows].
    """
    type = ternary_of(weight.type)
    assert isinstance(type, TrellisType)
    values = values_of(products.swapaxes(0, 1), type.code, type.segment)  # [rows, M]
    return values.T * jnp.asarray(weight.scales)[:, 0, 0].astype(jnp.float32)


# --- rows in chunks ---------------------------------------------------------------------------


def _cut_scales(cut: Cut, scales: Array) -> jax.Array:
    """The scales [rows or 1, groups, N or 1] of the rows that `cut` takes; one row serves all."""
    return jnp.asarray(scales) if scales.shape[0] == 1 else cut(scales)


def _dot(a: Array, b: Array) -> jax.Array:
    """A product in float32: without the precision, GPUs would round the factors to TF32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _by_rows(
    planes_of_x: list[jax.Array],
    out: int,
    planes_of_w: Callable[[Cut], Sequence[Array]],
    matrices: int | None = None,
) -> jax.Array:
    """Computes sum_p x_p W_p^T, chunk of rows by chunk -> float32 [M, out].

    The last chunk ends with the last row, so where the chunks do not divide the rows it repeats
    some of the one before: no padding, no copy.

    Args:
        planes_of_x: [M, columns] each.
        out: rows of the matrix.
        planes_of_w: cut -> float32 [rows, columns] each, where cut(array) takes the chunk's rows of
            an array [out, ...].
        matrices: this many are multiplied side by side: planes are [matrices, rows, columns], and
            the products [M, out, matrices].
    """
    side_by_side = () if matrices is None else (matrices,)
    width = sum(x.shape[1] for x in planes_of_x)
    limit = CHUNK_BYTES.get(jax.default_backend(), CHUNK_BYTES_ELSEWHERE)
    rows = min(out, max(8, limit // (4 * width * (matrices or 1)) // 8 * 8))
    transposed = [x.T for x in planes_of_x]  # [columns, M]

    def chunk(start):
        def cut(array: Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(array, start, rows)

        # Without it XLA fuses the decoding into the dot's loop, where it is not vectorised.
        weights = lax.optimization_barrier(planes_of_w(cut))
        products = [_dot(w, x) for w, x in zip(weights, transposed, strict=True)]
        return reduce(operator.add, products)  # [(matrices,) rows, M]

    def body(i, y):
        start = jnp.minimum(i * rows, out - rows)
        return lax.dynamic_update_slice_in_dim(y, chunk(start), start, axis=y.ndim - 2)

    if rows == out:
        return chunk(0).T
    y = jnp.zeros((*side_by_side, out, planes_of_x[0].shape[0]), jnp.float32)
    return lax.fori_loop(0, -(-out // rows), body, y).T


# --- packed -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Planes:
    """Which columns lie together: input (a count + p) run + m is column a run + m of plane p.

    Attributes:
        trits: codes of each base [rows, cells] -> (plane, base) -> trits int.
    """

    count: int
    run: int
    trits: Callable[[list[jax.Array]], Callable[[int, int], jax.Array]]

    def of(self, array: jax.Array, plane: int) -> jax.Array:
        """Takes the columns of a plane: [rows, padded inputs] -> [rows, columns]."""
        planes = array.reshape(array.shape[0], -1, self.count, self.run)
        return planes[:, :, plane].reshape(array.shape[0], -1)


def _base_3(codes: list[jax.Array]):
    """Digit j of byte n is trit 5 n + j of the cell (layout `interleaved`)."""
    digits = []
    for byte in codes:
        rest = byte.astype(jnp.int32)
        for _ in range(TRITS_PER_BYTE):
            rest = rest * 3
            digits.append((rest >> 8) - 1)
            rest = rest & 255
    return lambda plane, base: digits[plane * len(codes) + base]


def _sign_fields(codes: list[jax.Array]):
    """2-bit fields 00 = 0, 01 = +1, 10 = -1."""

    def trits(plane: int, base: int):
        field = (codes[base].astype(jnp.int32) >> (2 * plane)) & 3
        return (field & 1) - (field >> 1)

    return trits


def _offset_fields(codes: list[jax.Array]):
    """2-bit fields of trit + 1."""
    return lambda plane, base: ((codes[base].astype(jnp.int32) >> (2 * plane)) & 3) - 1


_PLANES = {
    "interleaved": _Planes(TRITS_PER_BYTE, 1, _base_3),
    "aligned": _Planes(TRITS_PER_BYTE, 1, _base_3),
    "bit-ttt": _Planes(4, 1, _sign_fields),
    "tq2_0": _Planes(4, 32, _offset_fields),
}


def _as_bytes(weight: Packed) -> Packed:
    """A weight in layout `words` or `tiles` as one of bytes, which lie as those of `aligned` do."""
    words, type = jnp.asarray(weight.codes), weight.type
    if type.layout == "tiles":
        words = words_of_tiles(words, *type.ternary.trits_shape)
    codes = bytes_of(words, type.ternary.bases)
    return Packed(codes, weight.scales, replace(type, layout="aligned"))


def _packed(x: jax.Array, weight: Packed) -> jax.Array:
    """x [M, in] times a weight in one of the layouts of _PLANES -> float32 [M, out]."""
    type = weight.type.ternary
    rows, inputs, bases = type.trits_shape
    planes = _PLANES[weight.type.layout]
    # The inputs and the layout's padding.
    width = planes.count * (math.prod(weight.codes.shape[1:]) // bases)
    x = jnp.pad(x, ((0, 0), (0, width - inputs)))

    def trits_of(cut: Cut):
        codes = cut(weight.codes)
        return planes.trits([codes[:, :, base].reshape(len(codes), -1) for base in range(bases)])

    def separate(cut: Cut) -> Sequence[Array]:
        trits = trits_of(cut)
        return [
            jnp.stack([trits(plane, base) for base in range(bases)]).astype(jnp.float32)
            for plane in range(planes.count)
        ]

    def planes_of_w(cut: Cut) -> Sequence[Array]:
        assert isinstance(type, TernaryType)
        trits, scales = trits_of(cut), _cut_scales(cut, weight.scales)
        # Widened while they are few: without the barrier XLA converts each scale for each weight.
        wide = lax.optimization_barrier(scales.astype(jnp.float32))
        spread = [spread_scales(wide[..., i], type.group_size, width) for i in range(wide.shape[2])]
        return [_combine_plane(trits, spread, planes, plane, type) for plane in range(planes.count)]

    planes_of_x = [planes.of(x, plane) for plane in range(planes.count)]
    if isinstance(type, TrellisType):
        return filtered(_by_rows(planes_of_x, rows, separate, bases), weight)
    return _by_rows(planes_of_x, rows, planes_of_w)


def _combine_plane(
    trits, spread: list[jax.Array], planes: _Planes, plane: int, type: TernaryType
) -> jax.Array:
    """`atd.weights.combine` for the columns of a plane: the same operations in the same order."""

    def scale(i: int):
        return planes.of(spread[i], plane) if spread[i].shape[1] > 1 else spread[i]

    parts = [trits(plane, i) for i in range(type.bases)]
    if type.tied:
        levels = level_weights(type.bases).astype(int)
        parts = [reduce(operator.add, map(operator.mul, parts, levels))]
    return reduce(operator.add, (t.astype(jnp.float32) * scale(i) for i, t in enumerate(parts)))


def _hf_bitnet(x: jax.Array, weight: Packed) -> jax.Array:
    """Field i of packed row r is row i out/4 + r: four matrices, one below the other."""
    type = weight.type.ternary
    quarter = type.shape[0] // 4

    def block(i: int) -> jax.Array:
        rows = slice(i * quarter, (i + 1) * quarter)
        scales = _cut_scales(lambda array: array[rows], weight.scales)

        def planes_of_w(cut: Cut) -> Sequence[Array]:
            trits = ((cut(weight.codes) >> (2 * i)) & 3).astype(jnp.int8) - 1
            return [combine(trits[:, :, None], _cut_scales(cut, scales), type)]

        return _by_rows([x], quarter, planes_of_w)

    return jnp.concatenate([block(i) for i in range(4)], axis=1)
