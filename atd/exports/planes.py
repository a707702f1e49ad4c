"""Gives ternary matrices with one scale per base as planes, for formats that hold nothing else."""

from collections.abc import Callable

import numpy as np

from atd.checkpoint.writer import Entry
from atd.errors import BadInput
from atd.exports.parts import parts
from atd.ir import Block, Graph, WeightRef
from atd.models import execute
from atd.weights import (
    DTYPES,
    DenseType,
    Packed,
    Ternary,
    TernaryType,
    level_weights,
    ternary_of,
)


def check_planes(graph: Graph, to: str, bases: tuple[int, ...], way: str) -> None:
    """Raises BadInput where a linear of a decoder layer has no N planes with one scale each.

    Args:
        to: the format, for messages.
        bases: the N that it holds.
        way: how such a model is made.
    """
    for unit in graph.blocks:
        for node in unit.nodes:
            name = unit.full_name(node)
            if node.op == "hadamard":
                raise BadInput(
                    f"{name} is a Hadamard transform: multiplied into the matrix that reads it, "
                    f"that is ternary no more, and {to} has no such op; {way}"
                )
            if node.op != "linear":
                continue
            ref = node.weights["weight"]
            ternary = ternary_of(ref.type)
            if (
                not isinstance(ternary, TernaryType)
                or ternary.group != "tensor"
                or ternary.bases not in bases
            ):
                counts = f"N = {bases[0]}" if len(bases) == 1 else f"N = {bases[0]} to {bases[-1]}"
                raise BadInput(
                    f"{name} is {ref.type}, and {to} holds ternary matrices of {counts} with one "
                    f"scale per base and tensor (g=tensor); {way}"
                )


def planes(ref: WeightRef, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (trits int8 [stop - start, in, N], scales float32 [N]) of rows of such a matrix.

    Raises:
        BadInput: tied scales have no exact float32 value each.
    """
    weight = ref.load()
    weight = weight.unpack() if isinstance(weight, Packed) else weight
    assert isinstance(weight, Ternary)
    stored = np.asarray(weight.scales).astype(np.float64).reshape(-1)
    scales = stored * level_weights(weight.type.bases) if weight.type.tied else stored
    if (scales.astype(np.float32) != scales).any():
        raise BadInput(
            f"{ref.tensor}: its tied scales {scales.tolist()} are no float32 numbers; convert with "
            "--set decompose.dtype=f16"
        )
    return np.asarray(weight.trits)[start:stop], scales.astype(np.float32)


def linear_parts(unit: Block) -> dict[str, tuple[WeightRef, int, int]]:
    """Returns tensor name -> (weight, first row, row behind the last) of the unit's linears with a
    weight that is not dense.
    """
    return {
        name: (ref, start, stop)
        for node in unit.nodes
        if node.op == "linear"
        for name, ref, start, stop in parts(unit, node)
        if not isinstance(ref.type, DenseType)
    }


def dense_parts(unit: Block) -> list[tuple[str, WeightRef, int, int]]:
    """Returns (tensor name, weight, first row, row behind the last) of all other weights."""
    linears = linear_parts(unit)
    return [part for node in unit.nodes for part in parts(unit, node) if part[0] not in linears]


def dense_entry(
    name: str, ref: WeightRef, start: int, stop: int, dtype_name: str | None = None
) -> Entry:
    """Returns rows of any weight as a dense tensor of a dtype; None: as it is, or float32 where it
    was ternary.
    """
    own = ref.type.dtype if isinstance(ref.type, DenseType) else "f32"
    dtype = DTYPES[dtype_name or own]
    shape = (stop - start, *ref.type.shape[1:])
    return Entry(((name, shape, dtype),), lambda: [ref.load().dequantize(dtype)[start:stop]])


def difference(graph: Graph, other: Callable[[Block], Block], tokens: int = 32) -> float:
    """Returns the root mean square of what logits change by, over that of the logits.

    One unit is in memory at a time.

    Args:
        graph: the model.
        other: makes its units those of another model, with the same weights.
        tokens: random ones, of one sequence.
    """
    rng = np.random.default_rng(0)
    mine = yours = rng.integers(graph.vocabulary, size=(1, tokens)).astype(np.int32)
    embedding = None
    for unit in graph.units:
        weights = execute.dense_weights(unit.nodes)
        if unit is graph.prologue:
            embedding = next(iter(weights.values()))["weight"]
        tied = embedding if unit is graph.epilogue and graph.is_tied else None
        mine = execute.forward(execute.structure_of(unit), weights, mine, tied)
        yours = execute.forward(execute.structure_of(other(unit)), weights, yours, tied)
    mine, yours = np.asarray(mine), np.asarray(yours)
    return float(np.sqrt(((mine - yours) ** 2).mean() / (mine**2).mean()))
