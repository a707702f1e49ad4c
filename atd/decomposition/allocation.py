"""Who gets how many bytes: the choice of an option for every matrix that loses least within a
budget of bytes.

    decision      the text of an option: N, group, tied or free, dtype of the scales, as a
                  `TernaryType` writes them
    Choice        matrices that get one option together, and what each option costs (bytes) and
                  loses (nats)
    allocate      min sum of losses, sum of bytes <= budget, one option a choice: the
                  multiple-choice knapsack, exactly
    parse_bytes   "3.9GB", "75MB", "2GiB"

Numbers and text in, numbers out: nothing here knows of graphs.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from atd.errors import BadInput
from atd.weights import DenseType, Group, PackedType, TernaryType, parse_type
from atd.weights.layouts import LAYOUTS

DECISION = (
    "ternary"  # the attr of a node in which a decision stands, from `allocate` to `decompose`
)
DENSE = "dense"  # the option of a matrix that stays as it is
FIRST_LIMIT = (
    1e-7  # of the sum of all excesses: how far above its bound the optimum is looked for at first
)
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


# --- options --------------------------------------------------------------------------------------


def ternary_types(
    shape: Sequence[int],
    bases: Iterable[int],
    groups: Iterable[Group],
    scales: Iterable[str],
    dtype: str,
) -> list[TernaryType]:
    """Every combination for a matrix [out, in], each once: a group as wide as the row is "row", and
    one base has no ratios of scales to tie."""
    out, inputs = shape
    found = {}
    for n, group, kind in product(bases, groups, scales):
        group = "row" if isinstance(group, int) and group >= inputs else group
        type = TernaryType((out, inputs), n, group, kind == "tied", dtype)
        found.setdefault((n, group, type.tied or n == 1), type)
    return list(found.values())


def decision(type: DenseType | TernaryType) -> str:
    """The text of what was decided for a matrix: "n=2 g=row tied f16", or "dense"."""
    return (
        DENSE
        if isinstance(type, DenseType)
        else str(type).removeprefix("ternary ").partition("[")[0]
    )


def decided_type(text: str, shape: Sequence[int]) -> TernaryType | None:
    """The type of a matrix [out, in] for which this text was decided; None for "dense". ValueError
    for other text.
    """
    if text == DENSE:
        return None
    type = parse_type(f"ternary {text}[{shape[0]},{shape[1]}]")
    assert isinstance(type, TernaryType)
    return type


def stored_bytes(type: DenseType | TernaryType | PackedType, layout: str) -> int:
    """Bytes of a weight as it will be stored: trits packed in `layout`, its padding, and scales."""
    return PackedType(type, layout).nbytes if isinstance(type, TernaryType) else type.nbytes


def can_be_packed(type: DenseType | TernaryType, layout: str) -> bool:
    """Whether the layout takes a matrix of this type."""
    return isinstance(type, DenseType) or LAYOUTS[layout].refuses(*type.shape, type.bases) is None


def parse_bytes(text: str) -> int:
    """ "3.9GB" -> 3_900_000_000, "2GiB" -> 2_147_483_648; a number alone is bytes, case does not
    matter.

    Rounded down to whole bytes. Raises BadInput for text that is no size above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    if match is None or (match[2] or "b") not in _UNITS or float(match[1]) == 0:
        raise BadInput(f"budget {text!r} is no size; write e.g. '3.9GB', '75MB' or '2GiB'")
    whole, _, fraction = match[1].partition(".")
    # exact: no float between
    return int(whole + fraction or "0") * _UNITS[match[2] or "b"] // 10 ** len(fraction)


# --- the optimum ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Matrices that are given one option together: bytes and losses of each option, summed over
    them.
    """

    names: tuple[str, ...]
    bytes: tuple[int, ...]
    losses: tuple[float, ...]


def allocate(choices: Sequence[Choice], budget: int) -> list[int]:
    """The option of each choice, by place: the least sum of losses with sum of bytes <= budget,
    exactly.

    With a price p a byte, every allocation of b <= budget bytes loses
        bound + sum of excesses + p (budget - b),    excess of an option = (loss + p bytes) - the
                                                     least of its choice,
    and all three are known or >= 0. At the price where the bound is highest an optimum lies barely
    above it, so only options of an excess below a small limit can be in it: those are searched
    completely, and if the best one found is within the limit, nothing else can be better; else the
    limit is doubled. (Dyer, Kayal & Walsh 1984; Pisinger 1995.) Of equals the one with fewer bytes,
    then the first: the same every time. Losses may rise with bytes. Raises BadInput where the
    smallest options together exceed the budget.
    """
    least = sum(min(choice.bytes) for choice in choices)
    if least > budget:
        raise BadInput(
            f"a budget of {budget:,} bytes is below the least that is possible, {least:,} bytes"
        )
    bytes, losses = (
        [np.array(c.bytes, np.int64) for c in choices],
        [np.array(c.losses, float) for c in choices],
    )
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


def total_bytes(choices: Sequence[Choice], chosen: Sequence[int]) -> int:
    """Bytes of all choices."""
    return sum(choice.bytes[option] for choice, option in zip(choices, chosen, strict=True))


def total_loss(choices: Sequence[Choice], chosen: Sequence[int]) -> float:
    """Predicted loss of all choices, nats a position."""
    return math.fsum(choice.losses[option] for choice, option in zip(choices, chosen, strict=True))


def _price(bytes: list[np.ndarray], losses: list[np.ndarray], budget: int) -> float:
    """The price a byte at which the cheapest options just fit: loss + price bytes, nats a byte."""

    def taken(price: float) -> int:
        return sum(
            int(b[np.argmin(loss + price * b)]) for b, loss in zip(bytes, losses, strict=True)
        )

    # At `high` no byte is worth what it saves
    low, high = (
        0.0,
        max(float(np.ptp(loss)) for loss in losses),
    )
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high) if low else high / 1024
        low, high = (low, middle) if taken(middle) <= budget else (middle, high)
    return high


def _search(bytes, losses, excesses, budget: int, limit: float, waste: float) -> list[int] | None:
    """The best allocation among those whose excesses sum to at most `limit` and that leave at most
    `waste` bytes.

    Choice by choice, all sums (bytes, loss, excess) that may still end so and that no other one
    dominates.
    """
    open_ = [i for i in range(len(bytes)) if np.count_nonzero(excesses[i] <= limit) > 1]
    open_.sort(key=lambda i: -int(np.ptp(bytes[i][excesses[i] <= limit])))
    chosen = [int(np.argmin(excess)) for excess in excesses]
    fixed = sum(int(bytes[i][chosen[i]]) for i in set(range(len(bytes))) - set(open_))
    rest = [bytes[i][excesses[i] <= limit] for i in open_]
    above = np.cumsum([0] + [int(b.min()) for b in rest[::-1]])[::-1][
        1:
    ]  # bytes that those to come take at least
    below = np.cumsum([0] + [int(b.max()) for b in rest[::-1]])[::-1][1:]
    total, loss, excess = np.array([fixed]), np.zeros(1), np.zeros(1)
    steps = []
    for i, at_least, at_most in zip(open_, above, below, strict=True):
        options = np.flatnonzero(excesses[i] <= limit)
        totals, sums, over = (
            (state[:, None] + values[i][options]).ravel()  # [states, options] -> [states options]
            for state, values in ((total, bytes), (loss, losses), (excess, excesses))
        )
        kept = np.flatnonzero(
            (over <= limit) & (totals + at_least <= budget) & (totals + at_most >= budget - waste)
        )
        kept = kept[np.lexsort((sums[kept], totals[kept]))]
        best = np.minimum.accumulate(
            np.append(np.inf, sums[kept])
        )  # fewer bytes and less loss dominate
        kept = kept[sums[kept] < best[:-1]]
        total, loss, excess = totals[kept], sums[kept], over[kept]
        steps.append((kept // len(options), options[kept % len(options)]))
    if not len(total):
        return None
    state = len(total) - 1  # ascending bytes, descending loss
    for i, (parents, options) in zip(open_[::-1], steps[::-1], strict=True):
        chosen[i], state = int(options[state]), int(parents[state])
    return chosen
