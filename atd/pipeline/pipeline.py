"""Pipelines: sequences of passes."""

from dataclasses import dataclass

from atd.errors import BadInput
from atd.ir import Graph
from atd.pipeline.base import Context, Pass
from atd.pipeline.registry import parse_pass


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes; itself a function of graphs. `str()` is one pass a line."""

    passes: tuple[Pass, ...]

    def __init__(self, passes):
        object.__setattr__(
            self, "passes", tuple(parse_pass(p) if isinstance(p, str) else p for p in passes)
        )

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
