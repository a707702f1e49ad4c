"""Weights of checkpoints as those of graphs, and back, for families that have other ones.

Gemma      gains 1 + w, times a factor       (`atd.models.gemma`)
Granite    weights times a factor            (`atd.models.granite`)
"""

from typing import NamedTuple

import numpy as np

from atd.ir import WeightRef
from atd.ir.rewrite import map_array
from atd.models.config import GEMMAS, GRANITE, ModelConfig
from atd.models.gemma import gain_factor
from atd.models.granite import weight_factor


class Fold(NamedTuple):
    """A graph has (w + plus) * factor for the stored w."""

    plus: int
    factor: float


def fold_of(model: ModelConfig, tensor: str) -> Fold | None:
    """Returns how the weight of a graph differs from the stored one; None where it does not."""
    plus, factor = 0, None
    if model.model_type in GEMMAS:
        plus, factor = 1, gain_factor(model, tensor)
    elif model.model_type == GRANITE:
        factor = weight_factor(model, tensor)
    return None if factor is None else Fold(plus, factor)


def graph_weight(model: ModelConfig, ref: WeightRef) -> WeightRef:
    """Returns the weight that a graph has, in f32, of a stored one; or that one itself."""
    if (fold := fold_of(model, ref.tensor)) is None:
        return ref
    plus, factor = fold
    added = f" + {plus}" if plus else ""
    source = f"{ref.source}{added}, times {factor!r}" if ref.source else ""
    return map_array(ref, "f32", lambda stored: (stored + plus) * factor, source)


def stored_array(model: ModelConfig, tensor: str, array: np.ndarray) -> np.ndarray:
    """Returns what transformers has for the weight of a graph: inverts `graph_weight`.

    Args:
        model: the config.
        tensor: the name that transformers has for the weight.
        array: its values in the graph, or some rows of them.
    """
    fold = fold_of(model, tensor)
    return array if fold is None else array / np.float32(fold.factor) - np.float32(fold.plus)
