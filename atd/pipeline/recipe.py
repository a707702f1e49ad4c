"""Recipes: TOML files that name a pipeline and its options. Unknown keys are errors with the
nearest known name.

description = "what it is for"
[[passes]]
name = "decompose"
bases = 2
[[passes.rules]]
match = 'model\\.layers\\.0\\..*'
bases = 3"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from atd.errors import BadInput, nearest
from atd.ir import Graph
from atd.pipeline.base import toml_value
from atd.pipeline.pipeline import Pipeline
from atd.pipeline.registry import make_pass
from atd.progress import Say

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Recipe:
    """A pipeline and its setting.

    `seed` feeds whatever a pass draws at random. `nonfinite` says what becomes of NaN and Inf
    weights: "refuse" or "zero".
    """

    pipeline: Pipeline
    description: str = ""
    seed: int = 0
    nonfinite: str = "refuse"
    # Texts for calibrated passes: files, or what the model itself writes.
    calibration: tuple[str, ...] = ("self",)
    calibration_tokens: int = 32768  # of all texts together, from their beginnings
    calibration_context: int = 512  # a window, or the model's context where that is shorter
    # SHA-256 of the tokens, in the recipe of a converted model: other text is refused.
    calibration_sha256: str = ""
    # "pass.option" of what overrides said: `suited` leaves it as it is.
    overridden: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self):
        if self.seed < 0:
            raise BadInput(f"seed must be 0 or more, not {self.seed}")
        if self.nonfinite not in ("refuse", "zero"):
            raise BadInput(f"nonfinite must be 'refuse' or 'zero', not {self.nonfinite!r}")
        if not self.calibration or not all(
            isinstance(text, str) and text for text in self.calibration
        ):
            raise BadInput(
                f"calibration must be a list of texts, or ['self'], not {list(self.calibration)!r}"
            )
        if self.calibration_tokens < 1 or self.calibration_context < 2:
            raise BadInput(
                "calibration_tokens must be at least 1 and calibration_context at least 2"
            )

    def to_toml(self) -> str:
        """Returns the recipe as TOML with every option spelled out; read back, it is equal."""
        lines = [
            f"{f.name} = {toml_value(getattr(self, f.name))}"
            for f in fields(self)
            if f.name in _keys()
        ]
        for step in self.pipeline.passes:
            options = step.options()
            rules = options.pop("rules", [])
            lines += [
                "",
                "[[passes]]",
                f'name = "{step.name}"',
                *(f"{key} = {toml_value(value)}" for key, value in options.items()),
            ]
            for rule in rules:
                lines += [
                    "",
                    "[[passes.rules]]",
                    *(f"{key} = {toml_value(value)}" for key, value in rule.items()),
                ]
        return "\n".join(lines) + "\n"


def _keys() -> list[str]:
    """The keys of a recipe beside its passes."""
    return [f.name for f in fields(Recipe) if f.name not in ("pipeline", "overridden")]


def recipe_names() -> list[str]:
    """Lists the recipes that come with atd."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def read_recipe(name_or_file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the recipe of this name (see `recipe_names`) or in this file.

    Args:
        overrides: "pass.option=value" each, put in its place.

    Raises:
        BadInput: there is no such recipe, or something in it is unknown or of a wrong type.
    """
    path = Path(name_or_file)
    if str(name_or_file) in recipe_names():
        path = CONFIGS / f"{name_or_file}.toml"
    elif not path.is_file():
        raise BadInput(
            f"no recipe {str(name_or_file)!r}{nearest(str(name_or_file), recipe_names())} "
            "(or the path of a .toml file)"
        )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a TOML file: {error}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return _recipe(data, overrides)
    except BadInput as error:
        raise BadInput(f"recipe {path.name}: {error}") from None


def under_budget(
    name_or_file: str | Path,
    overrides: Sequence[str] = (),
    *,
    bits: float | None = None,
    budget: str | None = None,
) -> Recipe:
    """Reads a recipe and sets the budget that its pass `allocate` spends.

    With `budget` a tied embedding is quantized too, and so rotated as well, unless overrides say
    otherwise.

    Args:
        bits: per weight, average over the decoder's linears.
        budget: bytes of the whole checkpoint, such as "3.9GB". Without both the recipe's own holds.

    Raises:
        BadInput: as `read_recipe`, for both at once, and for a recipe without `allocate`.
    """
    if bits is None and budget is None:
        return read_recipe(name_or_file, overrides)
    if bits is not None and budget is not None:
        raise BadInput("--bits and --budget are two ways to say one thing; give one of them")
    names = {step.name for step in read_recipe(name_or_file).pipeline.passes}
    if "allocate" not in names:
        given = "bits" if budget is None else "budget"
        raise BadInput(
            f"--{given} needs the allocate pass, which recipe {name_or_file} does not have; "
            "adaptive does"
        )
    rotated = ["rotate.embedding=true"] if budget is not None and "rotate" in names else []
    shared_out = [f"allocate.bits={bits or 0.0}", f"allocate.budget={budget or ''!r}"]
    return read_recipe(name_or_file, [*rotated, *overrides, *shared_out])


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Returns the recipe with overrides "pass.option=value" put in.

    An override applies to every pass of its name.
    """
    if not overrides:
        return recipe
    changed = _recipe(tomllib.loads(recipe.to_toml()), overrides)
    overridden = recipe.overridden | changed.overridden
    return replace(recipe, pipeline=changed.pipeline, overridden=overridden)


def suited(recipe: Recipe, graph: Graph, say: Say) -> Recipe:
    """Returns the recipe with its passes as far as they can run on a model.

    Args:
        graph: the model as it was opened.
        say: hears what is left out.
    """
    steps = []
    for step in recipe.pipeline.passes:
        names = (name.partition(".") for name in recipe.overridden)
        able, reason = step.suited(graph, {key for name, _, key in names if name == step.name})
        if reason:
            say(f"note: {reason}")
        steps += [] if able is None else [able]
    return replace(recipe, pipeline=Pipeline(steps))


def _recipe(data: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    known = [*_keys(), "passes"]
    for key in data:
        if key not in known:
            raise BadInput(f"unknown key {key!r}{nearest(key, known)}")
    kinds = {
        "description": str,
        "nonfinite": str,
        "passes": list,
        "calibration": list,
        "calibration_sha256": str,
    }
    for key in data:
        kind = kinds.get(key, int)
        if type(data[key]) is not kind:
            raise BadInput(f"{key} must be {kind.__name__}, not {data[key]!r}")
    tables = data.get("passes", [])
    if not tables:
        raise BadInput("it has no passes; add a table [[passes]] with name = 'decompose'")
    for table in tables:
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            raise BadInput(f"a pass is a table with name = 'decompose' and options, not {table!r}")
    overridden = frozenset(_override(tables, override) for override in overrides)
    passes = [
        make_pass(table["name"], {key: value for key, value in table.items() if key != "name"})
        for table in tables
    ]
    options: dict[str, Any] = {key: value for key, value in data.items() if key != "passes"}
    if "calibration" in options:
        options["calibration"] = tuple(options["calibration"])
    return Recipe(Pipeline(passes), **options, overridden=overridden)


def _override(tables: list[dict[str, Any]], override: str) -> str:
    """Puts `pass.option=value` into the tables, the value TOML or a plain word; "pass.option"."""
    target, equals, text = override.partition("=")
    name, dot, option = target.strip().partition(".")
    if not (equals and dot and name and option):
        raise BadInput(
            f"--set {override!r} is not of the form pass.option=value, e.g. decompose.bases=3"
        )
    matching = [table for table in tables if table["name"] == name]
    if not matching:
        raise BadInput(
            f"--set {override!r}: the recipe has no pass {name!r}"
            f"{nearest(name, {t['name'] for t in tables})}"
        )
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    for table in matching:
        table[option] = value
    return f"{name}.{option}"
