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
        self._measure = jax.jit(self._divergence)
        self._differentiate = jax.jit(self._gradients)

    def _divergence(self, moving, fixed, hidden, target):
        """Mean over windows [B, T, D], some positions at a time: of no more there are logits."""
        pairs = _parts(hidden, target)
        return jnp.mean(jax.lax.map(lambda pair: self._part(moving, fixed, *pair), pairs))

    def _gradients(self, moving, fixed, hidden, target):
        """Gradients of `_divergence` by what moves and by the hidden states: each part goes forward
        and at once back.
        """

        def add(sums, pair):
            by_moving, at_hidden = jax.grad(self._part, (0, 2))(moving, fixed, *pair)
            return jax.tree.map(jnp.add, sums, by_moving), at_hidden

        zeros = jax.tree.map(jnp.zeros_like, moving)
        sums, at_hidden = jax.lax.scan(add, zeros, _parts(hidden, target))
        by_moving = jax.tree.map(lambda total: total / len(at_hidden), sums)
        return by_moving, at_hidden.reshape(hidden.shape) / len(at_hidden)

    def _part(self, moving, fixed, hidden, target):
        """The divergence of some positions, hidden states [P, D] in front of both heads."""
        parameters, embedding = moving
        head_fixed, embedding_fixed, teacher_fixed, teacher_embedding = fixed
        head = replace(self._head.unit, fixed=head_fixed)
        teacher = replace(self._teacher, fixed=teacher_fixed)
        embedding = embedding_fixed if embedding is None else embedding
        return divergence(head, parameters, hidden, teacher, target, embedding, teacher_embedding)

    def _heads(self) -> tuple[tuple, tuple]:
        """What moves and what stays of both heads: a tied embedding is in one of the two.

        Weights are arguments of `_divergence`, or they would be constants of the compiled program.
        """
        prologue, embedding = self._prologue, None
        if self._tied:
            embedding = embedding_matrix(prologue.unit, prologue.parameters)
        moves, stays = (embedding, None) if prologue.parameters else (None, embedding)
        fixed = self._head.unit.fixed, stays, self._teacher.fixed, self._teacher_embedding
        return (in_float32(self._head.parameters), moves), fixed

    def _run(self, tokens) -> tuple[list, jax.Array]:
        """Inputs of prologue and blocks, and the hidden states behind the last one."""
        x, inputs = jnp.asarray(tokens, jnp.int32), []
        for learner in self.learners[:-1]:
            inputs.append(x)
            x = forward(learner.unit, learner.parameters, x)
        return inputs, x

    def loss(self, tokens, target) -> float:
        """KL(dense || converted), nats per position; target: the dense model's hidden states."""
        return float(self._measure(*self._heads(), self._run(tokens)[1], target))

    def step(self, tokens, target, share: float) -> None:
        """Runs forward, then backward unit by unit, and updates each once its gradient is known."""
        inputs, hidden = self._run(tokens)
        (by_head, by_embedding), gradient = self._differentiate(*self._heads(), hidden, target)
        self._head.step(by_head, share)
        for learner, x in zip(reversed(self._blocks), reversed(inputs[1:]), strict=True):
            by_parameter, gradient = backward(learner.unit, learner.parameters, x, gradient)
            learner.step(by_parameter, share)
        prologue = self._prologue
        if prologue.parameters:
            by_parameter, _ = backward(prologue.unit, prologue.parameters, inputs[0], gradient)
            if by_embedding is not None:
                tied = embedding_backward(prologue.unit, prologue.parameters, by_embedding)
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
