"""How long work says how far it is and what it found: two callbacks, the same everywhere.

A function that takes longer than some seconds has the arguments `progress: Report = unheard` and,
where it has lines for people, `say: Say = print`. `atd.reports.progress.shown` shows both on a
terminal:

    with shown() as (say, progress):
        convert(model, out, say=say, progress=progress)
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a task is: `Progress("evaluating", 512, 4096, "tokens")`."""

    task: str  # what is done, the same from its beginning to its end
    done: int
    total: int | None  # None: not known yet
    unit: str  # what is counted: "weights", "tokens", "tensors", "steps"
    at: str = ""  # what it is at, e.g. the block that was finished last

    @property
    def ended(self) -> bool:
        """Whether all of it is done."""
        return self.total is not None and self.done >= self.total


Report = Callable[[Progress], None]
Say = Callable[[str], None]


def unheard(progress: Progress) -> None:
    """Drops the progress, for callers that show none."""
