"""Trainable units: their weights are functions of parameters, and can follow a gradient.

A parameter is what a weight changes by; where all are zero, weights are as they were converted:

scales
    s exp(theta), theta float32 shaped like the scales: relative steps, and a scale stays positive.
gain
    g (1 + gamma) of an RMS norm.
codes
    Latent weights v = q + delta u, with q the weights as they were decomposed and u the smallest
    scale of the group: delta is counted in levels. The weight is the level nearest to v; the
    gradient passes straight through (Bengio 1308.3432; EfficientQAT 2407.11062), but where v lies
    beyond the outermost level. Weights with a trellis code keep their trits.

`trainable` makes a unit, `atd.calibration.gradients` runs it and takes gradients, and `merged`
makes a block of it again.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atd.decomposition.chunks import stored_scales
from atd.decomposition.levels import (
    descending_scales,
    nearest_codes,
    nonzero,
    round_scales,
    top_level,
    trits_of,
)
from atd.errors import about
from atd.ir import ROTATIONS, Block, Node
from atd.ir.rewrite import own_gain, with_weight
from atd.models.execute import Structure, structure_of
from atd.models.ops import Weights
from atd.weights import (
    DTYPES,
    Dense,
    DenseType,
    Packed,
    PackedType,
    Ternary,
    Trellis,
    Weight,
    WeightType,
    level_weights,
    summed,
    ternary_of,
)
from atd.weights.codes import values_of
from atd.weights.groups import group_inputs, spread_scales
from atd.weights.layouts import LAYOUTS

Deltas = dict[str, jax.Array]  # kind ("scales", "gain", "codes") -> what a weight changes by
Parameters = dict[str, Deltas]  # by node
CODES = jnp.float16  # of delta as it is kept, in [-1/2, 1/2] mostly; computed with in float32


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "top"],
    meta_fields=["size", "tied"],
)
@dataclass(frozen=True)
class QuantizedMatrix:
    """A ternary matrix as it was converted: w = sum_i s_i t_i, one of the levels of its group.

    `top` is data, so that tied matrices of different numbers of bases share a compilation.
    """

    codes: jax.Array  # int8 [out, in]: sum_i t_i 3^(N-1-i)
    scales: jax.Array  # float32 [rows, groups, N or 1]; rows = 1: one for the tensor
    top: jax.Array  # float32 []: the outermost level of tied scales
    size: int  # inputs per group
    tied: bool


@partial(
    jax.tree_util.register_dataclass, data_fields=["trits", "values", "scales"], meta_fields=[]
)
@dataclass(frozen=True)
class TrellisMatrix:
    """A matrix with a trellis code as it was converted: w[o, k] = s[o] v[o, k]."""

    trits: np.ndarray  # int8 [out / P, in, M]
    values: jax.Array  # v, float32 [out, in]
    scales: jax.Array  # float32 [out, 1, 1]


QUANTIZED = QuantizedMatrix, TrellisMatrix


@dataclass(frozen=True)
class TrainableUnit:
    """A block as a function of its input and of parameters."""

    block: Block
    structure: Structure
    fixed: dict[str, dict[str, Any]]  # node -> slot -> a quantized matrix, or float32 array
    parameters: Parameters  # at the start: zeros


def trainable(
    block: Block, *, scales: bool = True, gains: bool = True, codes: bool = False
) -> TrainableUnit:
    """Loads the weights of a block and makes a unit of them.

    Latent weights start in the middle of their level. (Where they start toward the dense weights,
    many are near the edge of their level after error feedback, the first steps flip them together,
    and the loss triples.)

    Args:
        block: converted.
        scales, gains, codes: which parameters there are. The matrices of rotations have none: they
            stay orthogonal.
    """
    fixed: dict[str, dict[str, Any]] = {}
    parameters: Parameters = {}
    for node in block.nodes:
        for slot, ref in node.weights.items():
            ternary = ternary_of(ref.type) is not None
            value = quantized_matrix(ref.load()) if ternary else jnp.asarray(ref.dense())
            fixed.setdefault(node.name, {})[slot] = value
            deltas = parameters.setdefault(node.name, {})
            if isinstance(value, QUANTIZED) and node.name not in ROTATIONS:
                if scales:
                    deltas["scales"] = jnp.zeros_like(value.scales)
                if codes and node.op == "linear" and isinstance(value, QuantizedMatrix):
                    deltas["codes"] = jnp.zeros(value.codes.shape, CODES)
            elif node.op == "rms_norm" and gains and not isinstance(value, QUANTIZED):
                deltas["gain"] = jnp.zeros_like(value)
    parameters = {name: deltas for name, deltas in parameters.items() if deltas}
    return TrainableUnit(block, structure_of(block), fixed, parameters)


def frozen(block: Block) -> TrainableUnit:
    """Makes a unit without parameters of a block."""
    return trainable(block, scales=False, gains=False)


def quantized_matrix(weight: Weight) -> QuantizedMatrix | TrellisMatrix:
    """Takes a ternary or packed weight apart into codes and scales."""
    weight = weight.unpack() if isinstance(weight, Packed) else weight
    if isinstance(weight, Trellis):
        values = values_of(jnp.asarray(weight.trits), weight.type.code, weight.type.segment)
        trits = np.asarray(weight.trits)
        return TrellisMatrix(trits, values, jnp.asarray(weight.scales, jnp.float32))
    assert isinstance(weight, Ternary)
    type = weight.type
    places = level_weights(type.bases).astype(np.int8)
    codes = sum(np.asarray(weight.trits)[:, :, i] * places[i] for i in range(type.bases))
    scales, top = jnp.asarray(weight.scales, jnp.float32), jnp.float32(top_level(type.bases))
    return QuantizedMatrix(jnp.asarray(codes), scales, top, type.group_size, type.tied)


# --- weights as functions of parameters --------------------------------------------------------


def weights_at(unit: TrainableUnit, parameters: Parameters) -> Weights:
    """Returns all weights of a unit at these parameters, dense float32."""
    return {
        name: {
            slot: Dense(weight_at(value, parameters.get(name, {}) if slot == "weight" else {}))
            for slot, value in slots.items()
        }
        for name, slots in unit.fixed.items()
    }


def weight_at(fixed: QuantizedMatrix | TrellisMatrix | jax.Array, deltas: Deltas) -> jax.Array:
    """Returns one weight of a unit, changed by the deltas: float32."""
    if isinstance(fixed, QuantizedMatrix):
        return dequantize(fixed, deltas)
    if isinstance(fixed, TrellisMatrix):
        return fixed.values * _scales(fixed, deltas)[:, 0]
    return fixed * (1 + deltas["gain"]) if "gain" in deltas else fixed


@jax.jit
def dequantize(matrix: QuantizedMatrix, deltas: Deltas) -> jax.Array:
    """Returns the weights [out, in] of a matrix changed by scales and codes.

    Gradients by scales are exact, those by codes go straight through.
    """
    scales = _scales(matrix, deltas)
    if "codes" not in deltas:
        return _combine(_signed(matrix.codes, matrix), scales, matrix)
    latent = _latent(matrix, deltas)
    codes, inside = nearest(jax.lax.stop_gradient(latent), jax.lax.stop_gradient(scales), matrix)
    passed = jnp.where(inside, latent - jax.lax.stop_gradient(latent), 0.0)
    scales = descending_scales(scales, axis=-1)  # they may have crossed
    return _combine(_signed(codes, matrix), scales, matrix) + passed


def nearest(latent, scales, matrix: QuantizedMatrix) -> tuple[jax.Array, jax.Array]:
    """Finds the levels nearest to latent weights.

    Args:
        latent: float32 [out, in].
        scales: float32, shaped as the matrix's.
        matrix: says how groups lie, and whether they are tied.

    Returns:
        Their codes int8 [out, in], and where the latent weights lie within half a level of the
        range, bool [out, in].
    """
    if matrix.tied:
        level = latent / nonzero(_spread(scales[..., 0], matrix))
        codes = jnp.clip(jnp.round(level), -matrix.top, matrix.top).astype(jnp.int8)
        return codes, jnp.abs(level) <= matrix.top + 0.5
    out, inputs = latent.shape
    scales = jnp.moveaxis(jnp.broadcast_to(scales, (out, *scales.shape[1:])), -1, 0)
    scales = descending_scales(scales)  # [N, out, groups], in which codes are counted
    grouped = group_inputs(latent, matrix.size).reshape(-1, matrix.size)  # [out * groups, size]
    codes = nearest_codes(jnp.abs(grouped), scales.reshape(len(scales), -1))
    limit = scales.sum(0).reshape(-1, 1) + scales[-1].reshape(-1, 1) / 2
    codes, inside = jnp.where(grouped < 0, -codes, codes), jnp.abs(grouped) <= limit
    return codes.reshape(out, -1)[:, :inputs], inside.reshape(out, -1)[:, :inputs]


def _scales(matrix: QuantizedMatrix | TrellisMatrix, deltas: Deltas) -> jax.Array:
    return matrix.scales * jnp.exp(deltas["scales"]) if "scales" in deltas else matrix.scales


def _latent(matrix: QuantizedMatrix, deltas: Deltas) -> jax.Array:
    """The latent weights [out, in]: those at the start plus the codes' deltas, in levels."""
    start = _combine(_signed(matrix.codes, matrix), matrix.scales, matrix)
    return start + deltas["codes"] * _spread(matrix.scales[..., -1], matrix)


def _signed(codes, matrix: QuantizedMatrix) -> list[jax.Array]:
    """What each stored scale is multiplied by, float32 [out, in]: the integer (tied), or trits."""
    if matrix.tied:
        return [codes.astype(jnp.float32)]
    trits = trits_of(codes, matrix.scales.shape[-1]).astype(jnp.float32)
    return [trits[..., i] for i in range(trits.shape[-1])]


def _combine(signed: list[jax.Array], scales, matrix: QuantizedMatrix) -> jax.Array:
    """The sum over bases of factors [out, in] times scales."""
    parts = (part * _spread(scales[..., i], matrix) for i, part in enumerate(signed))
    return jnp.asarray(sum(parts))


def _spread(scales, matrix: QuantizedMatrix) -> jax.Array:
    """The scale of each weight, [rows, groups] -> [rows, in] or [rows, 1]."""
    return spread_scales(scales, matrix.size, matrix.codes.shape[1])


# --- back to a block ---------------------------------------------------------------------------


def merged(unit: TrainableUnit, parameters: Parameters) -> Block:
    """Returns the block with the weights at these parameters, of the types that they had.

    Scales are rounded to what their type stores, codes are those nearest under the rounded scales.
    Gains that changed become float32, and are no longer marked as ones.
    """

    def node(node: Node) -> Node:
        deltas = parameters.get(node.name)
        if not deltas:
            return node
        ref, fixed = node.weights["weight"], unit.fixed[node.name]["weight"]
        if isinstance(fixed, QUANTIZED):
            with about(unit.block.full_name(node)):
                weight = _stored(ref.type, fixed, deltas)
            return with_weight(node, replace(ref, load=lambda: weight))
        assert isinstance(ref.type, DenseType)
        gain = np.asarray(weight_at(fixed, deltas)).astype(np.float32)
        kept = replace(ref, type=DenseType(ref.type.shape, "f32"), load=lambda: Dense(gain))
        return own_gain(node, kept)

    return replace(unit.block, nodes=tuple(node(n) for n in unit.block.nodes))


def _stored(type: WeightType, matrix: QuantizedMatrix | TrellisMatrix, deltas: Deltas) -> Weight:
    """The weight of this type that the deltas make of a matrix."""
    ternary = ternary_of(type)
    assert ternary is not None
    if isinstance(matrix, TrellisMatrix):
        trits, scales = matrix.trits, round_scales(_scales(matrix, deltas), DTYPES[ternary.dtype])
    else:
        trits, scales = _rounded(matrix, deltas, ternary.bases, ternary.dtype)
    scales = stored_scales(scales, scales, DTYPES[ternary.dtype])
    made = summed(np.asarray(trits), scales, ternary)
    if isinstance(type, PackedType):
        return Packed(LAYOUTS[type.layout].pack(made.trits), made.scales, type)
    return made


@partial(jax.jit, static_argnames=("bases", "dtype"))
def _rounded(
    matrix: QuantizedMatrix, deltas: Deltas, bases: int, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """(trits [out, in, N], scales rounded as by `dtype`) of a matrix changed by the deltas."""
    scales, codes = round_scales(_scales(matrix, deltas), DTYPES[dtype]), matrix.codes
    if "codes" in deltas:
        codes, _ = nearest(_latent(matrix, deltas), scales, matrix)
        scales = descending_scales(scales, axis=-1)
    return trits_of(codes, bases), scales
