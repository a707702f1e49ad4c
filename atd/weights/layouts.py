"""Bit layouts: how the trits of a matrix lie in bytes. Arrays in, arrays out, for numpy and jax.numpy alike.

A matrix is `trits int8 [out, in, bases]`, values in {-1, 0, 1}. A `Layout` turns it into `codes uint8 [...]` and back
without loss. Inputs are padded with zero trits up to the layout's cell; `unpack` cuts them off again, so any `in` is
allowed.

    interleaved   dense base 3. A cell is 5 parameters x N trits, the N trits of one parameter side by side, in N bytes
                  of 5 trits each (3^(5N) <= 256^N): 1.6 N bits a weight. codes [out, ceil(in/5), N].
    aligned       interleaved, and rows of 4096 inputs or more end on a whole 16 bytes, which is how GPU kernels read them
                  where they lie: at most 1.6 % more. Narrower rows are as in interleaved. codes [out, cells, N].
    words         aligned with rows of any length, as little-endian uint32; a view of `aligned` from 4096 inputs up. In
                  memory alone. codes uint32 [out, words].
    tiles         words in the order in which a GPU's threads take them: 16 rows and 64 bytes of each (192 for N = 3) lie
                  together, and thread 4 g + t finds 16 bytes of row g, then of row g + 8, at place t of 32 side by side.
                  A load of 32 threads is 512 bytes in a row. In memory alone; rows padded to 16, and to whole 64 (192)
                  bytes: 1.5 % of 4096 inputs, 11 % of 576. codes uint32 [ceil(out/16), steps, loads, 128].
    bit-ttt       2 bits a trit, the N bytes of 4 parameters side by side (Bit-TTT-Engine): 00 = 0, 01 = +1, 10 = -1.
                  codes [out, ceil(in/4), N].
    hf-bitnet     2 bits a trit, N = 1, rows strided by out/4 (Hugging Face `bitnet`): code = trit + 1. codes [out/4,
                  in].
    tq2_0         2 bits a trit in GGUF's TQ2_0 order, 256 parameters a block (the block's fp16 scale is kept apart):
                  codes [out, ceil(in/256), N, 64].

The dense byte code: five trits d_j = t_j + 1 make v = sum_j d_j 3^(4-j) < 243, stored as q = max(1, ceil(256 v / 243)).
Then q is the binary fraction v/243 rounded up, and the digits fall out by multiplication alone: r = q; r *= 3; d_j = r
>> 8; r &= 255. 13 of the 256 codes are unused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from atd.weights.groups import namespace, pad_inputs

TRITS_PER_BYTE = 5
ALIGNMENT = 16  # bytes, of rows of `aligned`
ALIGNED_FROM = 4096  # inputs: below, 16 bytes are a few per cent of a row
NUMPY_ROWS = 128  # rows at a time, so that the steps between trits and bytes stay in a core's cache
BYTES = np.dtype(np.uint8)
DENSE_CODES = np.maximum((256 * np.arange(243) + 242) // 243, 1).astype(
    np.uint8
)  # q of every value v


def _byte_of_fields(fields):
    """uint8 [..., 4] of 2-bit codes -> uint8 [...], field j in bits 2j and 2j+1."""
    return fields[..., 0] | (fields[..., 1] << 2) | (fields[..., 2] << 4) | (fields[..., 3] << 6)


def _fields_of_byte(codes):
    """uint8 [...] -> uint8 [..., 4], field j from bits 2j and 2j+1."""
    return namespace(codes).stack([(codes >> (2 * j)) & 3 for j in range(4)], axis=-1)


# --- interleaved: dense base 3 ----------------------------------------------------------------------------------------


def _interleaved_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    return out, -(-inputs // TRITS_PER_BYTE), bases


def _interleaved_pack(trits):
    out, _, bases = trits.shape
    cells = pad_inputs(trits, TRITS_PER_BYTE).reshape(
        out, -1, TRITS_PER_BYTE * bases
    )  # t(p0,b0) t(p0,b1) ... t(p4,bN)
    digits = (
        (cells + 1).astype(np.uint8).reshape(out, -1, bases, TRITS_PER_BYTE)
    )  # the cell's 5N trits: N bytes of 5
    value = digits[..., 0]
    for j in range(1, TRITS_PER_BYTE):
        value = (
            value * 3 + digits[..., j]
        )  # at most 242: narrow numbers, because packing is bound by memory
    code = (value.astype(np.uint16) * 256 + 242) // 243  # at most 62,194
    return namespace(trits).maximum(code, 1).astype(np.uint8)


def _interleaved_unpack(codes, inputs: int, bases: int):
    xp = namespace(codes)
    rest = codes.astype(np.uint16)
    digits = []
    for _ in range(TRITS_PER_BYTE):
        rest = rest * 3
        digits.append((rest >> 8).astype(np.int8))
        rest = rest & 255
    cells = xp.stack(digits, axis=-1)  # [out, cells, N, 5]
    return (cells.reshape(codes.shape[0], -1, bases) - 1)[:, :inputs].astype(np.int8)


# --- aligned: interleaved, rows of whole 16 bytes ----------------------------------------------------------------------


def aligned_cells(inputs: int, bases: int) -> int:
    """Cells of a row that ends on a whole ALIGNMENT bytes."""
    multiple = ALIGNMENT // math.gcd(ALIGNMENT, bases)
    return -(-inputs // (TRITS_PER_BYTE * multiple)) * multiple


def align(codes, inputs: int, bases: int):
    """codes uint8 [out, cells, N] of `interleaved` or `aligned` -> rows of whole 16 bytes, zero trits at the end."""
    short = aligned_cells(inputs, bases) - codes.shape[1]
    zero = DENSE_CODES[121]  # five trits of 0
    pad = namespace(codes).pad
    return pad(codes, ((0, 0), (0, short), (0, 0)), constant_values=zero) if short else codes


def _aligned_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    if inputs < ALIGNED_FROM:
        return _interleaved_shape(out, inputs, bases)
    return out, aligned_cells(inputs, bases), bases


def _aligned_pack(trits):
    codes, inputs = _interleaved_pack(trits), trits.shape[1]
    return codes if inputs < ALIGNED_FROM else align(codes, inputs, trits.shape[2])


def _words_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    return out, aligned_cells(inputs, bases) * bases // 4


def words_of(codes, inputs: int, bases: int):
    """codes uint8 [out, cells, N] of `interleaved` or `aligned` -> those of `words`, uint32 [out, words]."""
    rows = align(codes, inputs, bases).reshape(codes.shape[0], -1, 4)  # [out, words, 4 bytes]
    if isinstance(rows, np.ndarray):
        return rows.view("<u4")[..., 0]
    return jax.lax.bitcast_convert_type(rows, jnp.uint32)


def _words_pack(trits):
    return words_of(_interleaved_pack(trits), *trits.shape[1:])


def _words_unpack(words, inputs: int, bases: int):
    if isinstance(words, np.ndarray):
        codes = np.ascontiguousarray(words).view(np.uint8)
    else:
        codes = jax.lax.bitcast_convert_type(words, jnp.uint8)
    return _interleaved_unpack(codes.reshape(words.shape[0], -1, bases), inputs, bases)


# --- tiles: words as threads take them --------------------------------------------------------------------------------

TILE_ROWS, HALVES, THREADS_A_ROW, LOAD_WORDS = 16, 2, 4, 4


def period(bases: int) -> int:
    """32-bit words of a row after which cells of N bytes begin at a word again: 1, 1, 3, 1 for N = 1, 2, 3, 4."""
    return bases // math.gcd(bases, 4)


def _tiles_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    loads, words = (
        period(bases),
        _words_shape(out, inputs, bases)[1],
    )  # of a thread and row; of a row
    steps = -(-words // (THREADS_A_ROW * loads * LOAD_WORDS))
    return (
        -(-out // TILE_ROWS),
        steps,
        loads * HALVES,
        TILE_ROWS // HALVES * THREADS_A_ROW * LOAD_WORDS,
    )


def tiles_of(words, bases: int):
    """uint32 [out, words] of `words` -> those of `tiles`."""
    (out, count), loads = words.shape, period(bases)
    groups, steps = -(-out // TILE_ROWS), -(-count // (THREADS_A_ROW * loads * LOAD_WORDS))
    width = steps * THREADS_A_ROW * loads * LOAD_WORDS
    zero = int.from_bytes(bytes([DENSE_CODES[121]] * 4), "little")  # trits of 0
    pad = ((0, groups * TILE_ROWS - out), (0, width - count))
    padded = namespace(words).pad(words, pad, constant_values=np.uint32(zero))
    pieces = padded.reshape(
        groups, HALVES, -1, steps, THREADS_A_ROW, loads, LOAD_WORDS
    )  # [.., half, g, step, t, load, e]
    return pieces.transpose(0, 3, 5, 1, 2, 4, 6).reshape(groups, steps, loads * HALVES, -1)


def words_of_tiles(tiles, inputs: int, bases: int, rows=None):
    """codes of `tiles` -> those of `words`, uint32 [rows, words], of some rows int [n], or of all of them and of the padding."""
    groups, steps, loads, _ = tiles.shape
    pieces = tiles.reshape(groups, steps, loads // HALVES, HALVES, -1, THREADS_A_ROW, LOAD_WORDS)
    if rows is None:
        taken = pieces.transpose(0, 3, 4, 1, 5, 2, 6)  # [group, half, g, step, t, load, e]
        count = groups * TILE_ROWS
    else:
        half, count = TILE_ROWS // HALVES, len(rows)
        taken = pieces[rows // TILE_ROWS, :, :, rows % TILE_ROWS // half, rows % half].swapaxes(
            2, 3
        )  # [n, step, t, load, e]
    return taken.reshape(count, -1)[:, : _words_shape(count, inputs, bases)[1]]


def _tiles_pack(trits):
    return tiles_of(_words_pack(trits), trits.shape[2])


def _tiles_unpack(tiles, inputs: int, bases: int):
    return _words_unpack(words_of_tiles(tiles, inputs, bases), inputs, bases)


# --- bit-ttt: 2 bits, interleaved -------------------------------------------------------------------------------------


def _bit_ttt_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    return out, -(-inputs // 4), bases


def _bit_ttt_pack(trits):
    out, _, bases = trits.shape
    code = (trits * trits + (trits < 0)).astype(np.uint8)  # 0 -> 0, +1 -> 1, -1 -> 2
    return _byte_of_fields(
        pad_inputs(code, 4).reshape(out, -1, 4, bases).swapaxes(2, 3)
    )  # fields: [out, in/4, N, 4]


def _bit_ttt_unpack(codes, inputs: int, bases: int):
    fields = _fields_of_byte(codes)  # [out, in/4, N, 4]
    trits = (fields & 1).astype(np.int8) - (fields >> 1).astype(np.int8)
    return trits.swapaxes(2, 3).reshape(codes.shape[0], -1, bases)[:, :inputs]


# --- hf-bitnet: 2 bits, N = 1, strided rows ---------------------------------------------------------------------------


def _hf_bitnet_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    return out // 4, inputs


def _hf_bitnet_pack(trits):
    out, inputs, _ = trits.shape
    fields = (
        (trits[..., 0] + 1).astype(np.uint8).reshape(4, out // 4, inputs)
    )  # packed row r holds rows r + i*(out/4)
    return _byte_of_fields(fields.transpose(1, 2, 0))


def _hf_bitnet_unpack(codes, inputs: int, bases: int):
    fields = _fields_of_byte(codes).transpose(2, 0, 1)  # [4, out/4, in]
    return (fields.astype(np.int8) - 1).reshape(-1, inputs, 1)


# --- tq2_0: GGUF's order ----------------------------------------------------------------------------------------------


def _tq2_0_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    return out, -(-inputs // 256), bases, 64


def _tq2_0_pack(trits):
    out, _, bases = trits.shape
    fields = (
        (pad_inputs(trits, 256) + 1).astype(np.uint8).reshape(out, -1, 2, 4, 32, bases)
    )  # element h*128 + l*32 + m
    return _byte_of_fields(fields.transpose(0, 1, 5, 2, 4, 3)).reshape(
        out, -1, bases, 64
    )  # byte h*32 + m, field l


def _tq2_0_unpack(codes, inputs: int, bases: int):
    fields = _fields_of_byte(codes.reshape(codes.shape[0], -1, bases, 2, 32)).astype(
        np.int8
    )  # [out, blocks, N, h, m, l]
    return (fields - 1).transpose(0, 1, 3, 5, 4, 2).reshape(codes.shape[0], -1, bases)[:, :inputs]


# --- the table --------------------------------------------------------------------------------------------------------


def _valid_table(codes) -> np.ndarray:
    table = np.zeros(256, bool)
    table[codes] = True
    return table


_FIELDS = np.stack([(np.arange(256) >> (2 * j)) & 3 for j in range(4)])
_NO_FIELD_IS_3 = (_FIELDS != 3).all(axis=0)


@dataclass(frozen=True)
class Layout:
    """A named, versioned way to lay trits [out, in, N] in codes; see the module's docstring for each.

    `row_separable`: row o of the codes depends on row o of the trits alone, so rows can be gathered, cut and
    concatenated packed.
    """

    name: str
    version: int
    row_separable: bool
    valid_bytes: np.ndarray  # bool [256]: bytes that pack() can write
    codes_shape: Callable[
        [int, int, int], tuple[int, ...]
    ]  # (out, in, bases) -> shape of the codes
    _pack: Callable
    _unpack: Callable
    dtype: np.dtype = BYTES  # of the codes

    def refuses(self, out: int, inputs: int, bases: int) -> str | None:
        """Why a matrix of this shape cannot have this layout, or None."""
        if self.name != "hf-bitnet":
            return None
        if bases != 1:
            return f"layout hf-bitnet holds one base, not {bases}"
        return (
            f"layout hf-bitnet needs a number of rows that is a multiple of 4, not {out}"
            if out % 4
            else None
        )

    def pack(self, trits):
        """trits int8 [out, in, N] -> codes. Raises ValueError for a shape that the layout refuses."""
        if reason := self.refuses(*trits.shape):
            raise ValueError(reason)
        return self._in_row_chunks(self._pack, trits)

    def unpack(self, codes, inputs: int, bases: int):
        """codes -> trits int8 [out, inputs, bases]; with rows of padding at the end where the layout has them (tiles)."""
        return self._in_row_chunks(lambda rows: self._unpack(rows, inputs, bases), codes)

    def _in_row_chunks(self, function: Callable, array):
        """function(array); numpy takes it a few rows at a time, ten times faster than through main memory."""
        if not isinstance(array, np.ndarray) or not self.row_separable or len(array) <= NUMPY_ROWS:
            return function(array)
        return np.concatenate(
            [function(array[i : i + NUMPY_ROWS]) for i in range(0, len(array), NUMPY_ROWS)]
        )

    def invalid_bytes(self, codes) -> int:
        """How many bytes are none that `pack` writes: a corrupted tensor."""
        return int((~self.valid_bytes[np.ascontiguousarray(codes).view(np.uint8)]).sum())

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "interleaved",
            1,
            True,
            _valid_table(DENSE_CODES),
            _interleaved_shape,
            _interleaved_pack,
            _interleaved_unpack,
        ),
        Layout(
            "aligned",
            1,
            True,
            _valid_table(DENSE_CODES),
            _aligned_shape,
            _aligned_pack,
            _interleaved_unpack,
        ),
        Layout(
            "words",
            1,
            True,
            _valid_table(DENSE_CODES),
            _words_shape,
            _words_pack,
            _words_unpack,
            np.dtype(np.uint32),
        ),
        Layout(
            "tiles",
            1,
            False,
            _valid_table(DENSE_CODES),
            _tiles_shape,
            _tiles_pack,
            _tiles_unpack,
            np.dtype(np.uint32),
        ),
        Layout("bit-ttt", 1, True, _NO_FIELD_IS_3, _bit_ttt_shape, _bit_ttt_pack, _bit_ttt_unpack),
        Layout(
            "hf-bitnet",
            1,
            False,
            _NO_FIELD_IS_3,
            _hf_bitnet_shape,
            _hf_bitnet_pack,
            _hf_bitnet_unpack,
        ),
        Layout("tq2_0", 1, True, _NO_FIELD_IS_3, _tq2_0_shape, _tq2_0_pack, _tq2_0_unpack),
    )
}
DEFAULT_LAYOUT = "aligned"


def repack(codes, inputs: int, bases: int, source: str, target: str):
    """codes of layout `source` -> codes of layout `target`, the same trits."""
    if source == target:
        return codes
    return LAYOUTS[target].pack(LAYOUTS[source].unpack(codes, inputs, bases))
