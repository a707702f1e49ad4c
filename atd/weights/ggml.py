"""Blocks of ggml, as GGUF files hold them: scales and integers to bytes, and ternary ones back.

A row of K weights is cut into blocks, each with a scale d in float16, first or last.

    type   weights  bytes  weight    bits of a block
    TQ1_0      256     54  d t       qs[48], qh[4], d: five trits per byte
    TQ2_0      256     66  d t       qs[64], d: trit + 1 in two bits
    Q4_0        32     18  d q       d, qs[16]: q + 8 in four bits, -8 <= q < 8
    Q5_0        32     22  d q       d, qh[4], qs[16]: q + 16 in five bits, -16 <= q < 16
    Q8_0        32     34  d q       d, qs[32]: q in eight bits, -128 <= q < 128

Weights on a uniform grid, w = u q, are held exactly where u is a float16. The encoders of ggml
choose a d of their own and lose that, so the blocks are written here.

Source: `ggml/src/ggml-common.h` and `ggml-quants.c` of llama.cpp.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from atd.weights.layouts import LAYOUTS

TQ1_0, TQ2_0 = GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0
Q4_0, Q5_0, Q8_0 = (GGMLQuantizationType[name] for name in ("Q4_0", "Q5_0", "Q8_0"))
TERNARY_BLOCK = 256
_TQ2_0 = LAYOUTS["tq2_0"]


# --- ternary blocks to trits ----------------------------------------------------------------------


def ternary_parts(
    blocks: np.ndarray, quantization: GGMLQuantizationType
) -> tuple[np.ndarray, np.ndarray]:
    """Takes rows of ternary blocks apart.

    Args:
        blocks: uint8 [rows, bytes].
        quantization: TQ1_0 or TQ2_0.

    Returns:
        Trits int8 [rows, K, 1] and scales float16 [rows, K / 256, 1].

    Raises:
        ValueError: a field of TQ2_0 holds 3, which is no trit.
    """
    rows, size = len(blocks), GGML_QUANT_SIZES[quantization][1]
    blocks = blocks.reshape(rows, -1, size)
    codes, scales = blocks[..., :-2], np.ascontiguousarray(blocks[..., -2:]).view(np.float16)
    if quantization == TQ1_0:
        return _tq1_0_trits(codes).reshape(rows, -1, 1), scales
    if count := _TQ2_0.invalid_bytes(codes):
        raise ValueError(f"{count} bytes of its TQ2_0 blocks hold the code 3; expected 0, 1 or 2")
    return _TQ2_0.unpack(codes[:, :, None], rows, blocks.shape[1] * TERNARY_BLOCK, 1), scales


def _tq1_0_trits(codes: np.ndarray) -> np.ndarray:
    """uint8 [rows, blocks, 52] -> int8 [rows, blocks, 256]; each run of bytes has its first trits,
    then its second ones, and so on."""
    runs = ((codes[..., :32], 5), (codes[..., 32:48], 5), (codes[..., 48:], 4))
    trits = []
    for run, digits in runs:
        for n in range(digits):
            rest = run * np.uint8(3**n)  # modulo 256
            trits.append(((rest.astype(np.uint16) * 3) >> 8).astype(np.int8) - np.int8(1))
    return np.concatenate(trits, axis=-1)


# --- integers and scales to blocks ----------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A type of block that holds w = d q for integers q."""

    quantization: GGMLQuantizationType
    most: int  # |q| that it holds
    write: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # q [..., block] -> bytes of a block
    scale_first: bool = True

    @property
    def block(self) -> int:
        """The number of weights of a block."""
        return GGML_QUANT_SIZES[self.quantization][0]

    def blocks(self, integers: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
        """Lays integers and scales in blocks.

        Args:
            integers: q, int8 [rows, K] with K a multiple of the block.
            scales: d, float16 [rows, groups].
            group: inputs that share a scale, whole blocks; the last group may hold fewer.

        Returns:
            uint8 [rows, bytes].
        """
        rows, inputs = integers.shape
        count = inputs // self.block
        d = np.repeat(scales.astype("<f2"), group // self.block, axis=1)[:, :count]
        parts = list(self.write(integers.reshape(rows, count, self.block)))
        parts.insert(0 if self.scale_first else len(parts), d[..., None].view(np.uint8))
        return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _tq2_0(q: np.ndarray) -> tuple[np.ndarray, ...]:
    rows, count, _ = q.shape
    return (_TQ2_0.pack(q.reshape(rows, -1, 1)).reshape(rows, count, -1),)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., 32] -> [..., 16]: the low four bits of weights m and m + 16."""
    return (codes[..., :16] & 15) | ((codes[..., 16:] & 15) << 4)


def _q4_0(q: np.ndarray) -> tuple[np.ndarray, ...]:
    return (_nibbles((q + 8).astype(np.uint8)),)


def _q5_0(q: np.ndarray) -> tuple[np.ndarray, ...]:
    codes = (q + 16).astype(np.uint8)
    return np.packbits(codes >> 4, axis=-1, bitorder="little"), _nibbles(codes)


def _q8_0(q: np.ndarray) -> tuple[np.ndarray, ...]:
    return (q.astype(np.int8).view(np.uint8),)


GRIDS = (
    Grid(TQ2_0, 1, _tq2_0, scale_first=False),
    Grid(Q4_0, 7, _q4_0),
    Grid(Q5_0, 15, _q5_0),
    Grid(Q8_0, 127, _q8_0),
)


def exact_grid(most: int, inputs: int, group: int) -> Grid | None:
    """Returns the smallest block that holds w = u q exactly, or None.

    Args:
        most: the largest |q|: (3^N - 1) / 2 for N tied bases.
        inputs: K, weights per row.
        group: inputs that share u.
    """
    for grid in GRIDS:
        if most <= grid.most and inputs % grid.block == 0 and group % grid.block == 0:
            return grid
    return None
