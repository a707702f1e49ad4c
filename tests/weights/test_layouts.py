"""Layouts: every code of every cell, every byte, bytes worked out by hand from FORMATS.md, GGUF's
own coder as an oracle."""

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from atd.weights.layouts import (
    DEFAULT_LAYOUT,
    DENSE_CODES,
    LAYOUTS,
    TILE_ROWS,
    tiles_of,
    words_of_tiles,
)

CELL = {
    "interleaved": 5,
    "aligned": 5,
    "words": 5,
    "tiles": 5,
    "bit-ttt": 4,
    "hf-bitnet": 1,
    "tq2_0": 256,
}  # inputs whose trits share bytes
NAMES = list(LAYOUTS)


def random_trits(out: int, inputs: int, bases: int, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (out, inputs, bases)).astype(np.int8)


def accepted(name: str, out: int, bases: int) -> bool:
    return LAYOUTS[name].refuses(out, 1, bases) is None


def padded_rows(name: str, out: int) -> int:
    """Returns the rows that the codes of a matrix of `out` rows hold."""
    return -(-out // TILE_ROWS) * TILE_ROWS if name == "tiles" else out


# --- every code of every cell -----------------------------------------------------------------


def numbered_cells(start: int, stop: int, bases: int) -> np.ndarray:
    """Cells start..stop of all 3^(5 bases) of them: trits [stop - start, 5, bases], the digits of
    the cell's number."""
    number = np.arange(start, stop, dtype=np.int32)
    trits = np.empty((len(number), 5 * bases), np.int8)
    for j in reversed(range(5 * bases)):
        trits[:, j] = number % 3 - 1
        number = number // 3
    return trits.reshape(-1, 5, bases)


def check_interleaved(trits: np.ndarray) -> None:
    layout, (_, _, bases) = LAYOUTS["interleaved"], trits.shape
    codes = layout.pack(trits)
    assert codes.shape == (len(trits), 1, bases)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(layout.unpack(codes, len(trits), 5, bases), trits)
    assert layout.invalid_bytes(codes) == 0


@pytest.mark.parametrize("bases", [1, 2])
def test_every_interleaved_cell(bases):
    check_interleaved(numbered_cells(0, 3 ** (5 * bases), bases))


@pytest.mark.parametrize("bases", [3, 4])
def test_interleaved_cells_of_more_bases_by_sampling(bases):
    """A thousand of each byte's 243 values at each place of a cell."""
    check_interleaved(random_trits(1 << 18, 5, bases))


def test_every_interleaved_cell_has_bytes_of_its_own():
    """Two bases: all 3^10 cells, no two with the same bytes."""
    codes = LAYOUTS["interleaved"].pack(numbered_cells(0, 3**10, 2)).reshape(-1, 2)
    assert len(np.unique(codes, axis=0)) == 3**10


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_every_2_bit_cell(bases):
    """Every byte of 4 trits, at every place among the bytes of the bases."""
    for four, base in product(np.array(list(product((-1, 0, 1), repeat=4)), np.int8), range(bases)):
        for name, inputs in (("bit-ttt", 4), ("tq2_0", 256)):
            trits = np.zeros((1, inputs, bases), np.int8)
            trits[0, :: inputs // 4, base] = four
            layout = LAYOUTS[name]
            np.testing.assert_array_equal(
                layout.unpack(layout.pack(trits), 1, inputs, bases), trits
            )
        if bases == 1:
            trits = four.reshape(4, 1, 1)
            layout = LAYOUTS["hf-bitnet"]
            np.testing.assert_array_equal(layout.unpack(layout.pack(trits), 4, 1, 1), trits)


# --- every byte -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("words", "tiles")]
)  # bytes of aligned
def test_every_byte(name):
    """pack writes exactly the valid bytes, unpack makes trits of all 256, and a valid byte comes
    back as it was."""
    layout = LAYOUTS[name]
    inputs = CELL[name]
    out = 256 * layout.multiple_of_rows
    shape = layout.codes_shape(out, inputs, 1)  # 256 rows of codes
    codes = np.broadcast_to(
        np.arange(256, dtype=np.uint8).reshape(-1, *[1] * (len(shape) - 1)), shape
    )
    packed = layout.pack(np.clip(layout.unpack(codes, out, inputs, 1), -1, 1))
    np.testing.assert_array_equal(
        (packed == codes).reshape(256, -1).all(axis=1), layout.valid_bytes
    )
    assert layout.valid_bytes.sum() == (243 if name in ("interleaved", "aligned") else 81)
    assert layout.invalid_bytes(np.arange(256, dtype=np.uint8)) == 256 - layout.valid_bytes.sum()


def test_dense_digits_fall_out_by_multiplication():
    """The property the GPU kernels rest on, for all 243 values: digit j = (rest * 3) >> 8."""
    for value, code in enumerate(DENSE_CODES):
        rest, digits = int(code), []
        for _ in range(5):
            rest *= 3
            digits.append(rest >> 8)
            rest &= 255
        assert digits == [value // 3 ** (4 - j) % 3 for j in range(5)]
    assert len(set(DENSE_CODES.tolist())) == 243
    assert 0 not in DENSE_CODES


# --- by hand ----------------------------------------------------------------------------------


def test_interleaved_by_hand():
    # one base, trits -1 0 1 0 1: digits 0 1 2 1 2, v = 27 + 18 + 3 + 2 = 50,
    # q = ceil(256 * 50 / 243) = 53
    trits = np.array([-1, 0, 1, 0, 1], np.int8).reshape(1, 5, 1)
    assert LAYOUTS["interleaved"].pack(trits).tolist() == [[[53]]]
    # two bases, parameters (1,1) (0,0) (0,0) (0,0) (0,-1): bytes of digits 2 2 1 1 1 and 1 1 1 1 0,
    # v = 229 and 120, q = 242 and 127
    trits = np.array([[1, 1], [0, 0], [0, 0], [0, 0], [0, -1]], np.int8)[None]
    assert LAYOUTS["interleaved"].pack(trits).tolist() == [[[242, 127]]]
    # all -1 is v = 0, stored as 1; padding is zero trits: one weight of +1 is digits 2 1 1 1 1,
    # v = 202, q = 213
    assert LAYOUTS["interleaved"].pack(np.full((1, 5, 1), -1, np.int8)).item() == 1
    assert LAYOUTS["interleaved"].pack(np.ones((1, 1, 1), np.int8)).item() == 213


def test_bit_ttt_by_hand():
    # weights 1 -1 0 1 of one base: codes 1 2 0 1 in bits 0, 2, 4, 6
    trits = np.array([1, -1, 0, 1], np.int8).reshape(1, 4, 1)
    assert LAYOUTS["bit-ttt"].pack(trits).item() == 0b01_00_10_01
    # the bases lie side by side: [out, in / 4, N]
    trits = np.stack(
        [np.array([1, 0, 0, 0]), np.array([0, -1, 0, 0]), np.array([0, 0, 0, 1])], axis=-1
    )[None].astype(np.int8)
    assert LAYOUTS["bit-ttt"].pack(trits).tolist() == [[[0b1, 0b10_00, 0b01_00_00_00]]]
    assert LAYOUTS["bit-ttt"].unpack(np.full((1, 1, 1), 0xFF, np.uint8), 1, 4, 1).tolist() == [
        [[0]] * 4
    ]  # unused: reads as 0


def test_hf_bitnet_by_hand():
    # packed row r holds rows r, r + 2, r + 4, r + 6 of 8; codes 0 1 2 = -1 0 +1
    trits = np.zeros((8, 3, 1), np.int8)
    trits[1, 0], trits[3, 0], trits[5, 0], trits[7, 0] = 1, -1, 0, 1
    codes = LAYOUTS["hf-bitnet"].pack(trits)
    assert codes.shape == (2, 3)
    assert codes[1, 0] == 0b10_01_00_10
    assert codes[0, 0] == codes[1, 1] == 0b01_01_01_01


def test_tq2_0_by_hand():
    # half h, byte h * 32 + m, bits 2l: element h * 128 + l * 32 + m
    trits = np.zeros((1, 256, 1), np.int8)
    trits[0, 128 + 3 * 32 + 5] = 1
    codes = LAYOUTS["tq2_0"].pack(trits)
    assert codes.shape == (1, 1, 1, 64)
    assert codes[0, 0, 0, 32 + 5] == 0b10_01_01_01
    assert (np.delete(codes.ravel(), 37) == 0b01_01_01_01).all()


def test_tq2_0_is_ggufs():
    """Rows of d * trits, coded by the gguf package, hold our bytes; and it reads ours back."""
    trits = random_trits(6, 768, 1)
    trits[:, ::256] = 1  # a block of zeros has no scale
    blocks = quantize(trits[..., 0] * np.float32(0.25), GGMLQuantizationType.TQ2_0).reshape(
        6, 3, 66
    )
    codes = LAYOUTS["tq2_0"].pack(trits)
    np.testing.assert_array_equal(codes[:, :, 0], blocks[..., :64])
    scales = np.full((6, 3, 1), 0.5, np.float16).view(np.uint8)
    ours = np.concatenate([codes[:, :, 0], scales], axis=-1).reshape(6, -1)
    np.testing.assert_array_equal(dequantize(ours, GGMLQuantizationType.TQ2_0), trits[..., 0] * 0.5)


# --- laws -------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 9),
    st.integers(1, 600),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_round_trip(name, out, inputs, bases, seed):
    layout = LAYOUTS[name]
    if name == "hf-bitnet":
        out, bases = 4 * out, 1
    trits = random_trits(out, inputs, bases, seed)
    codes = layout.pack(trits)
    assert codes.shape == layout.codes_shape(out, inputs, bases)
    assert codes.dtype == layout.dtype
    unpacked = layout.unpack(codes, out, inputs, bases)
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, trits)
    padded = layout.unpack(codes, padded_rows(name, out), inputs, bases)
    assert not padded[out:].any()  # nor is there anything in rows of padding
    assert layout.invalid_bytes(codes) == 0
    rest = layout.unpack(codes, out, -(-inputs // CELL[name]) * CELL[name], bases)[:, inputs:]
    assert not rest.any()  # the padding is zero trits
    if layout.row_separable:
        np.testing.assert_array_equal(layout.pack(trits[out // 2 :]), codes[out // 2 :])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(4, 1, 1), (8, 37, 1), (4, 300, 2), (12, 65, 3), (4, 20, 4)])
def test_numpy_and_jax_agree(name, shape):
    if not accepted(name, shape[0], shape[2]):
        pytest.skip("not for this layout")
    layout, trits = LAYOUTS[name], random_trits(*shape)
    codes = layout.pack(trits)
    ours = layout.pack(jnp.asarray(trits))
    assert ours.dtype == layout.dtype
    np.testing.assert_array_equal(ours, codes)
    unpacked = layout.unpack(jnp.asarray(codes), *shape)
    assert unpacked.dtype == jnp.int8
    np.testing.assert_array_equal(unpacked, trits)
    every = np.arange(256, dtype=layout.dtype)[:, None]  # invalid bytes too are read alike
    every = every * 0x01010101 if layout.dtype == np.uint32 else every
    codes = np.broadcast_to(
        every.reshape(-1, *[1] * (codes.ndim - 1)), (256, *codes.shape[1:])
    ).copy()
    out = padded_rows(name, 1) * 256 * layout.multiple_of_rows
    np.testing.assert_array_equal(
        layout.unpack(jnp.asarray(codes), out, *shape[1:]), layout.unpack(codes, out, *shape[1:])
    )


@pytest.mark.parametrize(
    ("inputs", "bases", "most"),
    [(4096, 1, 1.6), (4096, 2, 0.6), (4096, 3, 1.6), (14336, 2, 0.5), (8192, 1, 1.6)],
)
def test_wide_rows_end_on_16_bytes(inputs, bases, most):
    trits = random_trits(3, inputs, bases)
    codes, strict = LAYOUTS["aligned"].pack(trits), LAYOUTS["interleaved"].pack(trits)
    assert codes[0].size % 16 == 0
    assert codes.size <= (1 + most / 100) * 1.6 / 8 * trits.size
    np.testing.assert_array_equal(codes[:, : strict.shape[1]], strict)
    assert not LAYOUTS["interleaved"].unpack(codes, 3, 5 * codes.shape[1], bases)[:, inputs:].any()
    words = LAYOUTS["words"].pack(trits)
    np.testing.assert_array_equal(words.view(np.uint8), codes.reshape(3, -1))  # the same bytes


@pytest.mark.parametrize(
    ("inputs", "bases", "most"), [(288, 1, 3), (288, 2, 3), (576, 1, 3), (576, 2, 3), (576, 3, 3)]
)
def test_narrow_rows_waste_four_parameters_at_most(inputs, bases, most):
    trits = random_trits(3, inputs, bases)
    codes = LAYOUTS["aligned"].pack(trits)
    np.testing.assert_array_equal(codes, LAYOUTS["interleaved"].pack(trits))
    assert codes.size <= (1 + most / 100) * 1.6 / 8 * trits.size
    assert LAYOUTS["words"].pack(trits).nbytes % 16 == 0


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
@pytest.mark.parametrize(("out", "inputs"), [(16, 320), (20, 333), (1, 1), (48, 2000)])
def test_where_tiles_have_the_words_of_rows(out, inputs, bases):
    trits = random_trits(out, inputs, bases)
    words, tiles = LAYOUTS["words"].pack(trits), LAYOUTS["tiles"].pack(trits)
    np.testing.assert_array_equal(tiles, tiles_of(words, bases))
    np.testing.assert_array_equal(tiles, tiles_of(jnp.asarray(words), bases))
    loads = 3 if bases == 3 else 1  # 16 bytes each, of a thread and a row
    row, word = np.indices(words.shape)
    step, rest = np.divmod(word, 4 * loads * 4)
    thread, rest = np.divmod(rest, loads * 4)
    load, e = np.divmod(rest, 4)
    half, g = np.divmod(row % 16, 8)
    at = row // 16, step, 2 * load + half, g * 16 + thread * 4 + e
    np.testing.assert_array_equal(tiles[at], words)
    others = np.ones(tiles.shape, bool)
    others[at] = False
    assert (tiles[others] == 0x80808080).all()  # five trits of 0 a byte

    for form in (np.asarray, jnp.asarray):
        found = np.asarray(words_of_tiles(form(tiles), out, inputs, bases))
        np.testing.assert_array_equal(found, words)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("out", "inputs", "bases"), [(20, 333, 1), (20, 37, 2), (36, 500, 3)])
def test_some_rows_are_unpacked_alone(name, out, inputs, bases):
    layout = LAYOUTS[name]
    bases = layout.only_bases or bases
    trits = random_trits(out, inputs, bases)
    rows = np.array([out - 1, 0, out // 2, 0, 7])
    for form in (np.asarray, jnp.asarray):
        found = layout.take(form(layout.pack(trits)), form(rows), inputs, bases)
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, trits[rows])


@pytest.mark.parametrize("bases", [1, 2, 3])
def test_32_threads_load_128_words_in_a_row_of_tiles(bases):
    """Thread 4 g + t: piece t of row g, then of row g + 8; a piece is 4 words, or 12 for N = 3,
    which are 3 loads."""
    inputs, piece = 4096, 12 if bases == 3 else 4
    _, steps, loads, size = LAYOUTS["tiles"].codes_shape(32, inputs, bases)
    count = LAYOUTS["words"].codes_shape(32, inputs, bases)[1]
    places = np.arange(32 * count, dtype=np.uint32).reshape(32, count)
    flat = tiles_of(places, bases).ravel()
    assert size == 128
    for group, step, load, half in product(
        range(2), range(steps - 1), range(loads // 2), range(2)
    ):  # the last is not full
        wanted = [
            places[16 * group + 8 * half + g, (4 * step + t) * piece + 4 * load :][:4]
            for g in range(8)
            for t in range(4)
        ]
        start = ((group * steps + step) * loads + 2 * load + half) * 128
        np.testing.assert_array_equal(flat[start : start + 128], np.concatenate(wanted))


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
@pytest.mark.parametrize("inputs", [4096, 14336])
def test_tiles_of_wide_rows_waste_two_per_cent_at_most(inputs, bases):
    taken = 4 * np.prod(LAYOUTS["tiles"].codes_shape(4096, inputs, bases))
    assert 1 <= taken / (4096 * inputs * bases * 1.6 / 8) < 1.02


@pytest.mark.parametrize(("source", "target"), list(product(NAMES, NAMES)))
def test_trits_go_from_each_layout_to_each(source, target):
    out = 20  # no multiple of the 16 rows of tiles
    for inputs, bases in ((1, 1), (37, 1), (300, 1), (131, 2), (40, 3), (13, 4)):
        if accepted(source, out, bases) and accepted(target, out, bases):
            trits = random_trits(out, inputs, bases)
            codes = LAYOUTS[source].pack(trits)
            other = LAYOUTS[target].pack(LAYOUTS[source].unpack(codes, out, inputs, bases))
            np.testing.assert_array_equal(other, LAYOUTS[target].pack(trits))


@pytest.mark.parametrize(
    ("out", "bases", "reason"), [(8, 2, "holds N = 1, not N = 2"), (6, 1, "multiple of 4, not 6")]
)
def test_what_hf_bitnet_refuses(out, bases, reason):
    assert reason in str(LAYOUTS["hf-bitnet"].refuses(out, 5, bases))
    with pytest.raises(ValueError, match=reason):
        LAYOUTS["hf-bitnet"].pack(random_trits(out, 5, bases))


def test_the_default_takes_1_6_bits_a_trit():
    for bases in (1, 2, 3, 4):
        assert (
            np.prod(LAYOUTS[DEFAULT_LAYOUT].codes_shape(64, 4000, bases)) * 8
            == 64 * 4000 // 10 * 16 * bases
        )
