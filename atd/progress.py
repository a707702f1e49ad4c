"""How work that takes long says how far it is, and what it found: two kinds of callbacks, the same everywhere.

A function that takes longer than two seconds has the arguments `progress: Report = unheard` and, where it has lines for
people, `say: Say = print`. `atd.reports.progress` shows both on a terminal.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a task is: Progress("evaluating", 512, 4096, "tokens")."""

    task: str  # what is done, the same for the whole of it
    done: int
    total: int | None  # None: not known yet
    unit: str  # what is counted: "weights", "tokens", "tensors", "steps"
    at: str = ""  # what it is at, e.g. the block that was finished last


Report = Callable[[Progress], None]
Say = Callable[[str], None]


def unheard(progress: Progress) -> None:
    """Drops the progress: for callers that show none."""
