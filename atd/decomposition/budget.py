"""A budget of bytes over the matrices of a model: what they may become, and what was decided."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from atd.decomposition.allocation import Choice, allocate, total_bytes
from atd.decomposition.options import Candidate, stored_bytes
from atd.decomposition.trellis_codes import gaussian_error
from atd.weights import DenseType, TrellisType

# At small N matrices lose more together than alone: weights that fit best are smaller than those
# they stand for, by about a code's error D, and o and down have to make up for that. With 1 + 4 D
# the KL is predicted within 6 % over nine budgets from 2.4 to 4.85 bits (stories15M). Allocating by
# such losses gains nothing.
TOGETHER = 4.0
# N -> the least mean square error on standard normals of 3^N equally spaced levels, as tied scales
# make them.
GAUSSIAN = {1: 0.1902, 2: 0.0307, 3: 0.00469, 4: 0.00069}


@dataclass(frozen=True)
class Allocation:
    """What was decided: the type of every matrix that was a choice, what that takes and what it
    loses.
    """

    types: dict[str, Candidate]  # name -> what the matrix becomes, before packing
    losses: dict[str, float]  # name -> what it loses alone, nats per position
    used: int  # bytes of all that the budget is for
    budget: int
    weights: int  # how many weights `used` is for

    @property
    def predicted_kl(self) -> float:
        """The sum of the predicted losses, nats per position."""
        return math.fsum(self.losses.values())

    @property
    def shares(self) -> dict[str, float]:
        """What each matrix adds to the KL of the whole model, nats per position."""
        return {name: loss * together(self.types[name]) for name, loss in self.losses.items()}

    @property
    def bits(self) -> float:
        """Bits per weight, over what the budget is for."""
        return 8 * self.used / self.weights

    def __str__(self) -> str:
        share = f"{self.used:,} of {self.budget:,} bytes ({self.used / self.budget:.2%})"
        predicted = math.fsum(self.shares.values())
        return f"{self.bits:.3f} bits per weight, {share}, predicted KL {predicted:.4f}"


@dataclass(frozen=True)
class Problem:
    """What is to be decided, in shapes and bytes."""

    candidates: Mapping[str, tuple[Candidate, ...]]  # name -> what the matrix may become
    # Matrices that get the same option, all with as many candidates.
    choices: Sequence[tuple[str, ...]]
    fixed: int  # bytes of what counts and is no choice
    budget: int
    weights: int  # how many weights the budget is for
    layout: str  # that trits will be packed in: its padding counts

    def bytes_of(self, names: Sequence[str]) -> tuple[int, ...]:
        """Returns the bytes of each option of a choice, summed over its matrices."""
        sizes = ([stored_bytes(type, self.layout) for type in self.candidates[n]] for n in names)
        return tuple(sum(column) for column in zip(*sizes, strict=True))

    @property
    def least(self) -> int:
        """Bytes with the smallest option everywhere."""
        return self.fixed + sum(min(self.bytes_of(names)) for names in self.choices)

    def solved(self, losses: Sequence[np.ndarray]) -> Allocation:
        """Returns the allocation of the least sum of losses within the budget, exactly.

        Args:
            losses: of each choice, nats per position, [matrices, options].
        """
        choices = [
            Choice(names, self.bytes_of(names), tuple(map(float, found.sum(axis=0))))
            for names, found in zip(self.choices, losses, strict=True)
        ]
        taken = allocate(choices, self.budget - self.fixed)
        types, shares = {}, {}
        for names, option, found in zip(self.choices, taken, losses, strict=True):
            types |= {name: self.candidates[name][option] for name in names}
            shares |= dict(zip(names, found[:, option].tolist(), strict=True))
        used = self.fixed + total_bytes(choices, taken)
        assert used <= self.budget, "an allocation above its budget"
        return Allocation(types, shares, used, self.budget, self.weights)

    def stand_in_losses(self) -> list[np.ndarray]:
        """Returns losses of each choice, [matrices, options], where nothing is known of weights and
        text.
        """
        return [
            np.array([[stand_in_loss(type) for type in self.candidates[name]] for name in names])
            for names in self.choices
        ]


def together(type: Candidate) -> float:
    """Returns what a matrix adds to the KL of a quantized model, over what it loses alone: 1 + 4 D
    with a trellis code of the error D, else 1.
    """
    return 1 + TOGETHER * gaussian_error(type.code) if isinstance(type, TrellisType) else 1.0


def stand_in_loss(type: Candidate) -> float:
    """Returns a loss for an option when nothing is known: its error on Gaussian weights, less for
    finer groups and free scales.
    """
    if isinstance(type, DenseType):
        return 0.0
    if isinstance(type, TrellisType):
        return math.prod(type.shape) * gaussian_error(type.code)
    finer = 0.97 if type.group == "row" else 0.85 + 0.02 * math.log2(type.group_size / 32)
    free = 1.0 if type.tied else 0.97
    return math.prod(type.shape) * GAUSSIAN[type.bases] * min(finer, 0.97) * free
