"""Passes and pipelines. A pass rewrites a graph; a pipeline is a sequence of passes.

Rewriting is lazy: a pass changes the *types* of weights at once and wraps their `load()`, so a whole pipeline is
checked on shapes (`Pipeline.__call__` on an 8B graph takes a moment and no memory), and data flows only when somebody
loads a weight, one weight at a time. A graph can therefore be executed and evaluated after each pass:
`atd.load(Pipeline([...])(atd.open(path)))`.

A third-party pass is a frozen dataclass that derives from `Pass` and is registered by its distribution under the
entry-point group `atd.passes`:

    [project.entry-points."atd.passes"]
    halve = "my_package:Halve"
"""

import importlib
import importlib.metadata
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from atd.calibration import Calibration
from atd.errors import BadInput, nearest
from atd.ir import Block, Graph, InvalidGraph, Node, verify

ENTRY_POINTS = "atd.passes"
BUILTIN = {
    "calibrate": "atd.passes.calibrate:Calibrate",
    "allocate": "atd.passes.allocate:Allocate",
    "decompose": "atd.passes.decompose:Decompose",
    "equalize": "atd.passes.equalize:Equalize",
    "fold_norms": "atd.passes.fold_norms:FoldNorms",
    "fuse": "atd.passes.fuse:Fuse",
    "pack": "atd.passes.pack:Pack",
    "rotate": "atd.passes.rotate:Rotate",
    "verify": "atd.passes.verify:Verify",
}


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
        self.figures.setdefault(node, {}).update({name: float(value) for name, value in figures.items()})


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
            after = graph.with_units(tuple(self.rewrite(block, context) or block for block in graph.units))
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
            tuple(replace(block, nodes=tuple(rewrite(block, node) for node in block.nodes)) for block in graph.units)
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
        rules = [{"match": r.match, **({"skip": True} if r.skip else {}), **dict(r.options)} for r in self.rules]
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


def parse_pass(text: str) -> Pass:
    """The pass whose text this is: `parse_pass(str(p)) == p`."""
    match = re.fullmatch(r"([\w.-]+)(\{.*\})?", text.strip(), re.DOTALL)
    if match is None:
        raise BadInput(f"not a pass: {text!r}; write e.g. decompose{{bases = 2, group = 128}}")
    try:
        options = tomllib.loads(f"options = {match[2] or '{}'}")["options"]
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"the options of {text!r} are no TOML: {error}") from None
    return make_pass(match[1], options)


# --- registry ---------------------------------------------------------------------------------------------------------


def registered() -> dict[str, str]:
    """name -> "module:class" of every pass, built in or brought by an installed distribution. A name given twice is an error."""
    known, owner = dict(BUILTIN), dict.fromkeys(BUILTIN, "atd itself")
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        distribution = point.dist.name if point.dist else "?"
        if point.name in known and known[point.name] != point.value:
            raise BadInput(
                f"pass {point.name!r} is registered twice, by {owner[point.name]} and by {distribution}; uninstall one of them"
            )
        known[point.name], owner[point.name] = point.value, distribution
    return known


def pass_class(name: str) -> type[Pass]:
    known = registered()
    if name not in known:
        raise BadInput(f"unknown pass {name!r}{nearest(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"pass {name!r} cannot be loaded from {known[name]}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Pass)) or cls.name != name:
        raise BadInput(f"{known[name]} is not a pass called {name!r}")
    return cls


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """The pass of this name with these options; unknown options and values of a wrong type are errors."""
    cls = pass_class(name)
    options = dict(options)
    rules = options.pop("rules", [])
    if not isinstance(rules, list):
        raise BadInput(f"the rules of pass {name} are a list of tables, [[passes.rules]], not {rules!r}")
    checked = {key: _checked(cls, key, value) for key, value in options.items()}
    for f in fields(cls):
        if f.name not in checked and f.default is MISSING and f.default_factory is MISSING:
            raise BadInput(f"pass {name} needs the option {f.name!r}")
    made = cls(**checked, rules=tuple(_rule(cls, rule) for rule in rules))
    for rule in made.rules:
        if not rule.skip:
            replace(
                made, rules=(), **dict(rule.options)
            )  # so that a bad value in a rule is refused now, not at its node
    return made


def _checked(cls: type[Pass], key: str, value: Any) -> Any:
    """The value as the option's annotation has it, or BadInput."""
    hints = {f.name: typing.get_type_hints(cls)[f.name] for f in fields(cls) if f.name != "rules"}
    if key not in hints:
        raise BadInput(f"pass {cls.name} has no option {key!r}{nearest(key, hints)}")
    allowed = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
    if float in allowed and type(value) is int:
        value = float(value)
    if isinstance(value, list):
        value = tuple(value)
    if type(value) not in {typing.get_origin(kind) or kind for kind in allowed}:
        wanted = " or ".join(kind.__name__ for kind in allowed)
        raise BadInput(f"{cls.name}.{key} must be {wanted}, not {value!r}")
    return value


def _rule(cls: type[Pass], table: Any) -> Rule:
    if cls.scope != "node":
        raise BadInput(f"pass {cls.name} works on whole {cls.scope}s and takes no rules")
    if not isinstance(table, dict) or not isinstance(table.get("match"), str):
        raise BadInput(f"a rule of pass {cls.name} is a table with match = 'regex' and options, not {table!r}")
    options = dict(table)
    match, skip = options.pop("match"), options.pop("skip", False)
    try:
        re.compile(match)
    except re.error as error:
        raise BadInput(f"rule {match!r} of pass {cls.name} is no regular expression: {error}") from None
    if skip and options:
        raise BadInput(f"rule {match!r} of pass {cls.name} skips its nodes and so takes no other option")
    return Rule(match, bool(skip), tuple((key, _checked(cls, key, value)) for key, value in options.items()))


# --- pipelines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes; itself a function of graphs. `str()` is one pass a line."""

    passes: tuple[Pass, ...]

    def __init__(self, passes):
        object.__setattr__(self, "passes", tuple(parse_pass(p) if isinstance(p, str) else p for p in passes))

    @property
    def calibrated(self) -> bool:
        """A pass asks for calibration activations."""
        return any("activations" in step.needs for step in self.passes)

    def __call__(self, graph: Graph, context: Context | None = None) -> Graph:
        """The graph after all passes. Types change now, data on load(). Passes that re-read written files are left to `atd.convert`."""
        context = Context() if context is None else context
        for step in self.passes:
            if "written" not in step.needs:
                graph = step(graph, context)
        return graph

    def preflight(self, graph: Graph) -> Graph:
        """Refuses, before any weight is read, what cannot work; returns the graph as it will be."""
        context = Context(say=lambda line: None)
        for step in self.passes:
            if "written" not in step.needs:
                graph = step(graph, context)
            elif reason := step.requires(graph):
                raise BadInput(f"pass {step.name}: {reason}")
        for step in self.passes:
            if reason := step.unfinished(graph):
                raise BadInput(f"pass {step.name}: {reason}")
        return graph

    def sweeps(self) -> list[tuple[tuple[Pass, ...], tuple[Pass, ...]]]:
        """Cut into sweeps: (passes carried out unit by unit, then the passes that read what the sweep wrote)."""
        sweeps: list[tuple[list[Pass], list[Pass]]] = [([], [])]
        for step in self.passes:
            written = "written" in step.needs
            if not written and sweeps[-1][1]:
                sweeps.append(([], []))
            sweeps[-1][written].append(step)
        if any(step.rewrites for step in sweeps[-1][1]):
            sweeps.append(([], []))  # what they make is still to be written
        return [(tuple(passes), tuple(after)) for passes, after in sweeps]

    def __str__(self) -> str:
        return "\n".join(map(str, self.passes))
