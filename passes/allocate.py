"""allocate: spends a budget of bytes on N, group size and scales of every matrix where the model
loses least.

1. `bits = 3.4` is the average over the linears of the blocks, all their stored bytes counted,
   padding and scales too; these linears are the choices, embedding and head stay dense.
   `budget = "3.9GB"` is the bytes of all tensors of the checkpoint; embedding and head are choices
   as well, with options of their own, dense among them. Norms, biases and whatever else stays count
   as they are stored. (File headers, some kilobytes, do not.)
2. What an option loses is the KL divergence from the dense model that it brings about, on the
   calibration text: predicted (`sensitivity = "fisher"`, one pass forward and one back, see
   `atd.calibration.sensitivity`) or measured one by one (`"measured"`, for small models, see
   `atd.calibration.measured`).
3. The allocation is the exact optimum (`atd.decomposition.allocation.allocate`): never above the
   budget, and below it by less than the finest step there is.
4. Linears that read the same input (q, k and v; gate and up) share one option, because `fuse` joins
   equal types alone; `fused = false` lets each have its own.
5. The decision stays in the graph: the attr `ternary` of every dense matrix says "n=2 g=row tied
   f16" or "dense", and `decompose`, which must follow, does that. An embedding, which reads no
   activations, gets the attr `moments`: second moments that its errors are weighted by. Linears get
   the attr `fisher`: squared gradients at their outputs, by which rows of a trellis code count.
6. Without calibration (the check before a conversion reads data) feasibility is checked in the same
   way, and types come from a stand-in (`atd.decomposition.budget.stand_in_loss`)."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from atd.calibration.measured import measured_losses
from atd.calibration.sensitivity import fisher_losses
from atd.calibration.windows import tokens_digest, windows_holding
from atd.calibration.work import Text, Work, forward_work, sensitivity_work, times
from atd.checkpoint.cache import cache_key
from atd.decomposition.allocation import parse_bytes
from atd.decomposition.budget import Allocation, Problem
from atd.decomposition.options import (
    Candidate,
    can_be_packed,
    decision,
    stored_bytes,
    ternary_types,
    trellis_types,
)
from atd.decomposition.trellis_codes import BASES, KINDS
from atd.errors import BadInput
from atd.ir import Block, Graph, Node
from atd.ir.notes import DECISION, FISHER, MOMENTS, SecondMoments
from atd.ir.rewrite import map_nodes
from atd.models.numerics import numerics
from atd.pipeline import Context, Pass, checks
from atd.progress import Say
from atd.version import __version__
from atd.weights import DenseType, Group
from atd.weights.layouts import DEFAULT_LAYOUT, LAYOUTS

SENSITIVITIES = ("fisher", "measured")
VERSION = 7  # of the sensitivities in the cache

Notes = Mapping[str, Mapping[str, np.ndarray]]  # attr -> name of a node -> its second moments


@dataclass(frozen=True, kw_only=True)
class Allocate(Pass):
    """Options: see the fields. One of `bits` and `budget` must be set when it runs."""

    name = "allocate"
    scope = "graph"

    bits: float = 0.0  # per weight, average over the linears of the blocks
    budget: str = ""  # of the whole checkpoint: "3.9GB", "75MB", "2GiB"
    bases: tuple[int | float, ...] = (1, 2, 3)
    trellis: str = ""  # "fast", "default" or "best": trellis codes are options as well
    groups: tuple[Group, ...] = ("row",)
    scales: tuple[str, ...] = ("tied",)
    dtype: str = "f16"  # of the stored scales
    embedding_bases: tuple[int | float, ...] = (2, 3, 4)  # of embedding and head
    embedding_groups: tuple[Group, ...] = (64, "row")
    sensitivity: str = "fisher"  # or "measured"
    tokens: int = 2048  # of the calibration text, for gradients or measurements
    moment_tokens: int = 8192  # for second moments
    fused: bool = True  # linears of one input share one option
    layout: str = DEFAULT_LAYOUT  # that `pack` will use: its padding counts
    nodes: str = r"model\.layers\..*"  # whole names of linears that are choices; others stay dense

    def __post_init__(self):
        if not 0 <= self.bits < math.inf or (self.bits and self.budget):
            raise BadInput("allocate: set bits (above 0) or budget, one of the two")
        if self.budget:
            parse_bytes(self.budget)
        coded = BASES if self.trellis else ()
        if self.trellis:
            checks.check_known("allocate.trellis", self.trellis, KINDS)
        checks.check_bases("allocate.bases", self.bases, coded)
        checks.check_bases("allocate.embedding_bases", self.embedding_bases, coded)
        checks.check_groups("allocate.groups", self.groups)
        checks.check_groups("allocate.embedding_groups", self.embedding_groups)
        if not self.scales or any(kind not in ("tied", "free") for kind in self.scales):
            raise BadInput(
                f"allocate.scales must be 'tied', 'free' or both, not {list(self.scales)}"
            )
        checks.check_dtype("allocate.dtype", self.dtype)
        checks.check_known("allocate.sensitivity", self.sensitivity, SENSITIVITIES)
        checks.check_known("allocate.layout", self.layout, LAYOUTS)
        if min(self.tokens, self.moment_tokens) < 1:
            raise BadInput("allocate: tokens and moment_tokens must be at least 1")
        checks.check_pattern("allocate.nodes", self.nodes)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"activations"})

    # --- the contract ---

    def requires(self, graph: Graph) -> str | None:
        if not (self.bits or self.budget):
            return "how many bytes? Set allocate.bits=3.4 or allocate.budget=3.9GB"
        if not any(node.is_dense_matrix for _, node in graph.nodes()):
            return "no dense matrix is left to decide on (is the model converted already?)"
        if any(DECISION in node.attrs for _, node in graph.nodes()):
            return "another allocate has decided already"
        linears = _linears(graph)
        if linears and not any(node.is_dense_matrix for node in linears.values()):
            name, node = next(iter(linears.items()))
            return f"{name} is {node.weights['weight'].type} already; put allocate before decompose"
        try:
            self.problem(graph)
        except BadInput as error:
            return str(error)
        return None

    def unfinished(self, graph: Graph) -> str | None:
        if any(DECISION in node.attrs for _, node in graph.nodes()):
            return "no pass carries out what it decides; put decompose behind it"
        return None

    def rewrite(self, graph: Graph, context: Context) -> Graph | None:
        problem = self.problem(graph)
        losses, notes = self.sensitivities(problem, graph, context)
        decided = problem.solved(losses)
        context.say(f"allocate: {decided}")
        for name, loss in decided.shares.items():
            context.record(name, predicted_kl=loss)
        squares = _usable(notes.get(FISHER, {}), context.say)
        return _noted(graph, decided, {**notes, FISHER: squares})

    def work(self, before: Graph, after: Graph, text: Text) -> Work:
        seen = min(max(self.moment_tokens, text.context), text.tokens)
        if self.sensitivity == "fisher":
            return sensitivity_work(before, self.problem(before).candidates, seen, self.tokens)
        measured = sum(map(len, self.problem(before).candidates.values()))
        both = times(forward_work("sensitivities", before, seen), 2)  # the dense model's as well
        return times(both, measured)

    # --- what there is to decide ---

    def problem(self, graph: Graph) -> Problem:
        """Returns the choices and their candidates, on shapes alone.

        Raises:
            BadInput: the budget is out of reach.
        """
        linears = _linears(graph)
        mine = {
            name: node
            for name, node in linears.items()
            if node.is_dense_matrix and re.fullmatch(self.nodes, name)
        }
        if not mine:
            raise BadInput(
                f"nodes = {self.nodes!r} matches no dense linear of the blocks; "
                f"names are like {next(iter(linears), '')!r}"
            )
        candidates = {
            name: self._types(node, self.bases, self.groups) for name, node in mine.items()
        }
        counted = [node.weights["weight"].type for node in linears.values()]
        if self.budget:
            counted = [ref.type for _, ref in graph.weights()]
            candidates |= {name: self._end_types(node) for name, node in _ends(graph).items()}
        weights = sum(math.prod(type.shape) for type in counted)
        everything = sum(stored_bytes(type, self.layout) for type in counted)
        dense = sum(
            node.weights["weight"].type.nbytes for name, node in graph.nodes() if name in candidates
        )
        problem = Problem(
            candidates=candidates,
            choices=self._joined(graph, candidates),
            fixed=everything - dense,
            budget=parse_bytes(self.budget) if self.budget else int(self.bits * weights / 8),
            weights=weights,
            layout=self.layout,
        )
        self._check_reach(problem, everything)
        return problem

    def _types(
        self, node: Node, bases: Sequence[float], groups: Sequence[Group]
    ) -> tuple[Candidate, ...]:
        """The ternary types that a node's matrix may get."""
        shape = node.weights["weight"].type.shape
        whole = [int(n) for n in bases if n in (1, 2, 3, 4)]
        types: list[Candidate] = [*ternary_types(shape, whole, groups, self.scales, self.dtype)]
        if self.trellis:
            types += trellis_types(shape, bases, self.trellis, self.dtype)
        fitting = tuple(type for type in types if can_be_packed(type, self.layout))
        if not fitting:
            raise BadInput(
                f"{node.name}: layout {self.layout} takes none of the options; "
                "choose another layout or bases"
            )
        return fitting

    def _end_types(self, node: Node) -> tuple[Candidate, ...]:
        """What embedding or head may become, dense among it."""
        dense = node.weights["weight"].type
        assert isinstance(dense, DenseType)
        return (*self._types(node, self.embedding_bases, self.embedding_groups), dense)

    def _joined(
        self, graph: Graph, candidates: Mapping[str, tuple[Candidate, ...]]
    ) -> list[tuple[str, ...]]:
        """The nodes of each choice."""
        groups: dict[tuple, list[str]] = {}
        for unit in graph.units:
            for node in unit.nodes:
                if (name := unit.full_name(node)) in candidates:
                    # What fuse joins: one input, and options that mean the same for each.
                    alike = unit.name, node.inputs, len(candidates[name]), "bias" in node.weights
                    key = alike if self.fused and node.op == "linear" else (name,)
                    groups.setdefault(key, []).append(name)
        return [tuple(names) for names in groups.values()]

    def _check_reach(self, problem: Problem, everything: int) -> None:
        """Raises BadInput for a budget below the smallest options or above the dense model."""
        asked = f"bits = {self.bits}"
        if self.budget:
            asked = f"budget {self.budget} ({problem.budget:,} bytes)"

        def size(bytes: int) -> str:
            bits = math.ceil(8000 * bytes / problem.weights) / 1000
            return f"{bytes:,} bytes" if self.budget else f"{bits:.3f} bits"

        if problem.budget < problem.least:
            ends = f", embedding and head N = {min(self.embedding_bases)}" if self.budget else ""
            raise BadInput(
                f"{asked} is below what is possible: "
                f"the minimum is {size(problem.least)} with N = {min(self.bases)}{ends}"
            )
        if problem.budget > everything:
            raise BadInput(
                f"{asked} is above dense: {size(everything)} is what the dense model takes"
            )

    # --- what options lose ---

    def sensitivities(
        self, problem: Problem, graph: Graph, context: Context
    ) -> tuple[list[np.ndarray], Notes]:
        """Returns what options lose, from the cache where another run has found it.

        Returns:
            KL of each choice, nats per position, [nodes, options]; what `decompose` weighs errors
            by: the moments of an embedding among the candidates, and E[g^2] of linears.
        """
        if context.calibration is None:
            return problem.stand_in_losses(), {}
        tokens = context.calibration.tokens
        windows = tokens[: windows_holding(self.moment_tokens, tokens.shape[1])]
        if context.cache is None:
            return self._find(problem, graph, windows, context)
        key = self._key(problem, graph, windows, context)
        if (kept := context.cache.load(key)) is not None:
            return _unpacked(kept, problem)
        found = self._find(problem, graph, windows, context)
        context.cache.save(key, _packed(*found, problem))
        return found

    def _find(
        self, problem: Problem, graph: Graph, windows: np.ndarray, context: Context
    ) -> tuple[list[np.ndarray], Notes]:
        """What `sensitivities` returns, found on the windows int32 [windows, context]."""
        if self.sensitivity == "fisher":
            options = {"seed": context.seed, "progress": context.progress}
            found = fisher_losses(graph, windows, problem.candidates, self.tokens, **options)
            losses = [np.array([found.losses[n] for n in names]) for names in problem.choices]
            return losses, {MOMENTS: found.moments, FISHER: found.squares}
        together = measured_losses(
            graph, windows, problem.choices, problem.candidates, self.tokens, context.progress
        )
        losses = [
            np.repeat(loss[None] / len(names), len(names), axis=0)  # nobody knows whose it is
            for names, loss in zip(problem.choices, together, strict=True)
        ]
        return losses, {}

    def _key(self, problem: Problem, graph: Graph, windows: np.ndarray, context: Context) -> str:
        """Equal keys: equal sensitivities. The texts of earlier passes say what they do to weights;
        the data of the first block, that their code is the same. Where the texts are not known, all
        data are read.
        """
        data = hashlib.sha256()
        for name, ref in graph.weights():
            data.update(f"{name} {ref.source}\n".encode())
            known = ref.source and context.passes is not None
            if not known or name.startswith(graph.blocks[0].name + "."):
                data.update(ref.dense().tobytes())
        options = {
            name: [decision(type) for type in types] for name, types in problem.candidates.items()
        }
        asked = [self.sensitivity, self.tokens, context.seed, tokens_digest(windows), options]
        versions = [VERSION, __version__, numerics(), context.passes]
        made_from = [*versions, str(graph), asked, problem.choices, data.hexdigest()]
        return cache_key("sensitivity", made_from)


def _linears(graph: Graph) -> dict[str, Node]:
    """The linears of the blocks by full name."""
    return {
        block.full_name(node): node
        for block in graph.blocks
        for node in block.nodes
        if node.op == "linear" and "weight" in node.weights
    }


def _ends(graph: Graph) -> dict[str, Node]:
    """The embedding and the head by full name, where they are dense and have an own matrix.

    Other linears beside them (a rotation that is not Hadamard's) stay.
    """
    embed, head = graph.prologue.nodes[0], graph.head
    named = {graph.prologue.full_name(embed): embed, graph.epilogue.full_name(head): head}
    return {name: node for name, node in named.items() if node.is_dense_matrix}


def _usable(squares: Mapping[str, np.ndarray], say: Say) -> dict[str, np.ndarray]:
    """E[g^2] of the linears whose rows it can weigh; says of the others why it cannot."""
    found = {}
    for name, square in squares.items():
        if not np.isfinite(square).all():
            say(f"allocate: {name}: gradients at its outputs overflow; its rows count alike")
        elif not square.any():
            say(f"allocate: {name}: gradients at its outputs are all zero; its rows count alike")
        else:
            found[name] = square
    return found


def _noted(graph: Graph, decided: Allocation, notes: Notes) -> Graph:
    """The graph with the decision noted at every dense matrix, and what else there is of it."""

    def noted(unit: Block, node: Node) -> Node:
        if not node.is_dense_matrix:
            return node
        name = unit.full_name(node)
        type = decided.types.get(name, node.weights["weight"].type)
        mine: dict[str, Any] = {DECISION: decision(type)}
        mine |= {attr: SecondMoments(of[name]) for attr, of in notes.items() if name in of}
        return replace(node, attrs=node.attrs | mine)

    return map_nodes(graph, noted)


def _packed(losses: Sequence[np.ndarray], notes: Notes, problem: Problem) -> dict[str, np.ndarray]:
    """Sensitivities as named arrays for the cache."""
    by_node = {
        f"losses {name}": loss
        for names, found in zip(problem.choices, losses, strict=True)
        for name, loss in zip(names, found, strict=True)
    }
    return by_node | {
        f"{attr} {name}": array for attr, of in notes.items() for name, array in of.items()
    }


def _unpacked(kept: Mapping[str, np.ndarray], problem: Problem) -> tuple[list[np.ndarray], Notes]:
    """What `_packed` made named arrays of."""
    losses = [np.stack([kept[f"losses {name}"] for name in names]) for names in problem.choices]
    notes: dict[str, dict[str, np.ndarray]] = {MOMENTS: {}, FISHER: {}}
    for key, array in kept.items():
        attr, name = key.split(" ", 1)
        if attr in notes:
            notes[attr][name] = array
    return losses, notes
