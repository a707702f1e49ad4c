"""Codes unpacked by torch are the numbers that `atd.weights` defines."""
# pyright: reportMissingImports=false

import numpy as np
import pytest

from atd.weights import Packed, PackedType, TernaryType, TrellisType, parse_type, summed
from atd.weights.layouts import LAYOUTS

torch = pytest.importorskip("torch", reason="torch and transformers are not here (extra hf)")
pytest.importorskip("transformers", reason="torch and transformers are not here (extra hf)")

from atd.hf.unpack import READ, matrix_rows, picked_rows, row_unit  # noqa: E402

TYPES = [
    "ternary n=2 g=32 free f16[12,70]",
    "ternary n=3 g=row tied f16[12,70]",
    "ternary n=1 g=tensor free f32[12,300]",
    "ternary n=4 g=48 tied bf16[8,97]",
    "trellis n=2 segment=6 taps=0.4,0.5,-0.4|1.1 f16[16,31]",
    "trellis n=1.5 segment=8 taps=0.5,0.3|0.7,-0.7/0.9,0.6 f32[16,10]",
]


def ternary_type(text: str) -> TernaryType | TrellisType:
    found = parse_type(text)
    assert isinstance(found, TernaryType | TrellisType)
    return found


def fits(text: str, layout: str | None) -> bool:
    return layout is None or LAYOUTS[layout].refuses(*ternary_type(text).trits_shape) is None


@pytest.mark.parametrize(
    ("text", "layout"), [(t, name) for t in TYPES for name in (*READ, None) if fits(t, name)]
)
def test_rows_are_those_of_dequantize(text, layout):
    ternary, random = ternary_type(text), np.random.default_rng(1)
    trits = random.integers(-1, 2, ternary.trits_shape, dtype=np.int8)
    scales = random.normal(size=ternary.scales_shape).astype(np.float32)
    held = torch.from_numpy(scales).to(
        {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[ternary.dtype]
    )
    weight = summed(trits, held.float().numpy(), ternary)
    codes, type = trits, ternary
    if layout:
        type = PackedType(ternary, layout)
        codes = LAYOUTS[layout].pack(trits)
        weight = Packed(codes, held.float().numpy(), type)
    expected, codes = weight.dequantize(), torch.from_numpy(np.ascontiguousarray(codes))
    out, unit = ternary.shape[0], row_unit(type)
    pieces = [
        matrix_rows(codes, held, type, start, min(start + unit, out))
        for start in range(0, out, unit)
    ]
    assert np.array_equal(torch.cat(pieces).numpy(), expected)
    assert np.array_equal(matrix_rows(codes, held, type, 0, out).numpy(), expected)
    rows = torch.tensor([out - 1, 0, 3, 3])
    assert np.array_equal(picked_rows(codes, held, type, rows).numpy(), expected[rows.numpy()])
