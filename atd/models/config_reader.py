"""Reads typed values of a JSON object such as a config.json, with errors that name the key."""

import math
from dataclasses import dataclass

from atd.errors import BadInput


@dataclass(frozen=True)
class ConfigReader:
    """Reads typed values of a JSON object. An absent or null key has the default or is an error.

    All methods that read raise BadInput for a value of another kind.
    """

    values: dict
    origin: str  # what messages name
    place: str = "config.json"  # likewise, in the origin

    def error(self, what: str) -> BadInput:
        """Returns the error that says `what` is wrong here."""
        return BadInput(f"{self.origin}: {self.place}: {what}")

    def _value(self, key: str, default, kind: str, valid):
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing; expected {kind}")
        if not valid(value):
            raise self.error(f"{key} is {value!r}; expected {kind}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Returns a positive integer."""
        return self._value(key, default, "a positive integer", lambda v: type(v) is int and v > 0)

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a positive number."""
        return float(self._value(key, default, "a positive number", _is_positive))

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """Returns a list of this many positive numbers."""

        def valid(value) -> bool:
            return (
                isinstance(value, list) and len(value) == length and all(map(_is_positive, value))
            )

        kind = f"a list of {length} positive numbers"
        return tuple(map(float, self._value(key, None, kind, valid)))

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns true or false."""
        return self._value(key, default, "true or false", lambda v: type(v) is bool)


def _is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
