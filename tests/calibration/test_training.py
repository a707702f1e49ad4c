"""How training finds its rates by the held-out loss."""

from typing import cast

import jax.numpy as jnp
import numpy as np
import pytest

from atd.calibration.training import FIRST_CHECK, WARM_UP, Learner, Text, Training, train


class Point:
    """A number that moves a fixed way in each step; the loss is its square distance to 1."""

    def __init__(self):
        self.parameters, self.seen = 0.0, []

    def restart(self, parameters: float) -> None:
        self.parameters = parameters

    def loss(self) -> float:
        self.seen.append(self.parameters)
        return (self.parameters - 1) ** 2


def training(rate: float) -> Training:
    return Training(
        scales=True,
        gains=True,
        codes=False,
        steps=64,
        learning_rate=rate,
        codes_learning_rate=0.5,
        checks=4,
        patience=3,
    )


def run(rate: float):
    """(point, watch, shares) after up to 64 steps of this size, toward 1 and beyond it."""
    point, shares = Point(), []
    text = Text(np.zeros((4, 8)), np.zeros((1, 8)), 1, np.random.default_rng(0))

    def step(batch, share):
        shares.append(share)
        point.parameters += rate * share

    learner = cast("Learner", point)
    watch = train(training(rate), text, [learner], step, point.loss, lambda done: None)
    return point, watch, shares


def test_it_looks_first_after_a_few_steps():
    """And then evenly, where the rate is low enough."""
    point, watch, shares = run(1e-3)
    assert len(point.seen) == 2 + 4  # before, after the first steps, and four times
    assert point.seen[1] == pytest.approx(1e-3 * sum(shares[:FIRST_CHECK]))
    assert not watch.risen
    assert watch.state == [point.parameters]


def test_rates_that_are_far_too_high_fall_by_quarters_until_something_improves():
    _, watch, shares = run(2.0)
    assert watch.improved
    unhindered = run(1e-3)[2]
    for number, factor in ((1, 4), (2, 16)):
        first = number * FIRST_CHECK
        assert shares[first] == pytest.approx(unhindered[first] / factor)


@pytest.mark.parametrize(("kind", "rate"), [("scales", 0.1), ("codes", 0.5)])
def test_an_optimizer_that_knows_nothing_warms_up(kind, rate):
    """Of gradients that are alike in each step it makes steps of its rate, but for the first."""
    optimizer, gradients = training(0.1).optimizer(), {kind: jnp.full((4, 4), 3.0)}
    for _ in range(2):
        at, sizes = {kind: jnp.zeros((4, 4))}, []
        state = optimizer.init(at)
        for _ in range(WARM_UP + 2):
            before = at[kind]
            at, state = optimizer.update(gradients, state, at, 1.0)
            sizes.append(np.mean(before - at[kind]).item())
        shares = [1 / 4, 1 / 2, 3 / 4, 1, 1, 1]
        assert sizes == pytest.approx([rate * share for share in shares], rel=1e-2)


def test_later_they_fall_by_half():
    """This rate passes 1 between the first check and the last."""
    point, watch, _ = run(0.1)
    assert watch.improved
    assert watch.risen
    assert watch.share == 0.5 ** len(watch.risen)
    assert watch.best == min((x - 1) ** 2 for x in point.seen)


def test_it_gives_up_where_nothing_improves():
    _, watch, shares = run(-1.0)
    assert not watch.improved
    assert watch.gave_up
    assert len(watch.risen) == 3
    assert len(shares) == 3 * FIRST_CHECK
