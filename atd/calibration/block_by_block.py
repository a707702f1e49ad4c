"""Trains block by block: each block's output on the quantized stream toward the dense one's.

The loss of a block is the mean square error of its output on the stream of the converted model
against the dense block's on the stream of the dense model, relative to what the block adds to the
stream. Source: block-AP of EfficientQAT (2407.11062).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from atd.calibration.gradients import backward, forward
from atd.calibration.trainable import TrainableUnit, frozen, merged
from atd.calibration.training import Learner, Text, Training, Watch, train
from atd.host import return_freed_from_now_on
from atd.ir import Graph
from atd.progress import Progress, Report, Say, unheard

Values = list[np.ndarray]  # of each window, [1, T, D]


@dataclass(frozen=True)
class _Stream:
    """What enters a block in both models, and what the dense block makes of it."""

    dense: Values
    converted: Values
    targets: Values


def train_block_by_block(
    training: Training,
    graph: Graph,
    dense: Graph,
    text: Text,
    *,
    say: Say = print,
    progress: Report = unheard,
) -> Graph | None:
    """Returns the converted model `graph` with blocks closer to the dense ones; None where no block
    improved.
    """
    return_freed_from_now_on()
    optimizer, total = training.optimizer(), len(graph.blocks) * training.steps
    inputs = [_embedded(dense, graph, windows) for windows in (text.train, text.held_out)]
    units, gained = [graph.prologue], 0
    for number, (reference, block) in enumerate(zip(dense.blocks, graph.blocks, strict=True)):

        def advance(done: int, before: int = number * training.steps, at: str = block.name) -> None:
            progress(Progress("calibrate", before + done, total, "steps", at))

        learner, unit = Learner(training.unit(block), optimizer), frozen(reference)
        streams = [_Stream(d, c, _outputs(unit, d)) for d, c in inputs]
        watch = _train_block(training, text, learner, *streams, advance)
        say(watch.summary(f"{block.name}: relative square error"))
        best = merged(learner.unit, *watch.state) if watch.improved else block
        gained += watch.improved
        units.append(best)
        after = frozen(best)
        inputs = [(stream.targets, _outputs(after, stream.converted)) for stream in streams]
    return graph.with_units((*units, graph.epilogue)) if gained else None


def _train_block(
    training: Training,
    text: Text,
    learner: Learner,
    stream: _Stream,
    held_out: _Stream,
    advance: Callable[[int], None],
) -> Watch:
    """Trains one block."""
    # What the block adds to the stream, so that losses of blocks can be compared.
    pairs = zip(stream.targets, stream.dense, strict=True)
    scale = float(np.mean([np.mean((y - x) ** 2) for y, x in pairs]))

    def error(output, target):
        return jnp.mean((output - target) ** 2) / scale

    slope = jax.jit(jax.grad(error))

    def held_out_loss() -> float:
        pairs = zip(held_out.converted, held_out.targets, strict=True)
        outputs = ((forward(learner.unit, learner.parameters, x), y) for x, y in pairs)
        return float(np.mean([error(output, y) for output, y in outputs]))

    def step(batch: np.ndarray, share: float) -> None:
        x, y = (
            jnp.concatenate([values[i] for i in batch])
            for values in (stream.converted, stream.targets)
        )
        gradient = slope(forward(learner.unit, learner.parameters, x), y)
        learner.step(backward(learner.unit, learner.parameters, x, gradient)[0], share)

    return train(training, text, [learner], step, held_out_loss, advance)


def _embedded(dense: Graph, converted: Graph, windows: np.ndarray) -> tuple[Values, Values]:
    """What enters the first block in both models, of windows int32 [n, T]."""
    tokens = [jnp.asarray(windows[i : i + 1], jnp.int32) for i in range(len(windows))]
    return (
        _outputs(frozen(dense.prologue), tokens),
        _outputs(frozen(converted.prologue), tokens),
    )


def _outputs(unit: TrainableUnit, inputs: Iterable) -> Values:
    """The outputs of a unit in which nothing is trained."""
    return [np.asarray(forward(unit, {}, x)) for x in inputs]
