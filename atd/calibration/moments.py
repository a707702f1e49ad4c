"""Computes second moments of what a dense model's linears read, one unit in memory at a time."""

from collections.abc import Collection, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from atd.calibration.windows import windows_holding
from atd.decomposition.second_moments import symmetric, upper_products
from atd.ir import Block, Graph
from atd.models.execute import Structure, dense_weights, run, structure_of
from atd.models.ops import Weights
from atd.models.tokens import check_tokens

BATCH = 2048  # positions that run together: at least this many, in whole windows


class DenseUnit(NamedTuple):
    """A unit of the dense model, and what text does in it."""

    unit: Block
    weights: Weights  # dense float32
    inputs: np.ndarray  # [windows, context, D]; token ids [windows, context] of the prologue
    # H = X'X / n float32 [in, in] of each value X whose readers were named
    moments: dict[str, np.ndarray]


def dense_moments(
    graph: Graph, windows: np.ndarray, readers: Collection[str]
) -> Iterator[DenseUnit]:
    """Runs the dense model unit by unit over all windows, and yields each with its moments.

    Args:
        graph: the dense model.
        windows: int32 [windows, context].
        readers: full names of linears: the moments are those of the values that they read.

    Yields:
        Each unit; the logits are not computed.

    Raises:
        BadInput: ids lie outside the vocabulary.
    """
    check_tokens(windows, graph.vocabulary)
    step = windows_holding(BATCH, windows.shape[1])
    x = np.asarray(windows, np.int32)
    for unit in graph.units:
        weights, structure = dense_weights(unit.nodes), structure_of(unit)
        read = [node.inputs[0] for node in unit.nodes if unit.full_name(node) in readers]
        watched, last = tuple(dict.fromkeys(read)), unit is graph.epilogue
        sums: dict[str, list[np.ndarray]] = {}
        outputs = []
        for start in range(0, len(x), step):
            output, products = _run(structure, watched, not last, weights, x[start : start + step])
            outputs.append(output)
            for value, strips in products.items():
                totals = sums.setdefault(value, [np.zeros(strip.shape) for strip in strips])
                for total, strip in zip(totals, strips, strict=True):
                    total += np.asarray(strip)
        moments = {
            value: symmetric([total / windows.size for total in totals])
            for value, totals in sums.items()
        }
        yield DenseUnit(unit, weights, x, moments)
        if not last:
            x = np.concatenate([np.asarray(output) for output in outputs])


@partial(jax.jit, static_argnames=("structure", "watched", "complete"))
def _run(structure: Structure, watched: tuple[str, ...], complete: bool, weights: Weights, x):
    """(output if complete, X'X of each watched value X [positions, in], in strips)."""
    block = structure.block
    wanted = (*watched, block.output) if complete else watched
    values, _ = run(block, weights, {"x": x}, wanted)
    flat = {name: values[name].reshape(-1, values[name].shape[-1]) for name in watched}
    return values.get(block.output), {name: upper_products(v) for name, v in flat.items()}
