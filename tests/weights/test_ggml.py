"""Blocks of ggml: what the package gguf reads in ours, and what we read in its."""

import gguf
import numpy as np
import pytest

from atd.weights.ggml import GRIDS, TQ1_0, TQ2_0, exact_grid, ternary_parts


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.quantization.name)
@pytest.mark.parametrize("blocks_of_group", [1, 3, 99])
def test_integers_and_scales_are_held_exactly(grid, blocks_of_group):
    random = np.random.default_rng(0)
    integers = random.integers(-grid.most, grid.most + 1, (6, 512)).astype(np.int8)
    integers[0, :2] = grid.most, -grid.most
    group = min(512, blocks_of_group * grid.block)
    scales = random.normal(size=(6, -(-512 // group))).astype(np.float16)
    blocks = grid.blocks(integers, scales, group)
    expected = integers * np.repeat(scales.astype(np.float32), group, axis=1)[:, :512]
    np.testing.assert_array_equal(gguf.quants.dequantize(blocks, grid.quantization), expected)


@pytest.mark.parametrize("quantization", [TQ1_0, TQ2_0])
def test_ternary_blocks_of_ggml_are_taken_apart(quantization):
    random = np.random.default_rng(1)
    trits = random.integers(-1, 2, (3, 512)).astype(np.int8)
    scales = np.abs(random.normal(size=(3, 2))).astype(np.float16)
    weights = trits * np.repeat(scales.astype(np.float32), 256, axis=1)
    found = ternary_parts(gguf.quants.quantize(weights, quantization), quantization)
    np.testing.assert_array_equal(found[0][..., 0], trits)
    np.testing.assert_array_equal(found[1][..., 0], scales)


def test_every_byte_of_tq1_0_is_trits():
    blocks = np.arange(256, dtype=np.uint8).repeat(54).reshape(256, 54)
    blocks[:, -2:] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    trits, _ = ternary_parts(blocks, TQ1_0)
    np.testing.assert_array_equal(trits[..., 0], gguf.quants.dequantize(blocks, TQ1_0))
    assert set(np.unique(trits)) == {-1, 0, 1}


def test_a_code_of_3_is_refused():
    blocks = np.zeros((1, 66), np.uint8)
    blocks[0, 5] = 0b00001100
    with pytest.raises(ValueError, match="1 bytes of its TQ2_0 blocks hold the code 3"):
        ternary_parts(blocks, TQ2_0)


@pytest.mark.parametrize(
    ("most", "inputs", "group", "expected"),
    [
        (1, 512, 512, "TQ2_0"),
        (1, 512, 256, "TQ2_0"),
        (1, 512, 128, "Q4_0"),
        (1, 576, 576, "Q4_0"),
        (4, 512, 512, "Q4_0"),
        (13, 64, 32, "Q5_0"),
        (40, 64, 64, "Q8_0"),
        (1, 172, 172, None),
        (4, 64, 16, None),
        (364, 64, 64, None),
    ],
)
def test_the_smallest_block_that_is_exact(most, inputs, group, expected):
    grid = exact_grid(most, inputs, group)
    assert (grid and grid.quantization.name) == expected
