"""Rewrites of nodes and references that several passes share."""

from dataclasses import replace

import numpy as np

from atd.ir.graph import Node, WeightRef
from atd.weights import DTYPES, Dense


def dense_array(ref: WeightRef) -> np.ndarray:
    """The data of a reference, loaded now and dequantized: float32, in the shape of its type."""
    return np.asarray(ref.load().dequantize(np.float32))


def unit_gain(norm: Node) -> Node:
    """The norm with a gain of ones, and marked so."""
    ref = norm.weights["weight"]
    ones = replace(ref, load=lambda: Dense(np.ones(ref.type.shape, DTYPES[ref.type.dtype])))
    return replace(norm, weights={"weight": ones}, attrs=norm.attrs | {"unit_gain": True})
