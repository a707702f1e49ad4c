"""Gradients through a converted model, a unit at a time: what `calibrate` needs of mathematics.

A unit (embedding, block, final norm and head) is a function of tunable parameters, so that the weights of a converted
model follow a gradient:

    scales   s exp(theta), theta float32 shaped like the scales: relative steps, and a scale stays positive
    gains    g (1 + gamma) of RMS norms
    codes    latent weights v = q + delta u with q the weights as they were decomposed and u the smallest scale of the
             group: delta is counted in levels. The weight is the level nearest to v; the gradient passes straight through
             (Bengio 1308.3432; EfficientQAT 2407.11062), and not where v lies beyond the outermost level

Gradient checkpointing per block: `forward` keeps nothing but a unit's input, and `backward` computes the unit again.
Both are compiled once for all units of one structure, whatever their bases, so compile time does not grow with depth,
and the gradient of one unit at a time exists.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atd.decomposition.levels import (
    descending_scales,
    nearest_codes,
    nonzero,
    round_scales,
    top_level,
    trits_of,
)
from atd.ir import ROTATIONS, Block, Node
from atd.models import execute
from atd.models.execute import Structure, structure_of
from atd.models.ops import Weights
from atd.weights import (
    DTYPES,
    Dense,
    DenseType,
    Packed,
    PackedType,
    Ternary,
    Weight,
    level_weights,
    ternary_of,
)
from atd.weights.groups import group_inputs, spread_scales
from atd.weights.layouts import LAYOUTS

Parameters = dict[
    str, dict[str, jax.Array]
]  # node -> kind ("scales", "gain", "codes") -> what is tuned
CODES = (
    jnp.float16
)  # of delta as it is kept: up to half a level to 2^-12 of one; computed with in float32


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "top"],
    meta_fields=["size", "tied"],
)
@dataclass(frozen=True)
class Grid:
    """A ternary matrix as it stands before tuning: weights sum_i s_i t_i on the levels of their group.

    `top` (the outermost tied level) is data, so tied matrices of different bases share a compilation.
    """

    codes: jax.Array  # int8 [out, in]: sum_i t_i 3^(N-1-i)
    scales: jax.Array  # float32 [rows, groups, N or 1]; rows = 1: one for the tensor
    top: jax.Array  # float32 []
    size: int  # inputs a group
    tied: bool


@dataclass(frozen=True)
class Unit:
    """A block that can be tuned: its structure without weights, what is fixed and what moves."""

    block: Block
    structure: Structure
    fixed: dict[str, dict[str, Any]]  # node -> slot -> Grid, or float32 array
    parameters: Parameters


def tunable(block: Block, *, scales: bool = True, gains: bool = True, codes: bool = False) -> Unit:
    """The unit of a block whose weights are loaded now; what may move starts at zero, where it changes nothing.

    Latent weights start in the middle of their level. Starting toward the dense weights was tried: error feedback leaves
    many of them near the edge of their level, the first steps flip them together, and the loss triples.
    """
    fixed: dict[str, dict[str, Any]] = {}
    parameters: Parameters = {}
    for node in block.nodes:
        for slot, ref in node.weights.items():
            value = grid_of(ref.load()) if ternary_of(ref.type) else jnp.asarray(ref.dense())
            fixed.setdefault(node.name, {})[slot] = value
            moves = parameters.setdefault(node.name, {})
            if (
                isinstance(value, Grid) and node.name not in ROTATIONS
            ):  # whose trits are those of an orthogonal matrix
                if scales:
                    moves["scales"] = jnp.zeros_like(value.scales)
                if codes and node.op == "linear":
                    moves["codes"] = jnp.zeros(value.codes.shape, CODES)
            elif node.op == "rms_norm" and gains and not isinstance(value, Grid):
                moves["gain"] = jnp.zeros_like(value)
    return Unit(
        block,
        structure_of(block),
        fixed,
        {name: moves for name, moves in parameters.items() if moves},
    )


def frozen(block: Block) -> Unit:
    """The unit of a block in which nothing moves."""
    return tunable(block, scales=False, gains=False)


def grid_of(weight: Weight) -> Grid:
    weight = weight.unpack() if isinstance(weight, Packed) else weight
    assert isinstance(weight, Ternary)
    type = weight.type
    places = level_weights(type.bases).astype(np.int8)
    codes = sum(np.asarray(weight.trits)[:, :, i] * places[i] for i in range(type.bases))
    top = jnp.float32(top_level(type.bases))
    return Grid(
        jnp.asarray(codes), jnp.asarray(weight.scales, jnp.float32), top, type.group_size, type.tied
    )


# --- weights as functions of parameters ---------------------------------------------------------------------------------


def weights(fixed: dict[str, dict[str, Any]], parameters: Parameters) -> Weights:
    """Every weight of a unit as a dense float32 one."""
    return {
        name: {
            slot: Dense(value(given, parameters.get(name, {}) if slot == "weight" else {}))
            for slot, given in slots.items()
        }
        for name, slots in fixed.items()
    }


def value(given: Grid | jax.Array, moves: dict[str, jax.Array]) -> jax.Array:
    """The float32 weight that a fixed one becomes by what moves."""
    if isinstance(given, Grid):
        return dequantize(given, moves)
    return given * (1 + moves["gain"]) if "gain" in moves else given


@jax.jit
def dequantize(grid: Grid, moves: dict[str, jax.Array]) -> jax.Array:
    """The weights [out, in] of a grid that has moved; gradients to scales are exact, to codes straight through."""
    scales = _scales(grid, moves)
    if "codes" not in moves:
        return _combine(_signed(grid.codes, grid), scales, grid)
    latent = _latent(grid, moves)
    codes, inside = nearest(jax.lax.stop_gradient(latent), jax.lax.stop_gradient(scales), grid)
    passed = jnp.where(inside, latent - jax.lax.stop_gradient(latent), 0.0)
    scales = descending_scales(scales, axis=-1)  # they may have crossed
    return _combine(_signed(codes, grid), scales, grid) + passed


def _scales(grid: Grid, moves: dict[str, jax.Array]) -> jax.Array:
    return grid.scales * jnp.exp(moves["scales"]) if "scales" in moves else grid.scales


def _latent(grid: Grid, moves: dict[str, jax.Array]) -> jax.Array:
    """The latent weights [out, in]: as many levels away from those at the start as the codes have moved."""
    start = _combine(_signed(grid.codes, grid), grid.scales, grid)
    return start + moves["codes"] * _spread(grid.scales[..., -1], grid)


def nearest(latent, scales, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """(codes int8 [out, in] of the levels nearest to the latent weights, where these lie within half a level of the range)."""
    if grid.tied:
        level = latent / nonzero(_spread(scales[..., 0], grid))
        return jnp.clip(jnp.round(level), -grid.top, grid.top).astype(jnp.int8), jnp.abs(
            level
        ) <= grid.top + 0.5
    out, inputs = latent.shape
    scales = jnp.moveaxis(jnp.broadcast_to(scales, (out, *scales.shape[1:])), -1, 0)
    scales = descending_scales(scales)  # [N, out, groups], in which codes are counted
    grouped = group_inputs(latent, grid.size).reshape(-1, grid.size)  # [out * groups, size]
    codes = nearest_codes(jnp.abs(grouped), scales.reshape(len(scales), -1))
    limit = scales.sum(0).reshape(-1, 1) + scales[-1].reshape(-1, 1) / 2
    codes, inside = jnp.where(grouped < 0, -codes, codes), jnp.abs(grouped) <= limit
    return codes.reshape(out, -1)[:, :inputs], inside.reshape(out, -1)[:, :inputs]


def _signed(codes, grid: Grid) -> list[jax.Array]:
    """What each stored scale is multiplied by, float32 [out, in] each: the integer (tied), or the trits."""
    if grid.tied:
        return [codes.astype(jnp.float32)]
    trits = trits_of(codes, grid.scales.shape[-1]).astype(jnp.float32)
    return [trits[..., i] for i in range(trits.shape[-1])]


def _combine(signed: list[jax.Array], scales, grid: Grid) -> jax.Array:
    return sum(part * _spread(scales[..., i], grid) for i, part in enumerate(signed))  # type: ignore[return-value]


def _spread(scales, grid: Grid) -> jax.Array:
    """The scale of each weight, [rows, groups] -> [rows, in] or [rows, 1]."""
    return spread_scales(scales, grid.size, grid.codes.shape[1])


# --- units as functions ------------------------------------------------------------------------------------------------


def forward(unit: Unit, parameters: Parameters, x):
    """x [B, T, D] (token ids [B, T] in the prologue) -> the unit's output."""
    return execute.forward(unit.structure, weights(unit.fixed, parameters), x)


def backward(unit: Unit, parameters: Parameters, x, gradient):
    """The unit's input and the gradient at its output -> gradients of the parameters and at its input.

    The prologue's input are token ids, which have none: None.
    """
    made = weights(unit.fixed, parameters)
    moving = {name: made[name]["weight"] for name in parameters}
    slopes, at_input = _backward(unit.structure, moving, made, x, gradient)
    moves = {
        name: _value_backward(unit.fixed[name]["weight"], parameters[name], slope.array)
        for name, slope in slopes.items()
    }
    return moves, at_input


@partial(jax.jit, static_argnames="structure")
def _backward(structure: Structure, moving, made, x, gradient):
    """Compiled for all units that read the same, in dense weights: each kind of ternary weight has a small program of
    its own, or every combination of them in a block would be compiled."""

    def output(moving, x):
        moved = {name: made[name] | {"weight": weight} for name, weight in moving.items()}
        return execute.output(structure.block, made | moved, x)

    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.vjp(lambda moving: output(moving, x), moving)[1](gradient)[0], None
    return jax.vjp(output, moving, x)[1](gradient)


@jax.jit
def _value_backward(
    given: Grid | jax.Array, moves: dict[str, jax.Array], slope
) -> dict[str, jax.Array]:
    """The gradient at a weight -> at what moves it."""
    return jax.vjp(partial(value, given), wide(moves))[1](slope)[0]


def wide(parameters):
    """In float32: gradients are of the type of what they are by, and may be too small for float16."""
    return jax.tree.map(lambda p: p.astype(jnp.float32), parameters)


def table(unit: Unit, parameters: Parameters) -> jax.Array:
    """The embedding [V, D] of a prologue, for a head that is tied to it."""
    name = _embed_name(unit)
    return value(unit.fixed[name]["weight"], parameters.get(name, {}))


def table_backward(unit: Unit, parameters: Parameters, gradient) -> Parameters:
    """Gradients of the prologue's parameters from that of its table [V, D]."""
    name = _embed_name(unit)
    moved = _value_backward(unit.fixed[name]["weight"], parameters.get(name, {}), gradient)
    return {
        n: moved if n == name else jax.tree.map(jnp.zeros_like, moves)
        for n, moves in parameters.items()
    }


def _embed_name(unit: Unit) -> str:
    return next(node.name for node in unit.block.nodes if node.op == "embed")


# --- losses ------------------------------------------------------------------------------------------------------------


def divergence(
    head: Unit,
    parameters: Parameters,
    hidden,
    teacher: Unit,
    target,
    embedding: jax.Array | None,
    teacher_embedding,
):
    """Mean KL(dense || converted) in nats of all positions: hidden, target [P, D] in front of the heads.

    embedding, teacher_embedding: the tables of tied heads [V, D], or None.
    """

    def logits(unit: Unit, parameters: Parameters, x, table):
        given = None if table is None else Dense(table)
        made = weights(unit.fixed, parameters)
        return jax.nn.log_softmax(
            execute.output(unit.structure.block, made, x[None], embedding=given)[0]
        )

    dense = jax.lax.stop_gradient(logits(teacher, {}, target, teacher_embedding))
    return jnp.mean(
        jnp.sum(jnp.exp(dense) * (dense - logits(head, parameters, hidden, embedding)), axis=-1)
    )


# --- back to a graph ---------------------------------------------------------------------------------------------------


def settled(unit: Unit, parameters: Parameters) -> Block:
    """The block with the weights that the parameters make, of the types that they had: scales rounded to theirs, codes
    those of the rounded scales, gains that moved no longer marked as ones."""

    def node(node: Node) -> Node:
        moves = parameters.get(node.name)
        if not moves:
            return node
        ref, given = node.weights["weight"], unit.fixed[node.name]["weight"]
        if isinstance(given, Grid):
            weight = _weight(ref.type, given, moves)
            return replace(
                node, weights=node.weights | {"weight": replace(ref, load=lambda: weight)}
            )
        assert isinstance(ref.type, DenseType)
        gain = np.asarray(given * (1 + moves["gain"])).astype(np.float32)
        kept = replace(ref, type=DenseType(ref.type.shape, "f32"), load=lambda: Dense(gain))
        attrs = {key: value for key, value in node.attrs.items() if key != "unit_gain"}
        return replace(node, weights=node.weights | {"weight": kept}, attrs=attrs)

    return replace(unit.block, nodes=tuple(node(n) for n in unit.block.nodes))


def _weight(type, grid: Grid, moves: dict[str, jax.Array]) -> Weight:
    ternary = ternary_of(type)
    assert ternary is not None
    trits, scales = _rounded(grid, moves, ternary.bases, ternary.dtype)
    made = Ternary(np.asarray(trits), np.asarray(scales).astype(DTYPES[ternary.dtype]), ternary)
    if isinstance(type, PackedType):
        return Packed(LAYOUTS[type.layout].pack(made.trits), made.scales, type)
    return made


@partial(jax.jit, static_argnames=("bases", "dtype"))
def _rounded(
    grid: Grid, moves: dict[str, jax.Array], bases: int, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """(trits [out, in, N], scales that `dtype` can store) of a grid that has moved."""
    scales, codes = round_scales(_scales(grid, moves), DTYPES[dtype]), grid.codes
    if "codes" in moves:
        codes, _ = nearest(_latent(grid, moves), scales, grid)
        scales = descending_scales(scales, axis=-1)
    return trits_of(codes, bases), scales
