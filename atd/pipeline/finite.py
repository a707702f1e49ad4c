"""Refuses or replaces NaN and Inf in the weights of a checkpoint."""

from dataclasses import replace

import numpy as np

from atd.errors import BadInput
from atd.ir import Graph, WeightRef
from atd.progress import Say
from atd.weights import Dense, DenseType


def finite(graph: Graph, nonfinite: str, say: Say) -> Graph:
    """Returns the graph whose dense weights are checked as they are loaded.

    Args:
      nonfinite: "refuse" (loading NaN or Inf raises BadInput naming tensor and place) or "zero"
        (they become 0, with a warning).
    """

    def checked(ref: WeightRef) -> WeightRef:
        if not isinstance(ref.type, DenseType):
            return ref

        def load() -> Dense:
            weight = ref.load()
            assert isinstance(weight, Dense)
            array = np.asarray(weight.array)
            finite = np.isfinite(array)
            if finite.all():
                return weight
            place, count = np.argwhere(~finite)[0].tolist(), int((~finite).sum())
            found = f"{ref.tensor} holds {count} NaN or Inf values, the first at {place}"
            if nonfinite == "refuse":
                raise BadInput(
                    f"{found}; the checkpoint is damaged. "
                    "To convert it with zeros in their place: --nonfinite zero"
                )
            say(f"warning: {found}; replaced by 0")
            return Dense(np.where(finite, array, np.zeros((), array.dtype)))

        return replace(ref, load=load)

    return graph.with_units(tuple(unit.map_weights(checked) for unit in graph.units))
