"""The base class of passes: options, contract and rules. How data flows between passes:

graph    A pass is a function of a graph, and all that it decides stands in the graph that it
         returns: types, weights and attrs, which `str(graph)` shows. What it leaves for a later
         pass are attrs (`atd.ir.notes`): `allocate` writes `ternary` and `moments`, `decompose`
         carries them out and takes them away.
context  What a pass may read besides the graph (`atd.pipeline.context`): frozen, made by the driver
         for each stage of a pipeline. Passes change nothing in it.
sinks    What a pass tells people goes out through functions of the context: `say`, `progress` and
         `record`. No pass reads what was recorded; the driver owns it and writes it to report.json.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from atd.calibration.work import Text, Work
from atd.errors import BadInput
from atd.ir import Block, Graph, InvalidGraph, Node, verify
from atd.ir.rewrite import map_nodes
from atd.pipeline.code import OWN, code_digest
from atd.pipeline.context import Context


@dataclass(frozen=True)
class Rule:
    """Options for the nodes whose whole full name matches the regex `match`.

    The first rule that matches wins.
    """

    match: str
    skip: bool = False  # leave these nodes alone
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Rewrites graphs. Its dataclass fields are its options and round-trip to text,
    `decompose{bases = 2, ...}`.

    A subclass names itself and its `scope`, and implements `rewrite` for one target of that scope,
    returning None for "not mine":

        node    rewrite(name, node, context) -> Node | None, for every node; `rules` give single
                nodes other options
        block   rewrite(block, context) -> Block | None, for prologue, blocks and epilogue
        graph   rewrite(graph, context) -> Graph | None

    Calling it runs the contract: `requires`, `rewrite`, `ensures`, and `atd.ir.verify` of the
    result.
    """

    name: ClassVar[str]
    scope: ClassVar[Literal["node", "block", "graph"]]
    rewrites: ClassVar[bool] = True  # False: a pass that needs "written" and only looks
    least_windows: ClassVar[int] = 0  # of calibration text, without which the pass cannot work
    _code: ClassVar[str]  # of a class that is not atd's: digest of the source it lies in
    rules: tuple[Rule, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.partition(".")[0] != OWN:
            cls._code = code_digest(cls.__module__)

    @property
    def needs(self) -> frozenset[str]:
        """Returns "activations" for a pass that reads `context.calibration`, "counts" where it also
        asks how much each token counts, "written" for a graph pass whose input must have been
        written and read again."""
        return frozenset()

    def suited(self, graph: Graph, given: Collection[str]) -> "tuple[Pass | None, str]":
        """Returns the pass as far as it can run on a model, or None, and what is left out of it.

        `atd.convert` asks before it runs a recipe.

        Args:
            graph: the model as it was opened.
            given: names of the options that the user set, which stay as they are.
        """
        return self, ""

    def requires(self, graph: Graph) -> str | None:
        """Returns why the pass cannot run on the graph, or None; looks at shapes alone."""
        return None

    def rewrite(self, *target_and_context) -> Any:
        """Returns what becomes of the target, or None for "not mine"."""
        raise NotImplementedError(f"pass {self.name!r} has no rewrite")

    def ensures(self, before: Graph, after: Graph) -> str | None:
        """Returns what the pass broke, or None."""
        return None

    def unfinished(self, graph: Graph) -> str | None:
        """Returns why no pipeline with this pass can end in the graph, or None."""
        return None

    def work(self, before: Graph, after: Graph, text: Text) -> Work:
        """Counts what the pass does, from shapes, for the time that `atd convert --plan` says.

        Args:
            before, after: the graphs in front of the pass and behind it.
            text: calibration text.
        """
        return Work()

    # --- the contract ---

    def __call__(self, graph: Graph, context: Context | None = None) -> Graph:
        """Returns the rewritten graph. Its types change now, its data when a weight is loaded.

        Raises BadInput where the pass cannot run on the graph, InvalidGraph where it breaks a rule
        of the IR.
        """
        context = Context() if context is None else context
        if reason := self.requires(graph):
            raise BadInput(f"pass {self.name}: {reason}")
        after = self._rewritten(graph, context)
        if reason := self.ensures(graph, after):
            raise InvalidGraph(f"pass {self.name} broke its own promise: {reason}")
        try:
            verify(after)
        except InvalidGraph as error:
            raise InvalidGraph(f"after pass {self.name}: {error}") from None
        return after

    def _rewritten(self, graph: Graph, context: Context) -> Graph:
        """Every target of the pass's scope rewritten."""
        if self.scope == "graph":
            return self.rewrite(graph, context) or graph
        if self.scope == "block":
            units = (self.rewrite(block, context) or block for block in graph.units)
            return graph.with_units(tuple(units))

        def rewritten(block: Block, node: Node) -> Node:
            name = block.full_name(node)
            effective = self.for_node(name)
            return (effective and effective.rewrite(name, node, context)) or node

        self._check_rules(graph)
        return map_nodes(graph, rewritten)

    def for_node(self, name: str) -> "Pass | None":
        """Returns the pass with the options that the first matching rule gives the node; None where
        it is skipped.
        """
        for rule in self.rules:
            if re.fullmatch(rule.match, name):
                return None if rule.skip else replace(self, rules=(), **dict(rule.options))
        return self

    def _check_rules(self, graph: Graph) -> None:
        """Raises BadInput for a rule that matches nothing."""
        names = [name for name, node in graph.nodes() if node.weights]
        for rule in self.rules:
            if not any(re.fullmatch(rule.match, name) for name in names):
                raise BadInput(
                    f"pass {self.name}: rule {rule.match!r} matches no node with a weight; "
                    f"names are like {names[1]!r} (the whole name must match)"
                )

    # --- options and text ---

    def options(self) -> dict[str, Any]:
        """Returns all options by name, as TOML values; rules as a list of tables."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rules"}
        rules = [
            {"match": r.match, **({"skip": True} if r.skip else {}), **dict(r.options)}
            for r in self.rules
        ]
        return values | ({"rules": rules} if rules else {})

    def __str__(self) -> str:
        return f"{self.name}{toml_value(self.options())}"


def identity(step: Pass) -> str:
    """Returns what a pass is in the keys of what it made: its text, and where it is not one of
    atd's, digests of its code.
    """
    codes = [vars(cls)["_code"] for cls in type(step).__mro__ if "_code" in vars(cls)]
    return " ".join([str(step), *codes])


def toml_value(value: Any) -> str:
    """Returns a Python value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, str) else repr(value)
