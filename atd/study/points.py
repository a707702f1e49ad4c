"""Builds the grid of a study: the Cartesian product of recipes and values of options."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atd.errors import BadInput, nearest
from atd.pipeline.base import identity
from atd.pipeline.recipe import Recipe, read_recipe, with_overrides
from atd.progress import Say
from atd.study.results import short_options

# Commas within quotes and brackets belong to the value.
_VALUE = r"""(?:'[^']*'|"[^"]*"|\[[^]]*\]|[^,'"\[])+"""


@dataclass(frozen=True)
class Point:
    """A point of the grid: a recipe with values put in."""

    name: str  # of the recipe
    values: dict[str, str]  # the varied pass.option -> its value
    recipe: Recipe  # with these values

    @property
    def digest(self) -> str:
        """sha256 of the resolved recipe without its description, and of the code of passes that are
        not atd's: equal ones mean equal weights.
        """
        passes = self.recipe.pipeline.passes
        codes = [code for step in passes if (code := identity(step).removeprefix(str(step)))]
        return digest_of(replace(self.recipe, description="").to_toml(), *codes)

    @property
    def label(self) -> str:
        """What people call it: "datafree2 bases=3 group=64"."""
        return " ".join(
            [
                self.name,
                *(f"{short}={self.values[o]}" for o, short in short_options(self.values).items()),
            ]
        )

    @property
    def calibrated(self) -> bool:
        """Whether one of its passes reads calibration text."""
        return self.recipe.pipeline.calibrated


def grid(recipes: Sequence[str], vary: Sequence[str] = (), say: Say = print) -> list[Point]:
    """Combines every recipe with every combination of values.

    Points that resolve to the same recipe are merged into the first, which `say` hears of.

    Args:
      recipes: names, or paths of .toml files.
      vary: the values of options, each "pass.option=value,value,...".

    Raises BadInput for no recipe, a `vary` of another form or given twice, a pass that a recipe
    does not have, and options and values that do not exist.
    """
    if not recipes:
        raise BadInput("a study needs at least one recipe: --recipe adaptive --recipe datafree2")
    axes = dict(map(_axis, vary))
    if len(axes) < len(vary):
        raise BadInput(
            f"--vary names an option twice; give all its values at once: {', '.join(vary)}"
        )
    stems = [Path(given).stem for given in dict.fromkeys(recipes)]
    found: dict[str, Point] = {}
    for given in dict.fromkeys(recipes):
        recipe = read_recipe(given)
        name = (
            Path(given).stem if stems.count(Path(given).stem) == 1 else given.removesuffix(".toml")
        )
        passes = {step.name for step in recipe.pipeline.passes}
        for option in axes:
            if (wanted := option.partition(".")[0]) not in passes:
                raise BadInput(
                    f"--vary {option}: recipe {name} has no pass {wanted!r}"
                    f"{nearest(wanted, passes)}"
                )
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            try:
                resolved = with_overrides(
                    recipe, [f"{option}={value}" for option, value in chosen.items()]
                )
            except BadInput as error:
                raise BadInput(f"recipe {name} with {_assignments(chosen)}: {error}") from None
            point = Point(name, {option: value_in(resolved, option) for option in chosen}, resolved)
            if (same := found.setdefault(point.digest, point)) is not point:
                say(f"{point.label} is {same.label}: done once")
    return list(found.values())


def _axis(text: str) -> tuple[str, list[str]]:
    """Splits "pass.option=value,value" into the option and its values."""
    option, equals, values = text.partition("=")
    option = option.strip()
    if not (
        equals
        and re.fullmatch(r"\w+\.\w+", option)
        and re.fullmatch(f"{_VALUE}(?:,{_VALUE})*", values)
    ):
        raise BadInput(
            f"--vary {text!r} is not of the form pass.option=value,value, "
            "e.g. decompose.bases=1,2,3"
        )
    found = [value.strip() for value in re.findall(_VALUE, values)]
    if not all(found):
        raise BadInput(f"--vary {text!r} has an empty value")
    return option, found


def value_in(recipe: Recipe, option: str) -> str:
    """Returns what pass.option is in a recipe, as text; "" where the recipe has no such pass."""
    name, _, key = option.partition(".")
    found = [step.options().get(key) for step in recipe.pipeline.passes if step.name == name]
    if not found or found[0] is None:
        return ""
    return str(found[0]).lower() if isinstance(found[0], bool) else str(found[0])


def _assignments(values: dict[str, str]) -> str:
    return ", ".join(f"{option}={value}" for option, value in values.items())


def digest_of(*parts: str) -> str:
    """Returns a sha256 of texts; where one ends and the next begins counts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
