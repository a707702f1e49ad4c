"""Unpacks weights with plain torch operations: codes to trits, trits and scales to values.

The definitions are those of `atd.weights` (layouts, values, codes), with the same sums in the same
order in float32, so values are equal to the bit.
"""
# pyright: reportMissingImports=false

from functools import cache

import numpy as np
import torch

from atd.weights import Code, PackedType, TernaryType, TrellisType, level_weights
from atd.weights.layouts import LAYOUTS

Quantized = PackedType | TernaryType | TrellisType
READ = ("aligned", "interleaved", "bit-ttt", "hf-bitnet", "tq2_0")  # what files hold


@cache
def _table(layout: str, device: torch.device) -> torch.Tensor:
    """int8 [256, trits per byte]: the trits in each byte, 5 of dense ones, else 4."""
    codes = np.arange(256, dtype=np.uint8)
    if layout in ("aligned", "interleaved"):
        trits = LAYOUTS["interleaved"].unpack(codes[:, None, None], 256, 5, 1)[..., 0]
    elif layout == "bit-ttt":
        trits = LAYOUTS["bit-ttt"].unpack(codes[:, None, None], 256, 4, 1)[..., 0]
    else:
        trits = np.stack([((codes >> 2 * j) & 3).astype(np.int8) - 1 for j in range(4)], axis=-1)
    return torch.from_numpy(np.ascontiguousarray(trits)).to(device)


def trits_of(codes: torch.Tensor, layout: str, inputs: int, bases: int) -> torch.Tensor:
    """Unpacks rows of codes into trits int8 [rows, inputs, bases]; of layout hf-bitnet all rows.

    Args:
        codes: uint8, as `LAYOUTS[layout].codes_shape` says.
        layout: one of READ.
        inputs: per row.
        bases: trits per weight (or per period of rows of a trellis code).
    """
    table = _table(layout, codes.device)
    fields = table.index_select(0, codes.flatten().int()).reshape(*codes.shape, -1)
    if layout == "hf-bitnet":  # [out / 4, inputs, 4]
        return fields.permute(2, 0, 1).reshape(-1, inputs, 1)
    rows = len(codes)
    if layout == "bit-ttt":  # [rows, cells, N, 4]
        fields = fields.transpose(2, 3)
    elif layout == "tq2_0":  # [rows, blocks, N, 64, 4]: byte 32 h + m, field l
        parts = fields.reshape(rows, -1, bases, 2, 32, 4)
        fields = parts.permute(0, 1, 3, 5, 4, 2)
    return fields.reshape(rows, -1, bases)[:, :inputs]


def values_of(
    trits: torch.Tensor, scales: torch.Tensor, type: TernaryType | TrellisType
) -> torch.Tensor:
    """Computes the weights that trits and scales stand for, of any rows (ternary) or of whole
    segments of rows (trellis).

    Args:
        trits: int8 [rows, inputs, N]; of a trellis code [rows / P, inputs, M].
        scales: [rows or 1, groups, N], or [rows or 1, groups, 1] where tied; of a code [rows, 1,
            1].
        type: of the whole matrix.

    Returns:
        float32 [rows, inputs].
    """
    scales = scales.float()
    if isinstance(type, TrellisType):
        return _filtered(trits, type.code, type.segment) * scales[:, 0]

    def spread(scale: torch.Tensor) -> torch.Tensor:  # [rows or 1, groups]
        if scale.shape[1] == 1:
            return scale
        return scale.repeat_interleave(type.group_size, dim=1)[:, : trits.shape[1]]

    parts = [trits[..., i].float() for i in range(type.bases)]
    if type.tied:
        weights = level_weights(type.bases).tolist()
        parts = [sum(part * weight for part, weight in zip(parts, weights, strict=True))]
    total = parts[0] * spread(scales[..., 0])
    for i, part in enumerate(parts[1:], 1):
        total = total + part * spread(scales[..., i])
    return total


def _filtered(trits: torch.Tensor, code: Code, length: int) -> torch.Tensor:
    """The values of a trellis code in units of the scale (`atd.weights.codes.values_of`)."""
    rows = len(trits) * code.period
    whole = rows // length * length
    if 0 < whole < rows:
        cut = whole // code.period
        return torch.cat(
            [_filtered(trits[:cut], code, length), _filtered(trits[cut:], code, rows - whole)]
        )
    length = min(length, rows)
    wide = trits.reshape(-1, length // code.period, *trits.shape[1:]).float()
    phases: list[torch.Tensor | float] = [0.0] * code.period
    for age in range(code.memory + 1):
        for phase, taps_of_phase in enumerate(code.taps):
            for i, taps in enumerate(taps_of_phase):
                if age < len(taps):
                    down, at = divmod(phase + age, code.period)
                    part = torch.roll(wide[..., code.first[phase] + i], down, dims=1)
                    phases[at] = phases[at] + float(np.float32(taps[age])) * part
    return torch.stack(phases, dim=2).reshape(rows, -1)  # type: ignore[arg-type]


def matrix_rows(
    codes: torch.Tensor,
    scales: torch.Tensor,
    type: Quantized,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Returns rows start..stop of a weight, float32 [stop - start, inputs].

    Args:
        codes: of all rows; trits where the weight is not packed.
        scales: of all rows, or of all together.
        type: of the weight.
        start, stop: multiples of `row_unit(type)`, or the end.
    """
    ternary = type.ternary if isinstance(type, PackedType) else type
    period = ternary.code.period if isinstance(ternary, TrellisType) else 1
    of_rows = scales if len(scales) == 1 else scales[start:stop]
    inputs, bases = ternary.trits_shape[1:]
    if not isinstance(type, PackedType):
        trits = codes[start // period : stop // period]
    elif type.layout == "hf-bitnet":
        trits = trits_of(codes, type.layout, inputs, bases)
    else:
        part = codes[start // period : stop // period]
        trits = trits_of(part, type.layout, inputs, bases)
    return values_of(trits, of_rows, ternary)


def picked_rows(
    codes: torch.Tensor, scales: torch.Tensor, type: Quantized, rows: torch.Tensor
) -> torch.Tensor:
    """Returns some rows of a weight, float32 [n, inputs]; `codes` and `scales` as in `matrix_rows`.

    Rows that are unpacked together (`row_unit`) are, where one of them is asked for.

    Args:
        rows: int [n].
    """
    unit = row_unit(type)
    if unit == 1:
        of_rows = scales if len(scales) == 1 else scales[rows]
        return matrix_rows(codes[rows], of_rows, type, 0, len(rows))
    units, place = torch.unique(rows // unit, return_inverse=True)
    found, first = [], [0]
    for start in (units * unit).tolist():
        found.append(matrix_rows(codes, scales, type, start, min(start + unit, type.shape[0])))
        first.append(first[-1] + len(found[-1]))
    return torch.cat(found)[torch.tensor(first, device=rows.device)[place] + rows % unit]


def row_unit(type: Quantized) -> int:
    """Returns how many rows are unpacked together at least: a segment of a trellis code, all rows
    of layout hf-bitnet.
    """
    if isinstance(type, PackedType) and not LAYOUTS[type.layout].row_separable:
        return type.shape[0]
    ternary = type.ternary if isinstance(type, PackedType) else type
    return ternary.segment if isinstance(ternary, TrellisType) else 1
