"""Rewrites of nodes that several passes share."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from atd.ir.graph import Node
from atd.weights import DTYPES, Dense


def unit_gain(norm: Node) -> Node:
    """Returns the norm with a gain of ones, and marks it so by the attr `unit_gain`."""
    ref = norm.weights["weight"]
    ones = replace(ref, load=lambda: Dense(np.ones(ref.type.shape, DTYPES[ref.type.dtype])))
    return replace(norm, weights={"weight": ones}, attrs=norm.attrs | {"unit_gain": True})


def slices(value: str, widths: Mapping[str, int]) -> list[Node]:
    """Returns the nodes that cut a value into features side by side, by name and width."""
    nodes, start = [], 0
    for name, width in widths.items():
        nodes.append(Node(name, "slice", (value,), attrs={"start": start, "stop": start + width}))
        start += width
    return nodes
