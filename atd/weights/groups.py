"""Groups of inputs that share a scale, for numpy and jax arrays alike.

Group k of a row is its inputs k size to (k + 1) size - 1; the last one may hold fewer.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np


def namespace(array) -> ModuleType:
    """Returns the module whose functions take this array: `jax.numpy` or `numpy`."""
    return jnp if isinstance(array, jax.Array) else np


def pad_inputs(array, multiple: int):
    """Appends zeros to axis 1 of [rows, in, ...] until its length is a multiple."""
    short = -array.shape[1] % multiple
    if not short:
        return array
    return namespace(array).pad(array, [(0, 0), (0, short)] + [(0, 0)] * (array.ndim - 2))


def group_inputs(array, size: int):
    """Cuts axis 1 into groups, [rows, in, ...] -> [rows, groups, size, ...].

    Zeros fill a last group that is not whole.
    """
    return pad_inputs(array, size).reshape(len(array), -1, size, *array.shape[2:])


def spread_scales(scales, size: int, inputs: int):
    """Repeats the scale of each group for each of its inputs: [rows, groups] -> [rows, inputs].

    A single group per row stays [rows, 1], which broadcasts.

    Args:
        scales: [rows, groups].
        size: inputs per group.
        inputs: inputs per row; those beyond the last group (padding) have scale 0.
    """
    if scales.shape[1] == 1:
        return scales
    xp = namespace(scales)
    short = -(-inputs // size) - scales.shape[1]
    padded = xp.pad(scales, ((0, 0), (0, short))) if short > 0 else scales
    return xp.repeat(padded, size, axis=1)[:, :inputs]
