"""Measures what rounding a matrix costs the model: the KL divergence from the dense model.

For small models, as the model and all candidates are in memory.
`atd.calibration.sensitivity` predicts it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atd.calibration.moments import dense_moments
from atd.calibration.sensitivity import HEAD, Candidates
from atd.calibration.windows import windows_holding
from atd.decomposition import error_feedback, quantize
from atd.decomposition.options import Candidate
from atd.errors import about
from atd.ir import Graph
from atd.models.execute import dense_weights, forward, structure_of
from atd.models.ops import Weights
from atd.progress import Progress, Report, unheard
from atd.weights import Dense, DenseType, Weight


def measured_losses(
    graph: Graph,
    windows: np.ndarray,
    choices: Sequence[Sequence[str]],
    candidates: Candidates,
    tokens: int = 2048,
    progress: Report = unheard,
) -> list[np.ndarray]:
    """Measures what each candidate of each choice costs, in nats per position.

    All other matrices stand at their middle candidate. The cost is the KL divergence from the dense
    model, less that with the choice's own matrices dense, so that sums over choices predict the
    model's.

    Args:
        graph: the dense model.
        windows: int32 [windows, context]. Second moments are of all of them.
        choices: full names of nodes of one unit that change together, with equally many candidates.
        candidates: types that each matrix may become.
        tokens: of the windows, at least one window, for the KL divergence.
        progress: hears of each choice.

    Returns:
        float64 [candidates] of each choice.
    """
    quantized = quantized_candidates(graph, windows, candidates)
    windows = windows[: windows_holding(tokens, windows.shape[1])]
    dense = [dense_weights(unit.nodes) for unit in graph.units]
    unit_of = {unit.full_name(node): i for i, unit in enumerate(graph.units) for node in unit.nodes}
    middle = {name: quantized[name][middle_of(types)] for name, types in candidates.items()}
    inputs = unit_inputs(graph, with_matrices(graph, dense, middle), windows)
    exact = [np.asarray(part) for part in logits(graph, dense, windows)]

    def kl(matrices: Mapping[str, Weight], first: int) -> float:
        """KL of the model with these matrices; they differ from the middle ones in one unit."""
        weights = with_matrices(graph, dense, matrices)
        return kl_divergence(exact, logits(graph, weights, inputs[first], first)) / windows.size

    def changed(names: Sequence[str], option: int) -> Mapping[str, Weight]:
        return middle | {name: quantized[name][option] for name in names}

    base, losses = kl(middle, len(graph.units) - 1), []
    for names in choices:
        first, types = unit_of[names[0]], candidates[names[0]]
        options = range(len(types))
        found = [
            base if option == middle_of(types) else kl(changed(names, option), first)
            for option in options
        ]
        others = {name: matrix for name, matrix in middle.items() if name not in names}
        losses.append(np.array(found) - kl(others, first))
        progress(Progress("measuring sensitivities", len(losses), len(choices), "choices"))
    return losses


def middle_of(types: Sequence[Candidate]) -> int:
    """Returns the index of the candidate in the middle by size."""
    return sorted(range(len(types)), key=lambda i: types[i].nbytes)[len(types) // 2]


def quantized_candidates(
    graph: Graph, windows: np.ndarray, candidates: Candidates
) -> dict[str, list[Weight]]:
    """Makes every candidate of every matrix.

    Linears by error feedback under the dense model's second moments over the windows, embeddings by
    alternating least squares.

    Returns:
        By full name, in the order of the candidates.
    """
    found: dict[str, list[Weight]] = {}
    linears = {n for n, node in graph.nodes() if node.op == "linear" and n in candidates}
    for unit, weights, _, moments in dense_moments(graph, windows, linears):
        for value, hessian in [*moments.items(), (None, None)]:
            factor = None if hessian is None else error_feedback.factor(hessian)
            for node in unit.nodes:
                read = node.inputs[0] if node.op == "linear" else None
                if (name := unit.full_name(node)) in candidates and read == value:
                    weight = np.asarray(weights[node.name]["weight"].dequantize())
                    with about(name):
                        found[name] = [
                            _quantized(weight, type, factor, hessian) for type in candidates[name]
                        ]
    return found


def _quantized(weight: np.ndarray, type: Candidate, factor, hessian) -> Weight:
    if isinstance(type, DenseType):
        return Dense(weight)
    if factor is None:
        return quantize.nearest(weight, type)
    return quantize.calibrated(weight, type, factor, hessian)


# --- the model ---------------------------------------------------------------------------------


def with_matrices(
    graph: Graph, weights: Sequence[Weights], matrices: Mapping[str, Weight]
) -> list[Weights]:
    """Returns the weights of the units with other matrices at the nodes of these full names."""
    changed = [dict(unit) for unit in weights]
    for unit, loaded in zip(graph.units, changed, strict=True):
        for node in unit.nodes:
            if (name := unit.full_name(node)) in matrices:
                loaded[node.name] = loaded[node.name] | {"weight": matrices[name]}
    return changed


def unit_inputs(graph: Graph, weights: Sequence[Weights], x, first: int = 0) -> list[jax.Array]:
    """Returns what enters each unit from `first` on, the epilogue included, where x enters that."""
    inputs = [jnp.asarray(x)]
    for unit, loaded in zip(graph.units[first:-1], weights[first:-1], strict=True):
        inputs.append(forward(structure_of(unit), loaded, inputs[-1]))
    return inputs


def logits(graph: Graph, weights: Sequence[Weights], x, first: int = 0) -> Iterator[jax.Array]:
    """Yields logits [P, V], HEAD positions at a time, where x enters unit `first`."""
    hidden = unit_inputs(graph, weights, x, first)[-1]
    embedding = weights[0][graph.prologue.nodes[0].name]["weight"]
    flat = hidden.reshape(1, -1, hidden.shape[-1])  # [1, positions, D]
    structure = structure_of(graph.epilogue)
    for start in range(0, flat.shape[1], HEAD):
        yield forward(structure, weights[-1], flat[:, start : start + HEAD], embedding)[0]


def kl_divergence(exact: Iterable, found: Iterable) -> float:
    """Returns the sum over positions of KL(exact || found), in nats, of logits [P, V] each."""
    return sum(float(_kl(p, q)) for p, q in zip(exact, found, strict=True))


@jax.jit
def _kl(p, q):
    p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return jnp.sum(jnp.exp(p) * (p - q))
