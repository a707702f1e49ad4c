"""Chooses how each weight lies in a GGUF file, and encodes it.

Weights on a uniform grid, w = u q with one scale u per row or group, go into the smallest block of
ggml that holds them exactly (`atd.weights.ggml`). So do tied scales, and one base of any scales.
Dense vectors are F32. All else is rounded to a type that the user chooses, and the error measured.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants

from atd.checkpoint.gguf import MODULES
from atd.errors import BadInput, RunFailed
from atd.exports.parts import parts
from atd.ir import Block, Graph, Node, WeightRef
from atd.weights import (
    DTYPES,
    DenseType,
    Packed,
    Ternary,
    TernaryType,
    TrellisType,
    ternary_of,
)
from atd.weights.ggml import Q8_0, Grid, exact_grid

F16, BF16, F32 = GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F32
# Types that weights may be rounded to, by the names that users give.
ROUNDED = {"q8_0": Q8_0, "float16": F16, "bfloat16": BF16, "float32": F32}
_DTYPES = {F16: "f16", BF16: "bf16", F32: "f32"}
_HELD = {"f16": ("f16", "f32"), "bf16": ("bf16", "f32"), "f32": ("f32",)}  # dtype -> exact in
_GGUF_MODULES = {module: name for name, module in MODULES.items()}
_CHUNK = 1 << 24  # weights encoded at a time


@dataclass(frozen=True)
class Part:
    """A tensor of the file: rows of a weight."""

    name: str  # blk.0.attn_q.weight
    start: int
    stop: int
    heads: int = 0  # whose rows llama.cpp has in interleaved pairs; 0: in this order


@dataclass(frozen=True)
class Plan:
    """How a weight is written."""

    ref: WeightRef
    parts: tuple[Part, ...]
    quantization: GGMLQuantizationType
    grid: Grid | None  # of integers and scales, where these are written as they are
    rounded: str  # why it is not exact; empty: it is

    def shape(self, part: Part) -> tuple[int, ...]:
        """Returns the shape of a part."""
        return part.stop - part.start, *self.ref.type.shape[1:]


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is written, and what its rounding costs."""

    part: Part
    data: np.ndarray | None  # None: it was written
    error: float  # sum of squared differences
    total: float  # sum of squared weights; 0 where nothing is rounded


def plan(graph: Graph, dtype: str, heads: Mapping[str, int]) -> list[Plan]:
    """Decides for every weight of a graph.

    Args:
        graph: without rotations.
        dtype: a key of ROUNDED, for what no block holds exactly.
        heads: the modules whose rows are permuted, and their numbers of heads.

    Raises:
        BadInput: a weight has no place in a GGUF file.
    """
    return [
        _plan(unit, node, slot, dtype, heads)
        for unit in graph.units
        for node in unit.nodes
        for slot in node.weights
    ]


def _plan(unit: Block, node: Node, slot: str, dtype: str, heads: Mapping[str, int]) -> Plan:
    ref = node.weights[slot]
    places = tuple(
        Part(_gguf_name(name), start, stop, _heads_of(name, heads))
        for name, of, start, stop in parts(unit, node)
        if of is ref
    )
    type = ref.type
    if len(type.shape) < 2:
        return Plan(ref, places, F32, None, "")
    grid, reason = _grid(ref)
    if grid is not None:
        return Plan(ref, places, grid.quantization, grid, "")
    quantization = ROUNDED[dtype]
    if quantization == Q8_0 and type.shape[1] % 32:
        quantization = F16
        reason = f"{type.shape[1]} inputs, no multiple of the 32 of a block"
    if isinstance(type, DenseType) and _DTYPES.get(quantization) in _HELD[type.dtype]:
        reason = ""
    if quantization == F32:
        reason = ""
    return Plan(ref, places, quantization, None, reason)


def _heads_of(name: str, heads: Mapping[str, int]) -> int:
    return next((number for module, number in heads.items() if f".{module}." in name), 0)


def _gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    module, _, kind = name.rpartition(".")
    layer, prefix = "", "model.layers."
    if module.startswith(prefix):
        layer, _, module = module.removeprefix(prefix).partition(".")
    if module not in _GGUF_MODULES:
        raise BadInput(f"{name}: GGUF files have no such tensor; export with --to hf")
    return f"{f'blk.{layer}.' if layer else ''}{_GGUF_MODULES[module]}.{kind}"


# --- which weights are on a grid ------------------------------------------------------------------


def _grid(ref: WeightRef) -> tuple[Grid | None, str]:
    """The block that holds a matrix exactly, or None and the reason."""
    match ternary_of(ref.type):
        case None:
            return None, "dense"
        case TrellisType():
            return None, "trellis codes"
        case TernaryType() as type:
            return _grid_of(type, ref)


def _grid_of(type: TernaryType, ref: WeightRef) -> tuple[Grid | None, str]:
    if type.bases > 1 and not type.tied:
        return None, "free scales"
    inputs, group = type.shape[1], type.group_size
    grid = exact_grid((3**type.bases - 1) // 2, inputs, group)
    if grid is None:
        return None, f"N = {type.bases} and groups of {group} of {inputs} inputs fit no block"
    if type.dtype != "f16" and not _are_f16(_ternary(ref).scales):
        return None, f"{type.dtype} scales that are no float16"
    return grid, ""


def _are_f16(scales) -> bool:
    scales = np.asarray(scales).astype(np.float32)
    with np.errstate(over="ignore"):
        return np.array_equal(scales.astype(np.float16).astype(np.float32), scales)


def _ternary(ref: WeightRef) -> Ternary:
    weight = ref.load()
    weight = weight.unpack() if isinstance(weight, Packed) else weight
    assert isinstance(weight, Ternary)
    return weight


# --- values to bytes ------------------------------------------------------------------------------


def encode(plan: Plan) -> Iterator[Encoded]:
    """Yields the parts of a weight as they are written.

    Raises:
        RunFailed: a value does not fit the type.
    """
    if plan.grid is not None:
        weight = _ternary(plan.ref)
        integers, scales = _integers(weight), np.asarray(weight.scales)[..., 0]
        scales = np.broadcast_to(scales, (len(integers), scales.shape[1])).astype(np.float16)
        for part in plan.parts:
            blocks = plan.grid.blocks(
                _rows(integers, part), _rows(scales, part), weight.type.group_size
            )
            yield Encoded(part, blocks, 0.0, 0.0)
        return
    values = plan.ref.dense()
    for part in plan.parts:
        yield _round(plan, part, _rows(values, part))


def _integers(weight: Ternary) -> np.ndarray:
    """q = sum_i 3^(N-1-i) t_i, int8 [out, in]."""
    trits, bases = np.asarray(weight.trits), weight.type.bases
    found = np.zeros(trits.shape[:2], np.int8)
    for i in range(bases):
        found = found * np.int8(3) + trits[..., i]
    return found


def _rows(array: np.ndarray, part: Part) -> np.ndarray:
    """The rows of a part, in the order that llama.cpp has them in."""
    rows = array[part.start : part.stop]
    return pairs(rows, part.heads) if part.heads else rows


def pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head, halves x0 x1 ... y0 y1 to llama.cpp's pairs x0 y0 x1 y1 ...

    Args:
        values: [heads * head_dim, ...].
        heads: their number.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _round(plan: Plan, part: Part, values: np.ndarray) -> Encoded:
    """Values float32 [rows, ...] in a type that may round them."""
    rows, error, total = max(1, _CHUNK // max(1, values[0].size)), 0.0, 0.0
    pieces = []
    for start in range(0, len(values), rows):
        wide = values[start : start + rows]
        data, back = _rounded(wide, plan.quantization)
        if not np.isfinite(back).all():
            raise RunFailed(
                f"{plan.ref.tensor}: its values do not fit {plan.quantization.name}; "
                "export with --dtype float32"
            )
        if plan.rounded:
            error += float(np.square(back - wide, dtype=np.float64).sum())
            total += float(np.square(wide, dtype=np.float64).sum())
        pieces.append(data)
    return Encoded(part, np.concatenate(pieces), error, total)


def _rounded(
    values: np.ndarray, quantization: GGMLQuantizationType
) -> tuple[np.ndarray, np.ndarray]:
    """(what is written, what it stands for in float32)."""
    with np.errstate(over="ignore", invalid="ignore"):
        if quantization == Q8_0:
            data = quants.quantize(values, quantization)
            return data, quants.dequantize(data, quantization)
        data = values.astype(DTYPES[_DTYPES[quantization]])
        return data, data.astype(np.float32)
