"""The context of a pass: what it may read besides the graph, and where it reports to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from atd.calibration.streams import Calibration
from atd.checkpoint.cache import Cache
from atd.ir import Graph
from atd.progress import Report, Say, unheard


class Record(Protocol):
    """Takes figures of a node, by the node's full name: record("model.embed_tokens", error=0.1)."""

    def __call__(self, node: str, /, **figures: float) -> None: ...


def unrecorded(node: str, /, **figures: float) -> None:
    """Drops the figures: for callers that write no report."""


class Figures(dict[str, dict[str, float]]):
    """Figures of nodes by full name. Its owner hands out `record` and reads what has come in."""

    def record(self, node: str, /, **figures: float) -> None:
        """Adds figures of a node to those that are there."""
        found = {name: float(value) for name, value in figures.items()}
        self[node] = self.get(node, {}) | found


@dataclass(frozen=True)
class Context:
    """Inputs of passes that do not change while they run, and three sinks that passes write to and
    never read.

    Inputs:
      seed: of whatever is drawn at random.
      feature_weights: importance of each input feature of a node, float32 [in], by full name;
        `decompose` weights its errors with them.
      calibration: text, and second moments of what reaches each linear; given to passes that need
          "activations".
      dense: the model in front of the first pass that changes its function; given to passes that
          need "written".
      written_digests: sha256 of each stored tensor as it was in memory when it was written;
          likewise.
      passes: the passes that the graph has been through since it was read, as `identity` has
          them: text and code; None: not known.
      cache: arrays that other runs over the same model can use again, or None.

    Sinks:
      say: lines for people.
      progress: how far a long pass is.
      record: figures of a node for report.json. Passes that wrap `load()` call it when the weight
          is loaded.
    """

    seed: int = 0
    feature_weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    calibration: Calibration | None = None
    dense: Graph | None = None
    written_digests: Mapping[str, str] = field(default_factory=dict)
    passes: tuple[str, ...] | None = None
    cache: Cache | None = None
    say: Say = print
    progress: Report = unheard
    record: Record = unrecorded
