"""allocate: a budget of bytes is shared out: N, group size and scales of every matrix, where they lose least.

1. `bits = 3.4`: the average over the linears of the blocks, all their stored bytes counted, padding and scales too; they
   are the choices, embedding and head stay dense. `budget = "3.9GB"`: the bytes of all tensors of the checkpoint;
   embedding and head are choices as well, with options of their own, dense among them. Norms, biases and what else
   stays count as they are stored. (File headers, some kilobytes, do not.)
2. What an option loses is the KL from the dense model that it brings about: predicted (`sensitivity = "fisher"`: one
   pass forward and one back) or measured one by one ("measured": small models), on the calibration text. See
   `atd.calibration.sensitivity`.
3. The allocation is the exact optimum (`atd.decomposition.allocation.allocate`): never above the budget, and below it by less than
   the finest step there is.
4. Linears that read the same input (q, k and v; gate and up) share one option, because `fuse` joins equal types alone;
   `fused = false` lets each have its own.
5. The decision stays in the graph: the attr `ternary` of every dense matrix says "n=2 g=row tied
   f16" or "dense", and `decompose`, which must follow, does that. An embedding, which reads no
   activations, gets the attr `moments`: second moments that its errors are weighted by.
6. Without calibration (the check before a conversion reads data) feasibility is checked in the same way, and types come
   from a stand-in: all weights alike, and a ninth of the loss with each base.
"""

import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from atd.calibration.measured import measured_losses
from atd.calibration.sensitivity import Candidate, fisher_losses
from atd.calibration.windows import tokens_digest
from atd.checkpoint.cache import make_cache
from atd.checkpoint.writer import write_file
from atd.decomposition.allocation import Choice, allocate, parse_bytes, total_bytes
from atd.decomposition.options import can_be_packed, decision, stored_bytes, ternary_types
from atd.errors import BadInput, nearest
from atd.ir import Block, Graph, Node
from atd.ir.notes import DECISION, MOMENTS, SecondMoments
from atd.ir.rewrite import map_nodes
from atd.pipeline import Context, Pass, check_pattern
from atd.version import __version__
from atd.weights import DenseType, Group, TernaryType
from atd.weights.layouts import DEFAULT_LAYOUT, LAYOUTS

SENSITIVITIES = ("fisher", "measured")
VERSION = 3  # of the stored sensitivities


@dataclass(frozen=True)
class Allocation:
    """What was decided: the type of every matrix that was a choice, and what that takes and loses."""

    types: dict[str, Candidate]  # full name of the node -> what its matrix becomes, before packing
    losses: dict[
        str, float
    ]  # predicted KL of each, nats a position; measured, those of one choice share it
    used: int  # bytes of all that the budget is for
    budget: int
    weights: int  # that `used` is for; with `bits` the linears of the blocks, else all
    moments: dict[
        str, np.ndarray
    ]  # second moments float32 [in, in] for an embedding's errors, by its name

    @property
    def predicted_kl(self) -> float:
        return math.fsum(self.losses.values())

    @property
    def bits(self) -> float:
        """Bits a weight, over what the budget is for."""
        return 8 * self.used / self.weights

    def __str__(self) -> str:
        share = f"{self.used:,} of {self.budget:,} bytes ({self.used / self.budget:.2%})"
        return f"{self.bits:.3f} bits a weight, {share}, predicted KL {self.predicted_kl:.4f}"


@dataclass(frozen=True, kw_only=True)
class Allocate(Pass):
    """Options: see the fields. One of `bits` and `budget` must be set when it runs."""

    name = "allocate"
    scope = "graph"

    bits: float = 0.0  # a weight, average over the linears of the blocks
    budget: str = ""  # of the whole checkpoint: "3.9GB", "75MB", "2GiB"
    bases: tuple[int, ...] = (1, 2, 3)
    groups: tuple[Group, ...] = ("row",)
    scales: tuple[str, ...] = ("tied",)
    dtype: str = "f16"  # of the stored scales
    embedding_bases: tuple[int, ...] = (2, 3, 4)  # of embedding and head
    embedding_groups: tuple[Group, ...] = (64, "row")
    sensitivity: str = "fisher"  # or "measured"
    tokens: int = 2048  # of the calibration text, for gradients or measurements
    moment_tokens: int = 8192  # for second moments
    fused: bool = True  # linears of one input share one option
    layout: str = DEFAULT_LAYOUT  # that `pack` will use: its padding counts
    nodes: str = r"model\.layers\..*"  # linears of the blocks that are choices (whole names); others stay dense

    def __post_init__(self):
        if not 0 <= self.bits < math.inf or (self.bits and self.budget):
            raise BadInput("allocate: set bits (above 0) or budget, one of the two")
        if self.budget:
            parse_bytes(self.budget)
        for key in ("bases", "embedding_bases"):
            if not (values := getattr(self, key)) or any(
                type(n) is not int or not 1 <= n <= 4 for n in values
            ):
                raise BadInput(f"allocate.{key} must be some of 1, 2, 3 and 4, not {list(values)}")
        for key in ("groups", "embedding_groups"):
            values = getattr(self, key)
            if not values or any(g != "row" and (type(g) is not int or g < 32) for g in values):
                raise BadInput(
                    f"allocate.{key} must be sizes of at least 32, or 'row', not {list(values)}"
                )
        if not self.scales or any(kind not in ("tied", "free") for kind in self.scales):
            raise BadInput(
                f"allocate.scales must be 'tied', 'free' or both, not {list(self.scales)}"
            )
        if self.dtype not in ("f16", "bf16", "f32"):
            raise BadInput(f"allocate.dtype must be f16, bf16 or f32, not {self.dtype!r}")
        if self.sensitivity not in SENSITIVITIES:
            raise BadInput(
                f"allocate.sensitivity {self.sensitivity!r} is unknown{nearest(self.sensitivity, SENSITIVITIES)}"
            )
        if self.layout not in LAYOUTS:
            raise BadInput(
                f"allocate.layout {self.layout!r} is unknown{nearest(self.layout, LAYOUTS)}"
            )
        if min(self.tokens, self.moment_tokens) < 1:
            raise BadInput("allocate: tokens and moment_tokens must be at least 1")
        check_pattern("allocate.nodes", self.nodes)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"activations"})

    # --- the contract ---

    def requires(self, graph: Graph) -> str | None:
        if not (self.bits or self.budget):
            return "how many bytes? Set allocate.bits=3.4 or allocate.budget=3.9GB"
        matrices = [name for name, node in graph.nodes() if node.is_dense_matrix]
        if not matrices:
            return "no dense matrix is left to decide on (is the model converted already?)"
        if any(DECISION in node.attrs for _, node in graph.nodes()):
            return "another allocate has decided already"
        linears = [
            (block.full_name(n), n)
            for block in graph.blocks
            for n in block.nodes
            if n.op == "linear"
        ]
        if linears and not any(node.is_dense_matrix for _, node in linears):
            return f"{linears[0][0]} is {linears[0][1].weights['weight'].type} already; put allocate before decompose"
        try:
            self._problem(graph)
        except BadInput as error:
            return str(error)
        return None

    def unfinished(self, graph: Graph) -> str | None:
        if any(DECISION in node.attrs for _, node in graph.nodes()):
            return "no pass carries out what it decides; put decompose behind it"
        return None

    def rewrite(self, graph: Graph, context: Context) -> Graph | None:
        decided = self.decide(graph, context)
        context.say(f"allocate: {decided}")
        for name, loss in decided.losses.items():
            context.record(name, predicted_kl=loss)

        def marked(unit: Block, node: Node) -> Node:
            if not node.is_dense_matrix:
                return node
            name = unit.full_name(node)
            type = decided.types.get(name, node.weights["weight"].type)
            assert isinstance(type, DenseType | TernaryType)
            notes: dict[str, Any] = {DECISION: decision(type)}
            if name in decided.moments:
                notes[MOMENTS] = SecondMoments(decided.moments[name])
            return replace(node, attrs=node.attrs | notes)

        return map_nodes(graph, marked)

    def decide(self, graph: Graph, context: Context) -> Allocation:
        """The decision without the rewrite. Raises BadInput for a budget that cannot be met."""
        problem = self._problem(graph)
        losses, moments = self._losses(problem, graph, context)
        choices = [
            Choice(
                names,
                problem.bytes_of(names, self.layout),
                tuple(float(loss) for loss in found.sum(axis=0)),
            )
            for names, found in zip(problem.choices, losses, strict=True)
        ]
        taken = allocate(choices, problem.budget - problem.fixed)
        types, shares = {}, {}
        for choice, option, found in zip(choices, taken, losses, strict=True):
            types |= {name: problem.candidates[name][option] for name in choice.names}
            shares |= {
                name: float(loss) for name, loss in zip(choice.names, found[:, option], strict=True)
            }
        used = problem.fixed + total_bytes(choices, taken)
        assert used <= problem.budget, "an allocation above its budget"
        return Allocation(types, shares, used, problem.budget, problem.weights, moments)

    # --- what there is to decide ---

    def _problem(self, graph: Graph) -> "_Problem":
        """The choices and their candidates, on shapes alone. Raises BadInput where the budget is out of reach."""
        linears = {
            block.full_name(node): node
            for block in graph.blocks
            for node in block.nodes
            if node.op == "linear" and "weight" in node.weights
        }
        mine = {
            name: node
            for name, node in linears.items()
            if node.is_dense_matrix and re.fullmatch(self.nodes, name)
        }
        if not mine:
            example = next(iter(linears), "")
            raise BadInput(
                f"nodes = {self.nodes!r} matches no dense linear of the blocks; names are like {example!r}"
            )
        candidates = {
            name: self._types(node, self.bases, self.groups) for name, node in mine.items()
        }
        counted = [node.weights["weight"].type for node in linears.values()]
        if self.budget:
            counted = [ref.type for _, ref in graph.weights()]
            for name, node in _ends(graph).items():
                as_it_is = node.weights["weight"].type
                assert isinstance(as_it_is, DenseType)
                candidates[name] = (
                    *self._types(node, self.embedding_bases, self.embedding_groups),
                    as_it_is,
                )
        weights = sum(math.prod(type.shape) for type in counted)
        budget = parse_bytes(self.budget) if self.budget else int(self.bits * weights / 8)
        everything = sum(stored_bytes(type, self.layout) for type in counted)
        dense = {
            name: node.weights["weight"].type.nbytes
            for name, node in graph.nodes()
            if name in candidates
        }
        problem = _Problem(
            candidates,
            self._joined(graph, candidates),
            everything - sum(dense.values()),
            budget,
            weights,
        )
        least = problem.fixed + sum(
            min(problem.bytes_of(names, self.layout)) for names in problem.choices
        )
        if budget < least:
            what = f"N = {min(self.bases)}" + (
                f", embedding and head N = {min(self.embedding_bases)}" if self.budget else ""
            )
            raise BadInput(
                f"{self._asked(budget)} is below what is possible: the minimum is {self._size(least, weights)} with {what}"
            )
        if budget > everything:
            raise BadInput(
                f"{self._asked(budget)} is above dense: {self._size(everything, weights)} is what the dense model takes"
            )
        return problem

    def _types(
        self, node: Node, bases: Sequence[int], groups: Sequence[Group]
    ) -> tuple[Candidate, ...]:
        types = ternary_types(
            node.weights["weight"].type.shape, bases, groups, self.scales, self.dtype
        )
        fitting = tuple(type for type in types if can_be_packed(type, self.layout))
        if not fitting:
            raise BadInput(
                f"{node.name}: layout {self.layout} takes none of the options; choose another layout or bases"
            )
        return fitting

    def _joined(
        self, graph: Graph, candidates: dict[str, tuple[Candidate, ...]]
    ) -> list[tuple[str, ...]]:
        """The nodes of each choice."""
        groups: dict[tuple, list[str]] = {}
        for unit in graph.units:
            for node in unit.nodes:
                if (name := unit.full_name(node)) in candidates:
                    # What fuse joins: one input, and options that mean the same for each.
                    alike = unit.name, node.inputs, len(candidates[name]), "bias" in node.weights
                    groups.setdefault(
                        alike if self.fused and node.op == "linear" else (name,), []
                    ).append(name)
        return [tuple(names) for names in groups.values()]

    def _asked(self, budget: int) -> str:
        return f"budget {self.budget} ({budget:,} bytes)" if self.budget else f"bits = {self.bits}"

    def _size(self, bytes: int, weights: int) -> str:
        return (
            f"{bytes:,} bytes"
            if self.budget
            else f"{math.ceil(8000 * bytes / weights) / 1000:.3f} bits"
        )

    # --- what options lose ---

    def _losses(
        self, problem: "_Problem", graph: Graph, context: Context
    ) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """(predicted or measured KL of each choice, [nodes, options]; second moments of an embedding by its name)."""
        if context.calibration is None:
            return [
                np.array([[_stand_in(type) for type in problem.candidates[name]] for name in names])
                for names in problem.choices
            ], {}
        tokens = context.calibration.tokens
        windows = tokens[: max(1, -(-self.moment_tokens // tokens.shape[1]))]
        path = None
        if context.cache is not None:
            key = self._key(problem, graph, windows, context.seed)
            path = context.cache / f"sensitivity-{key[:32]}.json"
            if (stored := _stored(path, problem)) is not None:
                return stored
            make_cache(context.cache)
        moments: dict[str, np.ndarray] = {}
        if self.sensitivity == "fisher":
            by_node, moments = fisher_losses(
                graph, windows, problem.candidates, self.tokens, context.seed
            )
            losses = [np.array([by_node[name] for name in names]) for names in problem.choices]
        else:
            together = measured_losses(
                graph, windows, problem.choices, problem.candidates, self.tokens
            )
            losses = [
                np.repeat(loss[None] / len(names), len(names), axis=0)  # nobody knows whose it is
                for names, loss in zip(problem.choices, together, strict=True)
            ]
        if path is not None:
            rows = [
                {"nodes": names, "losses": loss.tolist()}
                for names, loss in zip(problem.choices, losses, strict=True)
            ]
            content = io.BytesIO()
            np.savez(content, **moments)  # type: ignore[arg-type]
            write_file(path.with_suffix(".npz"), content.getvalue())
            write_file(path, json.dumps(rows, indent=1) + "\n")
        return losses, moments

    def _key(self, problem: "_Problem", graph: Graph, windows: np.ndarray, seed: int) -> str:
        """Equal keys: equal sensitivities. The data of the first block stand for what earlier passes do to weights."""
        digest = hashlib.sha256()
        for name, ref in graph.weights():
            digest.update(f"{name} {ref.source}\n".encode())
            if not ref.source or name.startswith(graph.blocks[0].name + "."):
                digest.update(ref.dense().tobytes())
        options = {
            name: [decision(type) for type in types] for name, types in problem.candidates.items()
        }
        asked = [
            self.sensitivity,
            self.tokens,
            seed,
            tokens_digest(windows),
            options,
            problem.choices,
        ]
        digest.update(json.dumps([VERSION, __version__, str(graph), asked]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Problem:
    """What is to be decided, in shapes and bytes."""

    candidates: dict[str, tuple[Candidate, ...]]
    choices: list[tuple[str, ...]]
    fixed: int  # bytes of what counts and is no choice
    budget: int
    weights: int

    def bytes_of(self, names: Sequence[str], layout: str) -> tuple[int, ...]:
        """Of each option of a choice."""
        sizes = [[stored_bytes(type, layout) for type in self.candidates[name]] for name in names]
        return tuple(sum(column) for column in zip(*sizes, strict=True))


def _ends(graph: Graph) -> dict[str, Node]:
    """Embedding and head, as far as they are dense and have a matrix of their own. Other linears beside them (a rotation
    that is not Hadamard's) stay."""
    embed, head = graph.prologue.nodes[0], graph.epilogue.nodes[-1]
    named = {graph.prologue.full_name(embed): embed, graph.epilogue.full_name(head): head}
    return {name: node for name, node in named.items() if node.is_dense_matrix}


def _stand_in(type: Candidate) -> float:
    """A loss for options when nothing is known: a ninth a base, a little less for finer groups and free scales."""
    if isinstance(type, DenseType):
        return 0.0
    finer = 0.97 if type.group == "row" else 0.85 + 0.02 * math.log2(type.group_size / 32)
    return (
        math.prod(type.shape) * 9.0**-type.bases * min(finer, 0.97) * (1.0 if type.tied else 0.97)
    )


def _stored(path: Path, problem: _Problem) -> tuple[list[np.ndarray], dict[str, np.ndarray]] | None:
    """The sensitivities and moments that an earlier run left; None where there are none, or they are damaged."""
    try:
        rows = json.loads(path.read_text())
        found = {tuple(row["nodes"]): np.array(row["losses"], float) for row in rows}
        losses = [found[names] for names in problem.choices]
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as moments:
            return losses, dict(moments)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
