"""Bit layouts: how the trits of a ternary matrix lie in memory and in files.

A matrix of `out` rows, `in` columns (inputs) and N bases is `trits int8 [out, in, N]`, values in
{-1, 0, 1}. One place of the matrix is a *parameter*; it has N trits. A `Layout` turns the trits
into an array of `codes` and back without loss, for numpy and for jax.numpy arrays alike. A *cell*
is the fewest parameters of a row whose trits fill whole bytes. Rows are padded with trits of 0 up
to a whole cell, so a matrix may have any number of inputs.

    layout        bits per trit  codes
    interleaved   1.6            uint8 [out, ceil(in/5), N]
    aligned       1.6            uint8 [out, cells, N]                  the default in files
    words         1.6            uint32 [out, words]                    in memory only
    tiles         1.6            uint32 [ceil(out/16), steps, loads, 128]  in memory only
    bit-ttt       2              uint8 [out, ceil(in/4), N]             Bit-TTT-Engine
    hf-bitnet     2              uint8 [out/4, in]                      Hugging Face `bitnet`
    tq2_0         2              uint8 [out, ceil(in/256), N, 64]       GGUF

**The dense byte** (the first four layouts) holds five trits, 3^5 = 243 <= 256. With digits d_j =
t_j + 1, j = 0..4,

    v = 81 d_0 + 27 d_1 + 9 d_2 + 3 d_3 + d_4 < 243,        q = max(1, ceil(256 v / 243)).

The byte q is the fraction v/243 in units of 1/256, rounded up, so the digits fall out by
multiplication alone: r = q, then five times r = 3 r, d_j = r >> 8, r = r & 255. 13 of the 256
values of a byte are not used.

- **interleaved**: A cell is 5 parameters and takes N bytes. Its 5 N trits are in the order
  (parameter 0, base 0), (parameter 0, base 1), ..., (parameter 4, base N-1), and byte b of the cell
  holds the trits 5 b .. 5 b + 4. Example, N = 2, one row of 5 parameters (1, 1) (0, 0) (0, 0) (0,
  0) (0, -1): digits 2 2 1 1 1 and 1 1 1 1 0, v = 229 and 120, bytes 242 and 127.
- **aligned**: As interleaved, but rows of 4096 inputs or more are padded with zero trits (bytes
  128) up to a whole 16 bytes, which GPU kernels read where they lie: at most 1.6 % more.
- **words**: As aligned, with rows of any length padded to a whole 16 bytes, each 4 bytes as a
  little-endian uint32: the same bytes as aligned from 4096 inputs up.
- **tiles**: The words in the order in which the 32 threads of a GPU's warp load them. A *piece* is
  what one thread takes of a row at a time: 4 words, or 12 for N = 3, so that pieces hold whole
  cells. A *step* is 16 rows and 4 pieces of each, which lie together: for each 4 words of a piece
  (a load), first of rows 0..7, then of rows 8..15, thread 4 g + t finds the 4 words of piece t of
  row g (or g + 8) at place 4 (4 g + t) of 128. Rows are padded to 16, words of a row to whole
  steps: 1.5 % of 4096 inputs, 11 % of 576.
- **bit-ttt**: Byte [o, c, b] holds base b of the parameters 4 c .. 4 c + 3, the first in the lowest
  two bits: 00 = 0, 01 = +1, 10 = -1.
- **hf-bitnet**: For N = 1 and a multiple of 4 rows. Byte [r, k] holds column k of the rows r, r +
  out/4, r + 2 out/4, r + 3 out/4, the first in the lowest two bits, as trit + 1.
- **tq2_0**: Blocks of 256 parameters. Byte [o, block, b, 32 h + m], h = 0, 1, m = 0..31, holds the
  parameters 128 h + 32 l + m, l = 0..3 in bits 2 l and 2 l + 1, as trit + 1. GGUF's own scale per
  block is not part of the codes.
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
ALIGNED_FROM = 4096  # inputs: below, 16 bytes are some per cent of a row
NUMPY_ROWS = 128  # rows at a time, so that the steps between trits and bytes stay in a core's cache
TILE_ROWS, HALVES, THREADS_PER_ROW, LOAD_WORDS = 16, 2, 4, 4  # of layout `tiles`
DENSE_CODES = np.maximum((256 * np.arange(243) + 242) // 243, 1).astype(np.uint8)  # q of each v
ZEROS = DENSE_CODES[121]  # the byte of five trits of 0


def _byte_of_fields(fields):
    """uint8 [..., 4] of 2-bit codes -> uint8 [...], field j in bits 2j and 2j+1."""
    return fields[..., 0] | (fields[..., 1] << 2) | (fields[..., 2] << 4) | (fields[..., 3] << 6)


def _fields_of_byte(codes):
    """uint8 [...] -> uint8 [..., 4], field j from bits 2j and 2j+1."""
    return namespace(codes).stack([(codes >> (2 * j)) & 3 for j in range(4)], axis=-1)


# --- interleaved: dense base 3 ----------------------------------------------------------------


def _interleaved_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    return out, -(-inputs // TRITS_PER_BYTE), bases


def _interleaved_pack(trits):
    out, _, bases = trits.shape
    cells = pad_inputs(trits, TRITS_PER_BYTE).reshape(out, -1, TRITS_PER_BYTE * bases)
    digits = (cells + 1).astype(np.uint8).reshape(out, -1, bases, TRITS_PER_BYTE)  # of each byte
    value = digits[..., 0]
    for j in range(1, TRITS_PER_BYTE):
        value = value * 3 + digits[..., j]  # at most 242; narrow, as packing is bound by memory
    code = (value.astype(np.uint16) * 256 + 242) // 243  # at most 62,194
    return namespace(trits).maximum(code, 1).astype(np.uint8)


def _interleaved_unpack(codes, out: int, inputs: int, bases: int):
    xp = namespace(codes)
    rest = codes.astype(np.uint16)
    digits = []
    for _ in range(TRITS_PER_BYTE):
        rest = rest * 3
        digits.append((rest >> 8).astype(np.int8))
        rest = rest & 255
    cells = xp.stack(digits, axis=-1)  # [out, cells, N, 5]
    return (cells.reshape(out, -1, bases) - 1)[:, :inputs].astype(np.int8)


# --- aligned, words: interleaved, rows of whole 16 bytes --------------------------------------


def _aligned_cells(inputs: int, bases: int) -> int:
    """Cells of a row that ends on a whole ALIGNMENT bytes."""
    multiple = ALIGNMENT // math.gcd(ALIGNMENT, bases)
    return -(-inputs // (TRITS_PER_BYTE * multiple)) * multiple


def _align(codes, inputs: int, bases: int):
    """uint8 [out, cells, N] of `interleaved` or `aligned` -> the same, rows of whole 16 bytes."""
    short = _aligned_cells(inputs, bases) - codes.shape[1]
    pad = namespace(codes).pad
    return pad(codes, ((0, 0), (0, short), (0, 0)), constant_values=ZEROS) if short else codes


def _aligned_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    if inputs < ALIGNED_FROM:
        return _interleaved_shape(out, inputs, bases)
    return out, _aligned_cells(inputs, bases), bases


def _aligned_pack(trits):
    codes, inputs = _interleaved_pack(trits), trits.shape[1]
    return codes if inputs < ALIGNED_FROM else _align(codes, inputs, trits.shape[2])


def _words_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    return out, _aligned_cells(inputs, bases) * bases // 4


def words_of(codes, inputs: int, bases: int):
    """Returns the codes of `words`, uint32 [out, words], of uint8 [out, cells, N] of `interleaved`
    or `aligned`."""
    rows = _align(codes, inputs, bases).reshape(codes.shape[0], -1, 4)  # [out, words, 4 bytes]
    if isinstance(rows, np.ndarray):
        return rows.view("<u4")[..., 0]
    return jax.lax.bitcast_convert_type(rows, jnp.uint32)


def bytes_of(words, bases: int):
    """Returns the words of rows, uint32 [out, words], as bytes uint8 [out, cells, N]: codes of
    `aligned`, rows of any length."""
    if isinstance(words, np.ndarray):
        codes = np.ascontiguousarray(words).view(np.uint8)
    else:
        codes = jax.lax.bitcast_convert_type(words, jnp.uint8)  # [out, words, 4]
    return codes.reshape(words.shape[0], -1, bases)


def _words_pack(trits):
    return words_of(_interleaved_pack(trits), *trits.shape[1:])


def _words_unpack(words, out: int, inputs: int, bases: int):
    return _interleaved_unpack(bytes_of(words, bases), out, inputs, bases)


# --- tiles: words as threads take them --------------------------------------------------------


def unit(bases: int) -> tuple[int, int]:
    """Returns the (32-bit words, parameters) of a *unit*, the fewest words of a row that hold whole
    cells.

    1, 1, 3, 1 words and 20, 10, 20, 5 parameters for N = 1, 2, 3, 4.
    """
    words = bases // math.gcd(bases, 4)
    return words, 4 * words // bases * TRITS_PER_BYTE


def _tiles_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    loads, words = unit(bases)[0], _words_shape(out, inputs, bases)[1]  # of a piece; of a row
    steps = -(-words // (THREADS_PER_ROW * loads * LOAD_WORDS))
    return -(-out // TILE_ROWS), steps, loads * HALVES, LOAD_WORDS * 32


def tiles_of(words, bases: int):
    """Returns the codes of `tiles` of uint32 [out, words] of `words`."""
    (out, count), loads = words.shape, unit(bases)[0]
    groups, steps = -(-out // TILE_ROWS), -(-count // (THREADS_PER_ROW * loads * LOAD_WORDS))
    width = steps * THREADS_PER_ROW * loads * LOAD_WORDS
    zeros = np.uint32(int.from_bytes(bytes([ZEROS] * 4), "little"))
    pad = ((0, groups * TILE_ROWS - out), (0, width - count))
    padded = namespace(words).pad(words, pad, constant_values=zeros)
    pieces = padded.reshape(groups, HALVES, -1, steps, THREADS_PER_ROW, loads, LOAD_WORDS)
    # from [group, half, g, step, t, load, word]
    return pieces.transpose(0, 3, 5, 1, 2, 4, 6).reshape(groups, steps, loads * HALVES, -1)


def _pieces(tiles):
    """Codes of `tiles` as [group, step, load, half, g, t, word]."""
    groups, steps, loads, _ = tiles.shape
    return tiles.reshape(groups, steps, loads // HALVES, HALVES, -1, THREADS_PER_ROW, LOAD_WORDS)


def words_of_tiles(tiles, out: int, inputs: int, bases: int):
    """Returns the codes of `words`, uint32 [out, words], of codes of `tiles`."""
    rows = _pieces(tiles).transpose(0, 3, 4, 1, 5, 2, 6).reshape(len(tiles) * TILE_ROWS, -1)
    return rows[:, : _words_shape(out, inputs, bases)[1]][:out]


def _tiles_pack(trits):
    return tiles_of(_words_pack(trits), trits.shape[2])


def _tiles_unpack(tiles, out: int, inputs: int, bases: int):
    return _words_unpack(words_of_tiles(tiles, out, inputs, bases), out, inputs, bases)


def _tiles_take(tiles, rows, inputs: int, bases: int):
    half = TILE_ROWS // HALVES
    pieces = _pieces(tiles)[rows // TILE_ROWS, :, :, rows % TILE_ROWS // half, rows % half]
    words = pieces.swapaxes(2, 3).reshape(len(rows), -1)  # from [n, step, load, t, word]
    words = words[:, : _words_shape(1, inputs, bases)[1]]
    return _words_unpack(words, len(rows), inputs, bases)


# --- bit-ttt: 2 bits, interleaved -------------------------------------------------------------


def _bit_ttt_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    return out, -(-inputs // 4), bases


def _bit_ttt_pack(trits):
    out, _, bases = trits.shape
    code = (trits * trits + (trits < 0)).astype(np.uint8)  # 0 -> 0, +1 -> 1, -1 -> 2
    fields = pad_inputs(code, 4).reshape(out, -1, 4, bases).swapaxes(2, 3)  # [out, in/4, N, 4]
    return _byte_of_fields(fields)


def _bit_ttt_unpack(codes, out: int, inputs: int, bases: int):
    fields = _fields_of_byte(codes)  # [out, in/4, N, 4]
    trits = (fields & 1).astype(np.int8) - (fields >> 1).astype(np.int8)
    return trits.swapaxes(2, 3).reshape(out, -1, bases)[:, :inputs]


# --- hf-bitnet: 2 bits, N = 1, strided rows ---------------------------------------------------


def _hf_bitnet_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    return out // 4, inputs


def _hf_bitnet_pack(trits):
    out, inputs, _ = trits.shape
    fields = (trits[..., 0] + 1).astype(np.uint8).reshape(4, out // 4, inputs)
    return _byte_of_fields(fields.transpose(1, 2, 0))


def _hf_bitnet_unpack(codes, out: int, inputs: int, bases: int):
    fields = _fields_of_byte(codes).transpose(2, 0, 1)  # [4, out/4, in]
    return (fields.astype(np.int8) - 1).reshape(out, inputs, 1)


def _hf_bitnet_take(codes, rows, inputs: int, bases: int):
    field, row = rows // len(codes), rows % len(codes)
    trits = (codes[row] >> (2 * field)[:, None].astype(np.uint8)) & 3
    return (trits.astype(np.int8) - 1)[..., None]


# --- tq2_0: GGUF's order ----------------------------------------------------------------------


def _tq2_0_shape(out: int, inputs: int, bases: int) -> tuple[int, ...]:
    return out, -(-inputs // 256), bases, 64


def _tq2_0_pack(trits):
    out, _, bases = trits.shape
    fields = (pad_inputs(trits, 256) + 1).astype(np.uint8)
    fields = fields.reshape(out, -1, 2, 4, 32, bases)  # [out, block, h, l, m, N]
    return _byte_of_fields(fields.transpose(0, 1, 5, 2, 4, 3)).reshape(out, -1, bases, 64)


def _tq2_0_unpack(codes, out: int, inputs: int, bases: int):
    fields = _fields_of_byte(codes.reshape(out, -1, bases, 2, 32))  # [out, block, N, h, m, l]
    trits = fields.astype(np.int8) - 1
    return trits.transpose(0, 1, 3, 5, 4, 2).reshape(out, -1, bases)[:, :inputs]


# --- the table --------------------------------------------------------------------------------


_DENSE = np.isin(np.arange(256), DENSE_CODES)
_NO_FIELD_IS_3 = (_fields_of_byte(np.arange(256)) != 3).all(axis=-1)
_UINT8, _UINT32 = np.dtype(np.uint8), np.dtype(np.uint32)


@dataclass(frozen=True)
class Layout:
    """A named, versioned way to lay trits [out, in, N] in codes.

    Attributes:
        dtype: of the codes.
        valid_bytes: bool [256], the bytes that `pack` can write.
        codes_shape: (out, inputs, bases) -> shape of the codes.
        only_bases, multiple_of_rows: what a matrix must have, where a layout does not take any.
    """

    name: str
    version: int
    dtype: np.dtype
    valid_bytes: np.ndarray
    codes_shape: Callable[[int, int, int], tuple[int, ...]]
    _pack: Callable
    _unpack: Callable
    _take: Callable | None = None
    only_bases: int | None = None
    multiple_of_rows: int = 1

    @property
    def row_separable(self) -> bool:
        """Whether row o of the codes depends on row o of the trits alone.

        Then rows can be gathered, cut and joined packed.
        """
        return self._take is None

    def refuses(self, out: int, inputs: int, bases: int) -> str | None:
        """Returns why a matrix of this shape cannot have this layout, or None."""
        if self.only_bases not in (None, bases):
            return f"layout {self.name} holds N = {self.only_bases}, not N = {bases}"
        if out % self.multiple_of_rows:
            return (
                f"layout {self.name} needs a number of rows that is a multiple of "
                f"{self.multiple_of_rows}, not {out}"
            )
        return None

    def pack(self, trits):
        """Packs trits int8 [out, in, N] into codes. Raises ValueError for a refused shape."""
        if reason := self.refuses(*trits.shape):
            raise ValueError(reason)
        return self._in_row_chunks(self._pack, trits)

    def unpack(self, codes, out: int, inputs: int, bases: int):
        """Unpacks codes into trits int8 [out, inputs, bases]."""
        if not self.row_separable:
            return self._unpack(codes, out, inputs, bases)
        return self._in_row_chunks(lambda rows: self._unpack(rows, len(rows), inputs, bases), codes)

    def take(self, codes, rows, inputs: int, bases: int):
        """Unpacks some rows, int [n], and no others -> trits int8 [n, inputs, bases]."""
        if self._take is not None:
            return self._take(codes, rows, inputs, bases)
        return self._unpack(codes[rows], len(rows), inputs, bases)

    def _in_row_chunks(self, function: Callable, array):
        """function(array), in numpy a few rows at a time: ten times faster than all at once."""
        if not isinstance(array, np.ndarray) or not self.row_separable or len(array) <= NUMPY_ROWS:
            return function(array)
        starts = range(0, len(array), NUMPY_ROWS)
        return np.concatenate([function(array[i : i + NUMPY_ROWS]) for i in starts])

    def invalid_bytes(self, codes) -> int:
        """Counts the bytes that `pack` does not write: a corrupted tensor has some."""
        return int((~self.valid_bytes[np.ascontiguousarray(codes).view(np.uint8)]).sum())

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


_ALL = (
    Layout(
        "interleaved", 1, _UINT8, _DENSE, _interleaved_shape, _interleaved_pack,
        _interleaved_unpack,
    ),
    Layout("aligned", 1, _UINT8, _DENSE, _aligned_shape, _aligned_pack, _interleaved_unpack),
    Layout("words", 1, _UINT32, _DENSE, _words_shape, _words_pack, _words_unpack),
    Layout("tiles", 1, _UINT32, _DENSE, _tiles_shape, _tiles_pack, _tiles_unpack, _tiles_take),
    Layout("bit-ttt", 1, _UINT8, _NO_FIELD_IS_3, _bit_ttt_shape, _bit_ttt_pack, _bit_ttt_unpack),
    Layout(
        "hf-bitnet", 1, _UINT8, _NO_FIELD_IS_3, _hf_bitnet_shape, _hf_bitnet_pack,
        _hf_bitnet_unpack, _hf_bitnet_take, only_bases=1, multiple_of_rows=4,
    ),
    Layout("tq2_0", 1, _UINT8, _NO_FIELD_IS_3, _tq2_0_shape, _tq2_0_pack, _tq2_0_unpack),
)  # fmt: skip
LAYOUTS = {layout.name: layout for layout in _ALL}
DEFAULT_LAYOUT = "aligned"
