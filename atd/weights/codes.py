"""Trellis codes: how trits of several rows make a weight together. A code is its taps; its text is
its storage form.
"""

import math
import re
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from atd.weights.groups import namespace

_NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_TEXT = re.compile(rf"{_NUMBER}(?:[,|/]{_NUMBER})*")


@dataclass(frozen=True)
class Code:
    """`taps[p][i][j]` is what trit i of a row of phase p adds to the value of the row j below it.

    Rows repeat after `period` phases, the rows of a segment begin with phase 0, and behind the last
    row of a segment comes its first (tail-biting). With L rows per segment, q = (o - j) mod L and p
    = q mod period,

        w[o, k] = s[o] sum_(j, i) taps[p][i][j] t_i[q, k].

    A row of phase p has len(taps[p]) trits; their mean is N. The text of a code lists phases
    between "/", trits between "|" and taps between ",": `parse_code(str(code)) == code`.
    """

    taps: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self):
        numbers = [tap for phase in self.taps for trit in phase for tap in trit]
        if (
            not numbers
            or not all(trit for phase in self.taps for trit in phase)
            or not all(self.taps)
        ):
            raise ValueError(
                "a trellis code needs at least one trit in each phase and a tap for each trit"
            )
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"the taps of a trellis code must be finite numbers, not {self.taps}")

    @property
    def period(self) -> int:
        """Rows after which the pattern of trits repeats."""
        return len(self.taps)

    @property
    def trits(self) -> int:
        """Trits that the rows of a period hold together."""
        return sum(map(len, self.taps))

    @property
    def first(self) -> tuple[int, ...]:
        """Where the trits of each phase begin among those of a period."""
        return tuple(accumulate(map(len, self.taps[:-1]), initial=0))

    @property
    def bases(self) -> float:
        """N: trits per weight."""
        return self.trits / self.period

    @property
    def memory(self) -> int:
        """Rows below its own in which a trit counts, at most."""
        return max(len(trit) for phase in self.taps for trit in phase) - 1

    def __str__(self) -> str:
        return "/".join(
            "|".join(",".join(map(_text, trit)) for trit in phase) for phase in self.taps
        )


def _text(tap: float) -> str:
    return repr(float(tap)).removesuffix(".0")


def parse_code(text: str) -> Code:
    """Reads the code whose text this is. Raises ValueError for text that is no code."""
    if not _TEXT.fullmatch(text):
        raise ValueError(f"not a trellis code that this version of atd knows: {text!r}")
    return Code(
        tuple(
            tuple(tuple(float(tap) for tap in trit.split(",")) for trit in phase.split("|"))
            for phase in text.split("/")
        )
    )


def values_of(trits, code: Code, length: int):
    """Rebuilds values in units of the scale: sum_(j, i) a[p, i, j] t_i[q], summed by age j, then by
    trit, in float32.

    Args:
        trits: [rows / period, ..., code.trits], int8; or sums of trits times activations, float32.
        length: rows per segment; what is left behind whole segments is a segment of its own.

    Returns:
        float32 [rows, ...].
    """
    rows = len(trits) * code.period
    whole = rows // length * length
    if whole == rows:
        return _segments(trits, code, length)
    parts = [(trits[: whole // code.period], length), (trits[whole // code.period :], rows - whole)]
    return namespace(trits).concatenate([_segments(t, code, n) for t, n in parts if len(t)])


def _segments(trits, code: Code, length: int):
    """`values_of` rows that are whole segments."""
    xp, shape = namespace(trits), trits.shape[1:-1]
    wide = trits.reshape(-1, length // code.period, *shape, code.trits).astype(np.float32)
    rows = [0.0] * code.period
    for age in range(code.memory + 1):
        for phase, trits_of_phase in enumerate(code.taps):
            for i, taps in enumerate(trits_of_phase):
                if age < len(taps):
                    down, at = divmod(phase + age, code.period)
                    part = xp.roll(wide[..., code.first[phase] + i], down, axis=1)
                    rows[at] = rows[at] + np.float32(taps[age]) * part
    stacked = xp.stack(rows, axis=2)  # [segments, periods, P, ...]
    return stacked.reshape(-1, *shape)


def rows_of(take, rows, code: Code, length: int, out: int):
    """Rebuilds the values of some rows: the same numbers as `values_of` of all of them.

    Args:
        take: int [n] -> trits int8 [n, ..., code.trits] of these periods of rows.
        rows: int [n].
        length: rows per segment.
        out: rows of the matrix; what is left behind whole segments is a segment of its own.

    Returns:
        float32 [n, ...].
    """
    xp = namespace(rows)
    begin = rows // length * length
    rows_here = xp.minimum(length, out - begin)
    total = 0.0
    for age in range(code.memory + 1):
        born = (rows - begin - age) % rows_here  # where the trits were born that are of this age
        trits = take((begin + born) // code.period).astype(np.float32)
        taps = xp.asarray(_taps_at(code, age))[born % code.period]  # [n, M]
        for i in range(code.trits):
            shape = (-1, *[1] * (trits.ndim - 2))
            total = total + taps[:, i].reshape(shape) * trits[..., i]
    return total


def _taps_at(code: Code, age: int) -> np.ndarray:
    """float32 [period, trits]: the taps of an age of the trits of each phase; 0 for the others'."""
    table = np.zeros((code.period, code.trits), np.float32)
    for phase, trits in enumerate(code.taps):
        for i, taps in enumerate(trits):
            table[phase, code.first[phase] + i] = taps[age] if age < len(taps) else 0.0
    return table
