"""Pipelines: sequences of passes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from atd.errors import BadInput
from atd.ir import Graph
from atd.pipeline.base import Pass
from atd.pipeline.context import Context
from atd.pipeline.registry import check_finite_options, parse_pass


class Stage(NamedTuple):
    """A part of a pipeline that ends where the model is written."""

    passes: tuple[Pass, ...]  # carried out unit by unit
    after: tuple[Pass, ...]  # read the model as it was written


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes, given as passes or as their text, and itself a function of graphs.

    `str()` gives one pass per line.
    """

    passes: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass | str]):
        made = tuple(parse_pass(p) if isinstance(p, str) else p for p in passes)
        for step in made:
            check_finite_options(step)
        object.__setattr__(self, "passes", made)

    @property
    def calibrated(self) -> bool:
        """Whether a pass asks for calibration activations."""
        return any("activations" in step.needs for step in self.passes)

    @property
    def counts_tokens(self) -> bool:
        """Whether a pass asks how much each token of the calibration text counts."""
        return any("counts" in step.needs for step in self.passes)

    def __call__(self, graph: Graph, context: Context | None = None) -> Graph:
        """Returns the graph as all passes leave it, but for those that need written files, which
        `atd.convert` runs.

        Types change now, data when a weight is loaded.
        """
        for step in self.passes:
            if "written" not in step.needs:
                graph = step(graph, context)
        return graph

    def preflight(self, graph: Graph) -> Graph:
        """Returns the graph that the pipeline would make, on shapes alone.

        Raises BadInput, before any weight is read, for what cannot work.
        """
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

    def stages(self) -> list[Stage]:
        """Returns the pipeline cut into stages: a pass behind one that needs written files begins a
        new one.
        """
        stages = [Stage((), ())]
        for step in self.passes:
            passes, after = stages[-1]
            if "written" in step.needs:
                stages[-1] = Stage(passes, (*after, step))
            elif after:
                stages.append(Stage((step,), ()))
            else:
                stages[-1] = Stage((*passes, step), ())
        if any(step.rewrites for step in stages[-1].after):
            stages.append(Stage((), ()))  # what they make is still to be written
        return stages

    def __str__(self) -> str:
        return "\n".join(map(str, self.passes))
