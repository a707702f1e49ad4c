"""Checks the values of options. Each function raises BadInput naming the option, its value and what
it may be.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

from atd.errors import BadInput, nearest

LEAST_GROUP = 32
_DTYPES = ("f32", "f16", "bf16")


def check_known(option: str, value: str, known: Iterable[str]) -> None:
    """Checks that the value is one of `known`."""
    if value not in (known := list(known)):
        raise BadInput(f"{option} {value!r} is unknown{nearest(value, known)}")


def check_finite(option: str, value: Any) -> None:
    """Checks that no number of the value, which may be a list or a table, is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{option} must be a finite number, not {value}")
    if isinstance(value, dict):
        for key, part in value.items():
            check_finite(f"{option}.{key}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            check_finite(option, part)


def check_dtype(option: str, value: str) -> None:
    """Checks that the value is a dtype that weights and scales are stored in."""
    check_known(option, value, _DTYPES)


def check_pattern(option: str, pattern: str) -> None:
    """Checks that the value is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise BadInput(f"{option} {pattern!r} is no regular expression: {error}") from None


def check_group(option: str, value: Any) -> None:
    """Checks that the value is a group size, "row" or "tensor"."""
    if value not in ("row", "tensor") and not _is_group_size(value):
        raise BadInput(
            f"{option} must be a size of at least {LEAST_GROUP}, 'row' or 'tensor', not {value!r}"
        )


def check_groups(option: str, values: tuple) -> None:
    """Checks that there is at least one value, and that each is a group size or "row"."""
    if not values or not all(value == "row" or _is_group_size(value) for value in values):
        raise BadInput(
            f"{option} must be sizes of at least {LEAST_GROUP}, or 'row', not {list(values)}"
        )


def check_bases(option: str, values: tuple, more: Iterable[float] = ()) -> None:
    """Checks that there is at least one value, and that each is 1 to 4 or one of `more`."""
    known = sorted({1, 2, 3, 4, *more})
    if not values or not all(type(n) in (int, float) and n in known for n in values):
        raise BadInput(
            f"{option} must be some of {', '.join(f'{n:g}' for n in known)}, not {list(values)}"
        )


def _is_group_size(value: Any) -> bool:
    return type(value) is int and value >= LEAST_GROUP
