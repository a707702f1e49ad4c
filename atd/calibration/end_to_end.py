"""Trains end to end against KL(dense || converted) of the next tokens, all blocks at once.

One unit's gradient is in memory at a time (gradient checkpointing per unit).
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from atd.calibration.gradients import (
    backward,
    divergence,
    embedding_backward,
    embedding_matrix,
    forward,
    in_float32,
)
from atd.calibration.trainable import frozen, merged
from atd.calibration.training import Learner, Text, Training, train
from atd.host import return_freed, return_freed_from_now_on
from atd.ir import Graph
from atd.progress import Progress, Report, Say, unheard

POSITIONS = 128  # whose logits exist at a time, where the context is a multiple of it


def train_end_to_end(
    training: Training,
    graph: Graph,
    dense: Graph,
    text: Text,
    *,
    say: Say = print,
    progress: Report = unheard,
) -> Graph | None:
    """Returns the converted model `graph`, closer to the dense one; None where nothing improved."""
    return_freed_from_now_on()
    targets, held_out_targets = (
        _hidden(dense, windows, text.batch) for windows in (text.train, text.held_out)
    )
    model = _Converted(training, graph, dense)

    def step(batch: np.ndarray, share: float) -> None:
        model.step(text.train[batch], targets[batch], share)
        return_freed()

    def held_out_loss() -> float:
        parts = [slice(i, i + text.batch) for i in range(0, len(text.held_out), text.batch)]
        losses = [model.loss(text.held_out[part], held_out_targets[part]) for part in parts]
        return float(np.average(losses, weights=[len(text.held_out[part]) for part in parts]))

    def advance(done: int) -> None:
        progress(Progress("calibrate", done, training.steps, "steps"))

    watch = train(training, text, model.learners, step, held_out_loss, advance)
    say(watch.summary("KL(dense || converted)"))
    if not watch.improved:
        return None
    pairs = zip(model.learners, watch.state, strict=True)
    return graph.with_units(tuple(merged(learner.unit, best) for learner, best in pairs))


class _Converted:
    """The converted model as it is trained, and the heads of both models."""

    def __init__(self, training: Training, graph: Graph, dense: Graph):
        optimizer = training.optimizer()
        self.learners = [Learner(training.unit(block), optimizer) for block in graph.units]
        self._prologue, *self._blocks, self._head = self.learners
        self._tied = graph.is_tied
        self._teacher = frozen(dense.epilogue)
        self._teacher_embedding = None
        if dense.is_tied:
            self._teacher_embedding = embedding_matrix(frozen(dense.prologue), {})
        # By the head's parameters, the hidden states, and where the head is the embedding by that.
        self._by_embedding = self._tied and bool(self._prologue.parameters)
        self._measure = jax.jit(self._divergence)
        self._differentiate = jax.jit(self._gradients)

    def _divergence(self, *arguments):
        """Mean over windows [B, T, D], some positions at a time: of no more there are logits."""
        parameters, hidden, embedding, target, *_ = arguments
        part, pairs = self._part(arguments), _parts(hidden, target)
        return jnp.mean(
            jax.lax.map(lambda pair: part(parameters, pair[0], embedding, pair[1]), pairs)
        )

    def _gradients(self, *arguments):
        """Gradients of `_divergence`: each part goes forward and at once back."""
        parameters, hidden, embedding, target, *_ = arguments
        part, pairs = self._part(arguments), _parts(hidden, target)
        by = (0, 1, 2) if self._by_embedding else (0, 1)

        def add(sums, pair):
            by_head, at_hidden, *rest = jax.grad(part, by)(parameters, pair[0], embedding, pair[1])
            return jax.tree.map(jnp.add, sums, (by_head, *rest)), at_hidden

        moved = (parameters, embedding) if self._by_embedding else (parameters,)
        sums, at_hidden = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, moved), pairs)
        by_head, *rest = jax.tree.map(lambda total: total / len(at_hidden), sums)
        return by_head, at_hidden.reshape(hidden.shape) / len(at_hidden), *rest

    def _part(self, arguments):
        """The divergence of some positions, by the head's parameters, the hidden states [P, D] in
        front of both heads, and the embedding.

        Weights are arguments, or they would be constants of the compiled program.
        """
        fixed, teacher_fixed, teacher_embedding = arguments[4:]
        head = replace(self._head.unit, fixed=fixed)
        teacher = replace(self._teacher, fixed=teacher_fixed)

        def part(parameters, hidden, embedding, target):
            return divergence(
                head, parameters, hidden, teacher, target, embedding, teacher_embedding
            )

        return part

    def _arguments(self, hidden, target) -> tuple:
        """The arguments of `_divergence`."""
        embedding = None
        if self._tied:
            embedding = embedding_matrix(self._prologue.unit, self._prologue.parameters)
        fixed = self._head.unit.fixed, self._teacher.fixed, self._teacher_embedding
        return in_float32(self._head.parameters), hidden, embedding, target, *fixed

    def _run(self, tokens) -> tuple[list, jax.Array]:
        """Inputs of prologue and blocks, and the hidden states behind the last one."""
        x, inputs = jnp.asarray(tokens, jnp.int32), []
        for learner in self.learners[:-1]:
            inputs.append(x)
            x = forward(learner.unit, learner.parameters, x)
        return inputs, x

    def loss(self, tokens, target) -> float:
        """KL(dense || converted), nats per position; target: the dense model's hidden states."""
        return float(self._measure(*self._arguments(self._run(tokens)[1], target)))

    def step(self, tokens, target, share: float) -> None:
        """Runs forward, then backward unit by unit, and updates each once its gradient is known."""
        inputs, hidden = self._run(tokens)
        by_head, gradient, *by_embedding = self._differentiate(*self._arguments(hidden, target))
        self._head.step(by_head, share)
        for learner, x in zip(reversed(self._blocks), reversed(inputs[1:]), strict=True):
            by_parameter, gradient = backward(learner.unit, learner.parameters, x, gradient)
            learner.step(by_parameter, share)
        prologue = self._prologue
        if prologue.parameters:
            by_parameter, _ = backward(prologue.unit, prologue.parameters, inputs[0], gradient)
            if self._by_embedding:
                tied = embedding_backward(prologue.unit, prologue.parameters, by_embedding[0])
                by_parameter = jax.tree.map(jnp.add, by_parameter, tied)
            prologue.step(by_parameter, share)


def _parts(*values):
    """[B, T, D] each -> [n, P, D], as few positions at a time as POSITIONS has it."""
    length = values[0].shape[1]
    step = next((n for n in range(min(POSITIONS, length), 31, -1) if length % n == 0), length)
    return tuple(x.reshape(-1, step, x.shape[-1]) for x in values)


def _hidden(graph: Graph, windows: np.ndarray, batch: int) -> np.ndarray:
    """The residual stream in front of the epilogue, float32 [n, T, D]; loads unit by unit."""
    values = [jnp.asarray(windows[i : i + batch], jnp.int32) for i in range(0, len(windows), batch)]
    for block in graph.units[:-1]:
        unit = frozen(block)
        values = [forward(unit, {}, x) for x in values]
    return np.concatenate([np.asarray(x) for x in values])
