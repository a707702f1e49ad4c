"""Small graphs with ternary weights of any kind, and parameters off their start."""

import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from atd.calibration.trainable import Parameters, TrainableUnit
from atd.decomposition.options import trellis_type
from atd.decomposition.trellis_codes import known_code
from atd.ir import Graph, in_memory
from atd.ir.rewrite import map_nodes
from atd.pipeline import Pipeline
from atd.weights import DTYPES, Code, DenseType, Ternary, TernaryType, Trellis
from tests.models.tiny import tiny_graph


def ternary(type: TernaryType, seed: int = 0) -> Ternary:
    """Any trits, and scales as decompose makes them: those of a group descend."""
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (*type.shape, type.bases)).astype(np.int8)
    rows, groups = (
        (1, 1) if type.group == "tensor" else (type.shape[0], -(-type.shape[1] // type.group_size))
    )
    base = 0.02 * 3.0 ** np.arange(0 if type.tied else type.bases - 1, -1, -1)
    scales = base * rng.uniform(0.8, 1.25, (rows, groups, len(base)))
    return Ternary(trits, scales.astype(DTYPES[type.dtype]), type)


def rough(graph: Graph, form: TernaryType, nodes: str = ".*", after: tuple = ()) -> Graph:
    """The graph with ternary weights of the form's kind in place of its dense matrices. (als takes
    its time to compile.)
    """

    def node(unit, node):
        ref = node.weights.get("weight")
        if node.op not in ("linear", "embed") or ref is None or not isinstance(ref.type, DenseType):
            return node
        if not re.fullmatch(nodes, unit.full_name(node)):
            return node
        group = (
            form.group if isinstance(form.group, int) and form.group < ref.type.shape[1] else "row"
        )
        weight = ternary(replace(form, shape=ref.type.shape, group=group), seed=len(node.name))
        return replace(node, weights=node.weights | {"weight": in_memory(ref.tensor, weight)})

    units = (replace(unit, nodes=tuple(node(unit, n) for n in unit.nodes)) for unit in graph.units)
    return Pipeline(after)(graph.with_units(tuple(units)))


def tied_rotated() -> Graph:
    """A tied model, rotated: its embedding is dense and followed by rotate_in."""
    graph = Pipeline(["fold_norms", "rotate"])(tiny_graph(tied=True))
    return rough(graph, TernaryType((1, 1), 2, "row", True, "f32"), r"model\.layers\..*")


def free_fused() -> Graph:
    """All matrices, embedding and head too, with free scales in groups, packed and joined."""
    return rough(tiny_graph(), TernaryType((1, 1), 2, 32, False, "f16"), after=("pack", "fuse"))


def coded(graph: Graph, code: Code, nodes: str = r"model\.layers\..*") -> Graph:
    """The graph with weights of this trellis code, of any trits, in place of some linears."""

    def node(unit, node):
        ref = node.weights.get("weight")
        if node.op != "linear" or ref is None or not re.fullmatch(nodes, unit.full_name(node)):
            return node
        type, rng = trellis_type(ref.type.shape, code, "f16"), np.random.default_rng(len(node.name))
        assert type is not None
        trits = rng.integers(-1, 2, type.trits_shape).astype(np.int8)
        scales = rng.uniform(0.02, 0.03, type.scales_shape).astype(np.float16)
        weight = in_memory(ref.tensor, Trellis(trits, scales, type))
        return replace(node, weights=node.weights | {"weight": weight})

    return map_nodes(graph, node)


def trellis_packed() -> Graph:
    """The linears of the blocks with a trellis code, packed and joined."""
    return Pipeline(["pack", "fuse"])(coded(tiny_graph(), known_code(2)))


def moved(unit: TrainableUnit, scale: float, seed: int = 0) -> Parameters:
    """Parameters off their start; codes by about a level."""
    rng = np.random.default_rng(seed)
    size = {"scales": scale, "gain": scale, "codes": 20 * scale}
    return {
        name: {
            kind: jnp.asarray(rng.standard_normal(a.shape) * size[kind], jnp.float32)
            for kind, a in moves.items()
        }
        for name, moves in unit.parameters.items()
    }
