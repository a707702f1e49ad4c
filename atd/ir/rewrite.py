"""Rewrites of nodes and references that several passes share."""

from dataclasses import replace

import numpy as np

from atd.ir.graph import Node
from atd.weights import DTYPES, Dense


def unit_gain(norm: Node) -> Node:
    """The norm with a gain of ones, and marked so."""
    ref = norm.weights["weight"]
    ones = replace(ref, load=lambda: Dense(np.ones(ref.type.shape, DTYPES[ref.type.dtype])))
    return replace(norm, weights={"weight": ones}, attrs=norm.attrs | {"unit_gain": True})
