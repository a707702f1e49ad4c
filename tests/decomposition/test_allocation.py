"""The knapsack against other solvers; sizes in text."""

import itertools
import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from atd.decomposition.allocation import Choice, allocate, parse_bytes, total_bytes, total_loss
from atd.errors import BadInput


def random_choices(rng, count: int, options: int = 3, noisy: bool = False) -> list[Choice]:
    """Matrices of a few shapes whose losses fall about ninefold a base; noisy: not always."""
    choices = []
    for i in range(count):
        rows, inputs = rng.choice([64, 128, 344]), rng.choice([64, 100])
        bytes = tuple(int(rows * (-(-inputs // 5) * n + 2)) for n in range(1, options + 1))
        losses = (
            rng.lognormal()
            * 9.0 ** -np.arange(options)
            * (rng.lognormal(size=options) if noisy else 1)
        )
        choices.append(Choice((str(i),), bytes, tuple(float(loss) for loss in losses)))
    return choices


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_better_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    choices = random_choices(rng, 7, noisy=seed % 2 == 1)
    every = list(itertools.product(range(3), repeat=7))
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        least, most = (sum(pick(c.bytes) for c in choices) for pick in (min, max))
        budget = int(least + share * (most - least))
        taken = allocate(choices, budget)
        assert total_bytes(choices, taken) <= budget
        best = min(total_loss(choices, t) for t in every if total_bytes(choices, t) <= budget)
        assert total_loss(choices, taken) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_as_good_as_scipys_milp(seed):
    """On sixty choices: not worse, within the solver's own tolerances."""
    choices = random_choices(np.random.default_rng(seed), 60)
    budget = int(0.5 * sum(c.bytes[0] + c.bytes[2] for c in choices))
    losses = np.concatenate([c.losses for c in choices])
    one_each = np.kron(np.eye(60), np.ones(3))
    bytes = np.concatenate([c.bytes for c in choices])
    solved = milp(
        losses * 1e3,
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bytes[None], -np.inf, budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    taken = allocate(choices, budget)
    assert total_bytes(choices, taken) <= budget
    assert total_loss(choices, taken) == pytest.approx(float(losses @ np.round(solved.x)), rel=1e-6)


def test_a_model_of_an_ordinary_size_takes_seconds():
    """224 linears, also where all layers are alike; the budget is used to the last permille."""
    for choices in (
        random_choices(np.random.default_rng(0), 224),
        [
            Choice(c.names, c.bytes, c.losses)
            for c in random_choices(np.random.default_rng(1), 7)
            for _ in range(32)
        ],
    ):
        budget = int(0.4 * sum(c.bytes[0] + c.bytes[2] for c in choices))
        started = time.process_time()
        taken = allocate(choices, budget)
        assert time.process_time() - started < 20
        assert 0.999 * budget < total_bytes(choices, taken) <= budget
        assert allocate(choices, budget) == taken


def test_budgets_at_the_ends():
    choices = random_choices(np.random.default_rng(2), 5)
    least = sum(c.bytes[0] for c in choices)
    assert allocate(choices, least) == [0] * 5
    assert allocate(choices, 10**9) == [2] * 5
    with pytest.raises(BadInput, match="below the least that is possible"):
        allocate(choices, least - 1)


def test_more_bytes_are_not_taken_where_they_lose_more():
    """Measured losses are noisy: of two options that lose as much, the smaller is taken."""
    choices = [
        Choice(("a",), (10, 20, 30), (1.0, 0.5, 0.7)),
        Choice(("b",), (10, 20, 30), (0.5, 0.5, 0.5)),
    ]
    assert allocate(choices, 100) == [1, 0]


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("3.9GB", 3_900_000_000),
        ("75MB", 75_000_000),
        ("2GiB", 2**31),
        ("1.5 kib", 1536),
        ("123", 123),
        (".5kB", 500),
        ("0.1GB", 100_000_000),
    ],
)
def test_sizes(text, bytes):
    assert parse_bytes(text) == bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0MB", "3.9 gigabytes", "1e9"])
def test_texts_that_are_no_size(text):
    with pytest.raises(BadInput, match=r"is no size; write e\.g\. '3\.9GB'"):
        parse_bytes(text)
