"""Trains a converted model's parameters: optimizer, batches, and a watch on held-out text.

What is trained, and against what, is in `atd.calibration.end_to_end` (the whole model) and
`atd.calibration.block_by_block`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atd.calibration.gradients import in_float32
from atd.calibration.trainable import Parameters, TrainableUnit, trainable
from atd.ir import Block

HELD_OUT = 8  # one window in this many is held out
WARM_UP = 4  # steps
FIRST_CHECK = 8  # steps between two looks at the held-out loss, as long as nothing has improved


@dataclass(frozen=True)
class Training:
    """What is trained, how fast and for how long."""

    scales: bool
    gains: bool  # of RMS norms
    codes: bool  # latent weights of linears
    steps: int  # of the optimizer
    learning_rate: float  # of scales and gains, relative to their size
    codes_learning_rate: float  # of latent weights, in levels
    checks: int  # how often the held-out loss is looked at
    patience: int  # checks in a row without improvement that end the training

    def share(self, step: int) -> float:
        """Returns the share of the rates in step 1, 2, ...: a cosine to zero."""
        return np.asarray(optax.cosine_decay_schedule(1.0, self.steps)(step - 1)).item()

    def optimizer(self) -> "Optimizer":
        """Returns Adam, and Adafactor for codes, so that those of the largest gradients change and
        not all alike.

        The momentum of codes is in bfloat16. The first steps, of which moments know little, are
        small ones.
        """

        def labels(parameters):
            return {kind: "codes" if kind == "codes" else "rest" for kind in parameters}

        codes = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=2),
            optax.ema(0.9, accumulator_dtype=jnp.bfloat16),
            optax.scale_by_learning_rate(self.codes_learning_rate),
        )
        rest = optax.adam(self.learning_rate, b1=0.9, b2=0.95)
        by_kind = optax.multi_transform({"codes": codes, "rest": rest}, labels)
        warm_up = optax.linear_schedule(1 / WARM_UP, 1.0, WARM_UP - 1)
        return Optimizer(optax.chain(by_kind, optax.scale_by_schedule(warm_up)))

    def unit(self, block: Block) -> TrainableUnit:
        """Returns the block with what is trained of it."""
        return trainable(block, scales=self.scales, gains=self.gains, codes=self.codes)


class Optimizer:
    """Updates the parameters of one node; nodes of the same shapes share its compiled programs."""

    def __init__(self, transformation: optax.GradientTransformation):
        def update(gradients, state, parameters, share):
            updates, state = transformation.update(gradients, state, in_float32(parameters))
            changed = jax.tree.map(lambda u: share * u, updates)
            return optax.apply_updates(parameters, changed), state

        self.update = jax.jit(update)
        self._transformation = transformation

    def init(self, parameters):
        """Returns the state before the first step."""
        return self._transformation.init(in_float32(parameters))


class Learner:
    """A trainable unit, its parameters now, and the state of the optimizer of each of its nodes."""

    def __init__(self, unit: TrainableUnit, optimizer: Optimizer):
        self.unit, self._optimizer = unit, optimizer
        self.restart(unit.parameters)

    def step(self, gradients: Parameters, share: float) -> None:
        """Follows the gradients by this share of the optimizer's rates."""
        stepped = {
            name: self._optimizer.update(gradients[name], self._states[name], deltas, share)
            for name, deltas in self.parameters.items()
        }
        self.parameters = {name: parameters for name, (parameters, _) in stepped.items()}
        self._states = {name: state for name, (_, state) in stepped.items()}

    def restart(self, parameters: Parameters) -> None:
        """Goes on from these parameters, with nothing remembered of the steps before."""
        self.parameters = parameters
        self._states = {name: self._optimizer.init(deltas) for name, deltas in parameters.items()}


@dataclass
class Text:
    """Windows to train on and windows held out, int32 [n, T]."""

    train: np.ndarray
    held_out: np.ndarray
    batch: int  # windows per step
    rng: np.random.Generator

    def batches(self, count: int) -> Iterator[np.ndarray]:
        """Yields `count` batches of indices, every window once before any comes again."""
        size = min(self.batch, len(self.train))
        order: list[int] = []
        for _ in range(count):
            if len(order) < size:
                order = list(self.rng.permutation(len(self.train)))
            taken, order = order[:size], order[size:]
            yield np.array(taken)


def split_text(windows: np.ndarray, tokens: int, seed: int) -> Text:
    """Holds out every eighth window int32 [n, T]; a step takes `tokens` tokens, or one window."""
    held_out = np.arange(len(windows)) % HELD_OUT == HELD_OUT - 1
    batch = max(1, tokens // windows.shape[1])
    return Text(windows[~held_out], windows[held_out], batch, np.random.default_rng(seed))


@dataclass
class Watch:
    """Keeps the state of the least held-out loss; knows when to go back to it and when to stop."""

    patience: int
    start: float  # the loss before the first step
    best: float
    state: list[Parameters]  # of each unit, at the best loss
    worse: int = 0  # checks in a row
    risen: tuple[float, ...] = ()  # the loss at each check that was worse
    share: float = 1.0  # of the rates that is left

    def take(self, loss: float, state: list[Parameters]) -> bool:
        """Returns whether this is the best state so far; where it is not, rates fall to a half, and
        to a quarter as long as nothing has improved.
        """
        if loss < self.best:
            self.best, self.state, self.worse = loss, state, 0
            return True
        self.worse, self.risen = self.worse + 1, (*self.risen, loss)
        self.share /= 2 if self.improved else 4
        return False

    @property
    def improved(self) -> bool:
        """Whether the best loss is below the one before the first step."""
        return self.best < self.start

    @property
    def gave_up(self) -> bool:
        """Whether the last checks in a row, `patience` of them, brought no improvement."""
        return self.worse >= self.patience

    def summary(self, what: str) -> str:
        """Returns a line on how the loss, called `what`, went."""
        ended = "; stopped early" if self.gave_up else ""
        if self.risen:
            risen = ", ".join(f"{loss:.4f}" for loss in self.risen)
            ended = f"; it rose to {risen}, rates lowered each time{ended}"
        loss = f"{what} on held-out windows"
        if not self.improved:
            return f"calibrate improved nothing: {loss} stays {self.start:.4f}{ended}"
        return f"calibrate: {loss} {self.start:.4f} -> {self.best:.4f}{ended}"


def train(
    training: Training,
    text: Text,
    learners: Sequence[Learner],
    step: Callable[[np.ndarray, float], None],
    held_out_loss: Callable[[], float],
    advance: Callable[[int], None],
) -> Watch:
    """Trains by one batch after the other, and looks at the held-out loss now and then.

    As long as nothing has improved it looks often: rates may be far too high. Where the loss got
    worse, the training goes back to the best state and on at lower rates.

    Args:
        learners: of all units that `step` changes.
        step: takes (indices of windows, share of the optimizer's rates).
        advance: hears how many steps are done.
    """

    def state() -> list[Parameters]:
        return [learner.parameters for learner in learners]

    start = held_out_loss()
    every, looked = max(1, round(training.steps / training.checks)), 0
    watch = Watch(training.patience, start, start, state())
    for i, batch in enumerate(text.batches(training.steps), start=1):
        step(batch, training.share(i) * watch.share)
        advance(i)
        wait = every if watch.improved else min(every, FIRST_CHECK)
        if i < min(looked + wait, training.steps):
            continue
        looked = i
        if not watch.take(held_out_loss(), state()):
            if watch.gave_up:
                break
            for learner, best in zip(learners, watch.state, strict=True):
                learner.restart(best)
    return watch
