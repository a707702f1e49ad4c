"""The registry of passes: finds classes by name, and makes passes from text or options."""

import importlib
import importlib.metadata
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from atd.errors import BadInput, nearest
from atd.pipeline import checks
from atd.pipeline.base import Pass, Rule

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


def parse_pass(text: str) -> Pass:
    """Returns the pass whose text this is: `parse_pass(str(p)) == p`."""
    match = re.fullmatch(r"([\w.-]+)(\{.*\})?", text.strip(), re.DOTALL)
    if match is None:
        raise BadInput(f"not a pass: {text!r}; write e.g. decompose{{bases = 2, group = 128}}")
    try:
        options = tomllib.loads(f"options = {match[2] or '{}'}")["options"]
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"the options of {text!r} are no TOML: {error}") from None
    return make_pass(match[1], options)


def registered() -> dict[str, str]:
    """Maps the name of every pass, built in or of an installed distribution, to "module:class".

    Raises BadInput for a name that is registered twice.
    """
    known, owner = dict(BUILTIN), dict.fromkeys(BUILTIN, "atd itself")
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        distribution = point.dist.name if point.dist else "?"
        if point.name in known and known[point.name] != point.value:
            raise BadInput(
                f"pass {point.name!r} is registered twice, by {owner[point.name]} and by "
                f"{distribution}; uninstall one of them"
            )
        known[point.name], owner[point.name] = point.value, distribution
    return known


def pass_class(name: str) -> type[Pass]:
    """Imports the class of the pass of this name. Raises BadInput where that cannot be done."""
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
    """Makes the pass of this name with these options.

    Raises BadInput for unknown options and values of a wrong type.
    """
    cls = pass_class(name)
    options = dict(options)
    rules = options.pop("rules", [])
    if not isinstance(rules, list):
        raise BadInput(
            f"the rules of pass {name} are a list of tables, [[passes.rules]], not {rules!r}"
        )
    checked = {key: _checked(cls, key, value) for key, value in options.items()}
    for f in fields(cls):
        if f.name not in checked and f.default is MISSING and f.default_factory is MISSING:
            raise BadInput(f"pass {name} needs the option {f.name!r}")
    made = cls(**checked, rules=tuple(_rule(cls, rule) for rule in rules))
    for rule in made.rules:
        if not rule.skip:
            # So that a bad value in a rule is refused now, not at its node.
            replace(made, rules=(), **dict(rule.options))
    check_finite_options(made)
    return made


def check_finite_options(step: Pass) -> None:
    """Raises BadInput for a pass with an option that is NaN or infinite."""
    for option, value in step.options().items():
        checks.check_finite(f"{step.name}.{option}", value)


def _checked(cls: type[Pass], key: str, value: Any) -> Any:
    """The value as the option's annotation has it, or BadInput."""
    hints = {f.name: typing.get_type_hints(cls)[f.name] for f in fields(cls) if f.name != "rules"}
    if key not in hints:
        raise BadInput(f"pass {cls.name} has no option {key!r}{nearest(key, hints)}")
    allowed = (
        typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
    )
    if float in allowed and int not in allowed and type(value) is int:
        value = float(value)
    if isinstance(value, list):
        value = tuple(value)
    if type(value) not in {typing.get_origin(kind) or kind for kind in allowed}:
        wanted = " or ".join(kind.__name__ for kind in allowed)
        raise BadInput(f"{cls.name}.{key} must be {wanted}, not {value!r}")
    return value


def _rule(cls: type[Pass], table: Any) -> Rule:
    """The rule that a table of a recipe describes, or BadInput."""
    if cls.scope != "node":
        raise BadInput(f"pass {cls.name} works on whole {cls.scope}s and takes no rules")
    if not isinstance(table, dict) or not isinstance(table.get("match"), str):
        raise BadInput(
            f"a rule of pass {cls.name} is a table with match = 'regex' and options, not {table!r}"
        )
    options = dict(table)
    match, skip = options.pop("match"), options.pop("skip", False)
    try:
        re.compile(match)
    except re.error as error:
        raise BadInput(
            f"rule {match!r} of pass {cls.name} is no regular expression: {error}"
        ) from None
    if skip and options:
        raise BadInput(
            f"rule {match!r} of pass {cls.name} skips its nodes and so takes no other option"
        )
    return Rule(
        match, bool(skip), tuple((key, _checked(cls, key, value)) for key, value in options.items())
    )
