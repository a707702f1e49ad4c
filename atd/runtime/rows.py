"""Puts requests into rows of tokens that run together, so that what they share runs once.

A request whose tokens begin another's is read off that one's row: so are all choices of one token.
Rows that begin with one context make a family: the context runs once into a cache, and each
continuation from there, in turns. Rows are sorted by length and padded to few widths (`width_of`),
so that few shapes are compiled.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from atd.models.cache import bucket

TOKENS = 2048  # that run together where the number of rows is not given
LEAST = 16  # the least width, and number of positions
TURNS = 16  # the most continuations of a family
GAIN = 0.8  # the most tokens that a family runs, of those of its rows apart: a call has its price


@dataclass(frozen=True)
class Request:
    """A continuation to score."""

    context: tuple[int, ...]  # at least one token
    continuation: tuple[int, ...]  # at least one token

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that run."""
        return (*self.context, *self.continuation[:-1])


@dataclass(frozen=True)
class Read:
    """Targets of a request on a row: the hidden states from place `first` on predict them."""

    request: int
    row: int
    first: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Rows that run together."""

    tokens: np.ndarray  # int32 [B, T], zeros behind each row's own
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class Families:
    """Contexts that run together, then in turns one continuation of each."""

    contexts: Batch
    lengths: np.ndarray  # int [B] tokens of the contexts
    turns: tuple[Batch, ...]  # of one width; zeros where a context has no continuation left


@dataclass(frozen=True)
class _Row:
    """Tokens that run, and the requests read off them; the first has just these tokens."""

    tokens: tuple[int, ...]
    requests: list[int]


@dataclass(frozen=True)
class _Family:
    """Rows that begin with a context, the longest first."""

    context: tuple[int, ...]
    rows: list[_Row]

    @property
    def width(self) -> int:
        """That of its continuations."""
        return width_of(len(self.rows[0].tokens) - len(self.context))

    @property
    def pays(self) -> bool:
        """Whether it runs less than its rows do apart."""
        apart = sum(width_of(len(row.tokens)) for row in self.rows)
        together = width_of(len(self.context)) + len(self.rows) * self.width
        return together <= GAIN * apart


def batches(requests: Sequence[Request], rows: int | None = None) -> Iterator[Batch | Families]:
    """Yields batches that together answer all requests, of which there is at least one.

    Args:
        rows: of a batch; None: as many as make TOKENS tokens.
    """
    families, apart = [], []
    for family in _families(requests):
        if family.pays:
            families.append(family)
        else:
            apart += family.rows
    for part, shape in _parts(families, lambda family: (len(family.context), family.width), rows):
        yield _together(requests, part, shape)
    for part, shape in _parts(apart, lambda row: (len(row.tokens), 0), rows):
        reads = (read for i, row in enumerate(part) for read in _reads(requests, row, i))
        yield Batch(_padded([row.tokens for row in part], shape), tuple(reads))


def width_of(length: int) -> int:
    """Returns the width that rows of this length are padded to: 16, 24, 32, 48, 64, 96, ..."""
    power = padded_count(length)
    return power * 3 // 4 if power > LEAST and length <= power * 3 // 4 else power


def padded_count(count: int) -> int:
    """Returns the number that this many positions are padded to: 16, 32, 64, ..."""
    return max(LEAST, bucket(count))


def _rows(requests: Sequence[Request]) -> list[_Row]:
    """The distinct rows, none of which begins another.

    In descending order, the tokens that begin with some tokens stand right in front of these.
    """
    found: list[_Row] = []
    tokens = [request.tokens for request in requests]
    for i in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
        if found and found[-1].tokens[: len(tokens[i])] == tokens[i]:
            found[-1].requests.append(i)
        else:
            found.append(_Row(tokens[i], [i]))
    return found


def _families(requests: Sequence[Request]) -> Iterator[_Family]:
    """All rows, by the contexts of their first requests."""

    def context(row: _Row) -> tuple[int, ...]:
        return requests[row.requests[0]].context

    for shared, group in groupby(sorted(_rows(requests), key=context), context):
        rows = sorted(group, key=lambda row: len(row.tokens), reverse=True)
        for start in range(0, len(rows), TURNS):
            yield _Family(shared, rows[start : start + TURNS])


def _parts[Item](
    items: list[Item], size: Callable[[Item], tuple[int, int]], rows: int | None
) -> Iterator[tuple[list[Item], tuple[int, int]]]:
    """Items of like sizes, whose first component is their length, with the shape of the batch."""
    items = sorted(items, key=size, reverse=True)
    while items:
        width = width_of(size(items[0])[0])
        count = rows or max(1, TOKENS // width)
        part, items = items[:count], items[count:]
        yield part, (min(count, bucket(len(part))), width)


def _together(requests: Sequence[Request], part: list[_Family], shape: tuple[int, int]) -> Families:
    """The batch of some families; `shape` is that of their contexts."""
    before: list[Read] = []
    turns: list[tuple[list[tuple[int, ...]], list[Read]]] = []
    for turn in range(max(len(family.rows) for family in part)):
        rows: list[tuple[int, ...]] = [()] * len(part)
        behind: list[Read] = []
        for i, family in enumerate(part):
            if turn < len(family.rows):
                row, length = family.rows[turn], len(family.context)
                rows[i] = row.tokens[length:]
                for read in _reads(requests, row, i):
                    split = max(0, length - read.first)
                    if split:
                        before.append(Read(read.request, i, read.first, read.targets[:split]))
                    if rest := read.targets[split:]:
                        behind.append(Read(read.request, i, read.first + split - length, rest))
        turns.append((rows, behind))
    of_turns = shape[0], max(family.width for family in part)
    lengths = np.ones(shape[0], int)
    lengths[: len(part)] = [len(family.context) for family in part]
    return Families(
        Batch(_padded([family.context for family in part], shape), tuple(before)),
        lengths,
        tuple(Batch(_padded(rows, of_turns), tuple(reads)) for rows, reads in turns),
    )


def _reads(requests: Sequence[Request], row: _Row, place: int) -> Iterator[Read]:
    """What is read off a row that stands in this place of its batch."""
    for i in row.requests:
        yield Read(i, place, len(requests[i].context) - 1, requests[i].continuation)


def _padded(rows: Sequence[tuple[int, ...]], shape: tuple[int, int]) -> np.ndarray:
    """The rows as int32 of this shape, zeros behind them."""
    tokens = np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens
