"""Rewrites graphs. A pass rewrites a graph; a pipeline is a sequence of passes.

Rewriting is lazy: a pass changes the *types* of weights at once and wraps their `load()`, so that a
whole pipeline is checked on shapes (`Pipeline.__call__` on an 8B graph takes a moment and no
memory). Data flow only when a weight is loaded, one weight at a time. A graph can therefore be
executed and evaluated after each pass: `atd.load(Pipeline([...])(atd.open(path)))`.

A third-party pass is a frozen dataclass that derives from `Pass`. Its distribution registers it
under the entry-point group `atd.passes`:

    [project.entry-points."atd.passes"]
    halve = "my_package:Halve"
"""

from atd.pipeline.base import Pass, Rule, toml_value
from atd.pipeline.checks import check_pattern
from atd.pipeline.context import Context, Figures
from atd.pipeline.pipeline import Pipeline, Stage
from atd.pipeline.registry import ENTRY_POINTS, make_pass, parse_pass, pass_class, registered
