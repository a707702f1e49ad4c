"""The base class of passes: options, contract and rules."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from atd.calibration.streams import Calibration
from atd.errors import BadInput
from atd.ir import Block, Graph, InvalidGraph, Node, verify


@dataclass
class Context:
    """What passes may ask for, and where they leave figures.

    `feature_weights`: importance of each input feature of a node, f32 [in], by full node name: `decompose` weights its
    errors with them. `moments`: second moments f32 [in, in] of nodes that read no activations (embeddings), by full name:
    `allocate` leaves them for `decompose`. `record(node, error=...)`: figures of a node for report.json, made while its weight is loaded.
    `calibration`: second moments of what reaches each linear; there for passes that need "activations".
    `dense`: the model before the first pass that changes its function, for passes that calibrate against it.
    `advance(what, done, total)`: hears of the progress of long passes.
    `cache`: folder for what can be used again by other runs over the same model, or None.
    `written_digests`: sha256 of each stored tensor as it was in memory when written; there for passes that need
    "written".
    """

    seed: int = 0
    feature_weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    moments: dict[str, np.ndarray] = field(default_factory=dict)
    figures: dict[str, dict] = field(default_factory=dict)
    written_digests: Mapping[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None
    dense: Graph | None = None
    cache: Path | None = None
    say: Callable[[str], None] = print
    advance: Callable[[str, int, int], None] = lambda what, done, total: None

    def record(self, node: str, **figures: float) -> None:
        self.figures.setdefault(node, {}).update(
            {name: float(value) for name, value in figures.items()}
        )


@dataclass(frozen=True)
class Rule:
    """Options for the nodes whose full name the regex `match` matches whole; `skip` leaves them alone. The first rule that matches wins."""

    match: str
    skip: bool = False
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A rewrite of graphs. Its dataclass fields are its options and round-trip to text: `decompose{bases = 2, group =
    128}`.

    A subclass names itself, its `scope`, and implements `rewrite` for one target of that scope, returning None for "not
    mine":
        node    rewrite(name, node, context) -> Node | None, for every node; `rules` give single nodes other options
        block   rewrite(block, context) -> Block | None, for prologue, blocks and epilogue
        graph   rewrite(graph, context) -> Graph | None
    `needs` holds "activations" for a pass that asks for calibration activations, "written" for a graph pass that must
    see its input re-read from disk; one that also changes it says so with `rewrites`. `requires(graph)` says, on shapes
    alone, why the pass cannot run on it (or None); `ensures(before, after)` says what it broke (or None);
    `unfinished(graph)` why no pipeline with this pass can end in the graph (or None).
    """

    name: ClassVar[str]
    scope: ClassVar[Literal["node", "block", "graph"]]
    rewrites: ClassVar[bool] = True
    least_windows: ClassVar[int] = 0  # of calibration text, without which the pass cannot work
    rules: tuple[Rule, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def requires(self, graph: Graph) -> str | None:
        return None

    def rewrite(self, *target_and_context) -> Any:
        raise NotImplementedError(f"pass {self.name!r} has no rewrite")

    def ensures(self, before: Graph, after: Graph) -> str | None:
        return None

    def unfinished(self, graph: Graph) -> str | None:
        return None

    # --- the contract: requires, rewrite, ensures, verify ---

    def __call__(self, graph: Graph, context: Context | None = None) -> Graph:
        context = Context() if context is None else context
        if reason := self.requires(graph):
            raise BadInput(f"pass {self.name}: {reason}")
        if self.scope == "graph":
            after = self.rewrite(graph, context) or graph
        elif self.scope == "block":
            after = graph.with_units(
                tuple(self.rewrite(block, context) or block for block in graph.units)
            )
        else:
            after = self._rewrite_nodes(graph, context)
        if reason := self.ensures(graph, after):
            raise InvalidGraph(f"pass {self.name} broke its own promise: {reason}")
        try:
            verify(after)
        except InvalidGraph as error:
            raise InvalidGraph(f"after pass {self.name}: {error}") from None
        return after

    def _rewrite_nodes(self, graph: Graph, context: Context) -> Graph:
        self._check_rules(graph)

        def rewrite(block: Block, node: Node) -> Node:
            name = block.full_name(node)
            effective = self.for_node(name)
            return (effective and effective.rewrite(name, node, context)) or node

        return graph.with_units(
            tuple(
                replace(block, nodes=tuple(rewrite(block, node) for node in block.nodes))
                for block in graph.units
            )
        )

    def for_node(self, name: str) -> "Pass | None":
        """This pass with the options that the first matching rule gives the node; None where the rule skips it."""
        for rule in self.rules:
            if re.fullmatch(rule.match, name):
                return None if rule.skip else replace(self, rules=(), **dict(rule.options))
        return self

    def _check_rules(self, graph: Graph) -> None:
        names = [name for name, node in graph.nodes() if node.weights]
        for rule in self.rules:
            if not any(re.fullmatch(rule.match, name) for name in names):
                raise BadInput(
                    f"pass {self.name}: rule {rule.match!r} matches no node with a weight; names are like {names[1]!r} (the whole name must match)"
                )

    # --- options and text ---

    def options(self) -> dict[str, Any]:
        """All options by name, as TOML values; rules as a list of tables."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rules"}
        rules = [
            {"match": r.match, **({"skip": True} if r.skip else {}), **dict(r.options)}
            for r in self.rules
        ]
        return values | ({"rules": rules} if rules else {})

    def __str__(self) -> str:
        return f"{self.name}{toml_value(self.options())}"


def check_pattern(option: str, pattern: str) -> None:
    """Raises BadInput where the value of an option is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise BadInput(f"{option} {pattern!r} is no regular expression: {error}") from None


def toml_value(value: Any) -> str:
    """A Python value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        import json

        return json.dumps(value)
    return repr(value)
