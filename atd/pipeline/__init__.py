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

from atd.pipeline.base import Pass, Rule, toml_value
from atd.pipeline.checks import check_pattern
from atd.pipeline.context import Context, Figures
from atd.pipeline.pipeline import Pipeline, Stage
from atd.pipeline.registry import ENTRY_POINTS, make_pass, parse_pass, pass_class, registered
