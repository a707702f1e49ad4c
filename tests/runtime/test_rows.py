"""Rows of requests: what runs once, how few shapes there are, and that nothing is left out."""

import numpy as np

from atd.runtime.rows import TOKENS, Batch, Families, Request, batches, width_of


def tokens_run(requests: list[Request]) -> int:
    """Tokens without padding."""
    count = 0
    for batch in batches(requests):
        parts = (batch,) if isinstance(batch, Batch) else (batch.contexts, *batch.turns)
        count += sum(int((part.tokens > 0).sum()) for part in parts)
    return count


def read_targets(requests: list[Request], rows: int | None = None) -> list[list[int]]:
    """Of each request the targets that are read, in order."""
    found: list[list[int]] = [[] for _ in requests]
    for batch in batches(requests, rows):
        parts = (batch,) if isinstance(batch, Batch) else (batch.contexts, *batch.turns)
        for part in parts:
            for read in part.reads:
                found[read.request] += read.targets
                assert read.first + len(read.targets) <= part.tokens.shape[1]
    return found


def test_choices_of_one_token_are_one_row():
    context = tuple(range(1, 21))
    requests = [Request(context, (choice,)) for choice in (5, 6, 7, 8)]
    (batch,) = batches(requests)
    assert isinstance(batch, Batch)
    assert batch.tokens.shape == (1, 24)
    assert tokens_run(requests) == 20


def test_a_request_that_another_begins_with_is_read_off_its_row():
    requests = [Request((1, 2), (3,)), Request((1,), (2, 3, 4)), Request((1, 2, 3), (9, 9))]
    (batch,) = batches(requests)
    assert isinstance(batch, Batch)
    assert [read.row for read in sorted(batch.reads, key=lambda r: r.request)] == [0, 0, 0]
    assert tokens_run(requests) == 4


def test_a_long_context_of_several_continuations_runs_once():
    context = tuple(range(1, 101))
    requests = [Request(context, tuple(range(start, start + 8))) for start in (1, 2, 3)]
    (batch,) = batches(requests)
    assert isinstance(batch, Families)
    assert tokens_run(requests) == 100 + 3 * 7
    assert batch.contexts.tokens.shape == (1, 128)
    assert [turn.tokens.shape for turn in batch.turns] == [(1, 16)] * 3
    assert [len(read.targets) for read in batch.contexts.reads] == [1, 1, 1]


def test_a_short_context_runs_with_each_continuation():
    """So do texts without a context, of which there may be thousands."""
    requests = [Request((1,), tuple(range(start, start + 30))) for start in range(2, 90)]
    assert all(isinstance(batch, Batch) for batch in batches(requests))


def test_few_shapes_and_full_batches():
    rng = np.random.default_rng(0)
    requests = [
        Request(tuple(rng.integers(1, 99, n).tolist()), (1,)) for n in rng.integers(1, 300, 500)
    ]
    found = list(batches(requests))
    assert len({batch.tokens.shape for batch in found if isinstance(batch, Batch)}) <= 12
    assert all(batch.tokens.size <= TOKENS for batch in found if isinstance(batch, Batch))
    run = sum(batch.tokens.size for batch in found if isinstance(batch, Batch))
    assert run < 1.3 * sum(len(request.tokens) for request in requests)


def test_every_target_is_read_once():
    rng = np.random.default_rng(1)

    def some(most: int) -> tuple[int, ...]:  # of so few ids that many begin with others
        return tuple(rng.integers(1, 3, rng.integers(1, most)).tolist())

    contexts = [some(40) for _ in range(30)]
    requests = [Request(c, some(10)) for c in contexts for _ in range(rng.integers(1, 40))]
    for rows in (None, 1, 5):
        assert read_targets(requests, rows) == [list(r.continuation) for r in requests]


def test_widths():
    assert [width_of(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 1000, 1536, 1537)] == [
        *(16, 16, 24, 24, 32, 48, 48, 64, 1024, 1536, 2048)
    ]
    assert all(n <= width_of(n) <= max(16, n * 1.5) for n in range(1, 3000))
