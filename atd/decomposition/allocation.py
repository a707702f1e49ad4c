"""Allocation: an option for every matrix, with the least loss within a budget of bytes.

    min  sum_c loss(c, o_c)    subject to    sum_c bytes(c, o_c) <= budget

over one option o_c for each choice c: the multiple-choice knapsack, solved exactly. Numbers and
text in, numbers out: nothing here knows of graphs.

Sources: Dyer, Kayal & Walsh 1984; Pisinger 1995.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atd.errors import BadInput

# Of the sum of all excesses: how far above its bound the optimum is looked for at first.
FIRST_LIMIT = 1e-7
BISECTIONS = 200  # of the price, in logarithms: to the last bit

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


def parse_bytes(text: str, what: str = "budget") -> int:
    """Reads a size in bytes, rounded down: "3.9GB" is 3,900,000,000, "2GiB" 2,147,483,648, "75" 75.

    Raises:
        BadInput: the text, which the message calls `what`, is no size above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    if match is None or (match[2] or "b") not in _UNITS or float(match[1]) == 0:
        raise BadInput(f"{what} {text!r} is no size; write e.g. '3.9GB', '75MB' or '2GiB'")
    whole, _, fraction = match[1].partition(".")
    unit = _UNITS[match[2] or "b"]
    return int(whole + fraction or "0") * unit // 10 ** len(fraction)  # exact: no float between


@dataclass(frozen=True)
class Choice:
    """Matrices that are given one option together."""

    names: tuple[str, ...]
    bytes: tuple[int, ...]  # of each option, summed over the matrices
    losses: tuple[float, ...]  # of each option, nats per position, summed over the matrices


def total_bytes(choices: Sequence[Choice], chosen: Sequence[int]) -> int:
    """Returns the bytes of all choices."""
    return sum(choice.bytes[option] for choice, option in zip(choices, chosen, strict=True))


def total_loss(choices: Sequence[Choice], chosen: Sequence[int]) -> float:
    """Returns the predicted loss of all choices, nats per position."""
    return math.fsum(choice.losses[option] for choice, option in zip(choices, chosen, strict=True))


def allocate(choices: Sequence[Choice], budget: int) -> list[int]:
    """Returns the index of the option of each choice: the least sum of losses within the budget.

    With a price p per byte, every allocation of b <= budget bytes loses

        bound + sum of excesses + p (budget - b)

    where the excess of an option is its (loss + p bytes) less the least of its choice, and all
    three terms are known or >= 0. At the price where the bound is highest an optimum lies barely
    above it, so only options of an excess below a small limit can be in it. Those are searched
    completely. If the best one found is within the limit, nothing else can be better; else the
    limit is doubled.

    Of equals the one with fewer bytes is taken, then the first: the same every time. Losses may
    rise with bytes.

    Args:
        choices: the options of each.
        budget: bytes.

    Raises:
        BadInput: the smallest options together exceed the budget.
    """
    least = sum(min(choice.bytes) for choice in choices)
    if least > budget:
        raise BadInput(
            f"a budget of {budget:,} bytes is below the least that is possible, {least:,} bytes"
        )
    bytes = [np.array(c.bytes, np.int64) for c in choices]
    losses = [np.array(c.losses, float) for c in choices]
    cheap = [int(np.lexsort((b, loss))[0]) for b, loss in zip(bytes, losses, strict=True)]
    if total_bytes(choices, cheap) <= budget:
        return cheap
    price = _price(bytes, losses, budget)
    priced = [loss + price * b for b, loss in zip(bytes, losses, strict=True)]
    excesses = [p - p.min() for p in priced]
    bound = math.fsum(p.min() for p in priced) - price * budget
    limit = FIRST_LIMIT * max(math.fsum(e.max() for e in excesses), 1e-300)
    while True:
        found = _search(bytes, losses, excesses, budget, limit, limit / price)
        if found is not None and total_loss(choices, found) - bound <= limit:
            return found
        limit *= 2


def _price(bytes: list[np.ndarray], losses: list[np.ndarray], budget: int) -> float:
    """The price, nats per byte, at which the options of least loss + price bytes just fit."""

    def taken(price: float) -> int:
        return sum(
            int(b[np.argmin(loss + price * b)]) for b, loss in zip(bytes, losses, strict=True)
        )

    low, high = 0.0, max(float(np.ptp(loss)) for loss in losses)  # no byte saves more than `high`
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high) if low else high / 1024
        low, high = (low, middle) if taken(middle) <= budget else (middle, high)
    return high


def _search(
    bytes: list[np.ndarray],
    losses: list[np.ndarray],
    excesses: list[np.ndarray],
    budget: int,
    limit: float,
    waste: float,
) -> list[int] | None:
    """The best allocation with excesses of at most `limit` that leaves at most `waste` bytes.

    Dynamic programming, choice by choice, over the sums (bytes, loss, excess) that may still end so
    and that no other one dominates.
    """
    open_ = [i for i in range(len(bytes)) if np.count_nonzero(excesses[i] <= limit) > 1]
    open_.sort(key=lambda i: -int(np.ptp(bytes[i][excesses[i] <= limit])))
    chosen = [int(np.argmin(excess)) for excess in excesses]
    fixed = sum(int(bytes[i][chosen[i]]) for i in set(range(len(bytes))) - set(open_))
    rest = [bytes[i][excesses[i] <= limit] for i in open_]
    # Bytes that the choices after this one take at least and at most.
    at_least = np.cumsum([0] + [int(b.min()) for b in rest[::-1]])[::-1][1:]
    at_most = np.cumsum([0] + [int(b.max()) for b in rest[::-1]])[::-1][1:]
    total, loss, excess = np.array([fixed]), np.zeros(1), np.zeros(1)
    steps = []
    for i, fewest, most in zip(open_, at_least, at_most, strict=True):
        options = np.flatnonzero(excesses[i] <= limit)
        totals, sums, over = (
            (state[:, None] + values[i][options]).ravel()  # [states, options] -> [states options]
            for state, values in ((total, bytes), (loss, losses), (excess, excesses))
        )
        kept = np.flatnonzero(
            (over <= limit) & (totals + fewest <= budget) & (totals + most >= budget - waste)
        )
        kept = kept[np.lexsort((sums[kept], totals[kept]))]
        best = np.minimum.accumulate(np.append(np.inf, sums[kept]))
        kept = kept[sums[kept] < best[:-1]]  # fewer bytes and less loss dominate
        total, loss, excess = totals[kept], sums[kept], over[kept]
        steps.append((kept // len(options), options[kept % len(options)]))
    if not len(total):
        return None
    state = len(total) - 1  # ascending bytes, descending loss
    for i, (parents, options) in zip(open_[::-1], steps[::-1], strict=True):
        chosen[i], state = int(options[state]), int(parents[state])
    return chosen
