"""How work that takes long says how far it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: so much done of all, and what it is at (the unit of the model that was finished last)."""

    done: int
    total: int
    unit: str
    counted: str = "weights"
