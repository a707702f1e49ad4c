"""calibrate: scales, norm gains and codes of a decomposed model follow a gradient toward the dense
model (optax).

1. Takes the converted model as it was written, and the dense model before the first calibrated
   pass.
2. `against = "logits"`: end to end. KL(dense || converted) of the next-token distributions, all
   blocks at once, one unit's gradient in memory at a time (checkpointing per block). `against =
   "block"`: block by block (EfficientQAT's block-AP, 2407.11062). Mean square error of a block's
   output on the quantized stream against the dense block's on the dense stream, relative to what
   the block adds to the stream.
3. What moves: `scales` (relative steps), `gains` of RMS norms, `codes` (latent weights, straight
   through; of linears). Adam for scales and gains, Adafactor for codes, so that those of the
   largest gradients move and not all alike; a few warm-up steps, cosine to zero.
4. Every eighth calibration window is held out. Their loss is looked at `checks` times. Where it got
   worse, the run goes back to the best state and on at half the rates; after `patience` such checks
   in a row it stops. A run that improved nothing says so and leaves the model as it was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atd.calibration.gradients import (
    backward,
    divergence,
    embedding_backward,
    embedding_matrix,
    forward,
    in_float32,
)
from atd.calibration.trainable import Parameters, TrainableUnit, frozen, merged, trainable
from atd.errors import BadInput, nearest
from atd.host import return_freed, return_freed_from_now_on
from atd.ir import ROTATIONS, Block, Graph
from atd.pipeline import Context, Pass
from atd.progress import Progress
from atd.weights import DenseType

AGAINST = ("logits", "block")
HELD_OUT = 8  # one window in so many
WARM_UP = 4  # steps
POSITIONS = 128  # whose logits exist at a time, where the context is a multiple of it


@dataclass(frozen=True, kw_only=True)
class Calibrate(Pass):
    """Options: see the fields."""

    name = "calibrate"
    scope = "graph"
    least_windows = HELD_OUT

    against: str = "logits"  # or "block"
    scales: bool = True
    gains: bool = True
    codes: bool = True
    steps: int = (
        40  # of the optimizer; with "block" for each block; 0: none, the model stays as it is
    )
    batch: int = 2048  # tokens a step, at least one window
    learning_rate: float = 2e-3  # of scales and gains, relative to their size
    codes_learning_rate: float = 0.02  # of latent weights, in levels
    checks: int = 10
    patience: int = 3

    def __post_init__(self):
        if self.against not in AGAINST:
            raise BadInput(
                f"calibrate.against {self.against!r} is unknown{nearest(self.against, AGAINST)}"
            )
        if not (self.scales or self.gains or self.codes):
            raise BadInput(
                "calibrate with scales, gains and codes all off has nothing to move; leave it out"
            )
        if self.steps < 0 or min(self.batch, self.checks, self.patience) < 1:
            raise BadInput(
                "calibrate: steps must be 0 or more, batch, checks and patience at least 1"
            )
        if min(self.learning_rate, self.codes_learning_rate) <= 0:
            raise BadInput("calibrate: learning rates must be above 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"activations", "written"})

    def requires(self, graph: Graph) -> str | None:
        decomposed = (node for _, node in graph.nodes() if node.name not in ROTATIONS)
        if all(
            isinstance(ref.type, DenseType) for node in decomposed for ref in node.weights.values()
        ):
            return "there is no ternary weight to calibrate; put decompose before it"
        return None

    def rewrite(self, graph: Graph, context: Context) -> Graph | None:
        if context.calibration is None or context.dense is None:
            raise BadInput(
                "pass calibrate needs calibration text and the dense model: it runs within atd.convert"
            )
        if not self.steps:
            return None
        windows = context.calibration.tokens
        held = np.arange(len(windows)) % HELD_OUT == HELD_OUT - 1
        if len(windows) < HELD_OUT:
            raise BadInput(
                f"pass calibrate holds one window in {HELD_OUT} out: {len(windows)} windows of {windows.shape[1]} tokens are too "
                f"few; give at least {HELD_OUT * windows.shape[1]:,} tokens"
            )
        size = max(1, self.batch // windows.shape[1])
        data = _Data(windows[~held], windows[held], size, np.random.default_rng(context.seed))
        tune = _against_logits if self.against == "logits" else _against_blocks
        return_freed_from_now_on()
        return tune(self, graph, context, data)

    # --- the optimizer ---

    def schedule(self) -> optax.Schedule:
        """The share of the rates that step 1, 2, ... takes: warm-up, then a cosine to zero."""
        return optax.warmup_cosine_decay_schedule(
            0.0, 1.0, min(WARM_UP, self.steps), self.steps + 1
        )

    def optimizer(self) -> optax.GradientTransformation:
        """Of what moves in one node: Adam, and Adafactor for codes, their momentum in bfloat16."""

        def labels(moves):
            return {kind: "codes" if kind == "codes" else "rest" for kind in moves}

        codes = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=2),
            optax.ema(0.9, accumulator_dtype=jnp.bfloat16),
            optax.scale_by_learning_rate(self.codes_learning_rate),
        )
        rest = optax.adam(self.learning_rate, b1=0.9, b2=0.95)
        return optax.multi_transform({"codes": codes, "rest": rest}, labels)

    def unit(self, block: Block) -> TrainableUnit:
        return trainable(block, scales=self.scales, gains=self.gains, codes=self.codes)


@dataclass
class _Data:
    """Windows to train on and windows held out, int32 [n, T]."""

    train: np.ndarray
    held: np.ndarray
    size: int  # windows a step
    rng: np.random.Generator

    def batches(self, count: int):
        """`count` batches of indices, every window once before any comes again."""
        size = min(self.size, len(self.train))
        order: list[int] = []
        for _ in range(count):
            if len(order) < size:
                order = list(self.rng.permutation(len(self.train)))
            batch, order = order[:size], order[size:]
            yield np.array(batch)


@dataclass
class _Watch:
    """Keeps the state of the least held-out loss, and knows when to go back to it and when to stop."""

    patience: int
    start: float  # the loss before the first step
    best: float
    state: list[Parameters]  # of each unit, at the best loss
    worse: int = 0  # checks in a row
    risen: tuple[
        float, ...
    ] = ()  # the loss at every check that was worse; the rates were halved after each

    def take(self, loss: float, state: list[Parameters]) -> bool:
        """Whether this is the best so far."""
        if loss < self.best:
            self.best, self.state, self.worse = loss, state, 0
            return True
        self.worse, self.risen = self.worse + 1, (*self.risen, loss)
        return False

    @property
    def improved(self) -> bool:
        return self.best < self.start

    @property
    def gave_up(self) -> bool:
        return self.worse >= self.patience

    def summary(self, what: str) -> str:
        ended = "; stopped early" if self.gave_up else ""
        if self.risen:
            ended = f"; it rose to {', '.join(f'{loss:.4f}' for loss in self.risen)}, rates halved each time{ended}"
        if not self.improved:
            return f"calibrate improved nothing: {what} on held-out windows stays {self.start:.4f}{ended}"
        return f"calibrate: {what} on held-out windows {self.start:.4f} -> {self.best:.4f}{ended}"


class _Tuned:
    """A unit, its parameters and the state of the optimizer of each node (small programs that other
    units share).
    """

    def __init__(
        self, unit: TrainableUnit, optimizer: optax.GradientTransformation, update: Callable
    ):
        self.unit, self._optimizer, self._update = unit, optimizer, update
        self.restart(unit.parameters)

    def move(self, gradients: Parameters, share: float) -> None:
        """By this share of the optimizer's rates."""
        moved = {
            name: self._update(gradients[name], self._states[name], moves, share)
            for name, moves in self.parameters.items()
        }
        self.parameters = {name: parameters for name, (parameters, _) in moved.items()}
        self._states = {name: state for name, (_, state) in moved.items()}

    def restart(self, parameters: Parameters) -> None:
        """From these, with nothing remembered of the steps before."""
        self.parameters = parameters
        self._states = {
            name: self._optimizer.init(in_float32(moves)) for name, moves in parameters.items()
        }


def _updater(optimizer: optax.GradientTransformation) -> Callable:
    @jax.jit
    def update(gradients, state, parameters, share):
        updates, state = optimizer.update(gradients, state, in_float32(parameters))
        return optax.apply_updates(parameters, jax.tree.map(lambda u: share * u, updates)), state

    return update


def _watched(
    step: Calibrate,
    data: _Data,
    tuned: Sequence[_Tuned],
    move: Callable[[np.ndarray, float], None],
    held_out: Callable[[], float],
    advance: Callable[[int], None],
) -> _Watch:
    """Moves by one batch of indices after the other, looking at the held-out loss now and then."""

    def state() -> list[Parameters]:
        return [one.parameters for one in tuned]

    start, every, schedule = held_out(), max(1, round(step.steps / step.checks)), step.schedule()
    watch = _Watch(step.patience, start, start, state())
    for i, batch in enumerate(data.batches(step.steps), start=1):
        move(batch, float(schedule(i)) / 2 ** len(watch.risen))
        advance(i)
        if (i % every == 0 or i == step.steps) and not watch.take(held_out(), state()):
            if watch.gave_up:
                break
            for one, best in zip(tuned, watch.state, strict=True):
                one.restart(best)
    return watch


# --- end to end -----------------------------------------------------------------------------------


def _against_logits(step: Calibrate, graph: Graph, context: Context, data: _Data) -> Graph | None:
    dense = context.dense
    assert dense is not None
    targets, held_targets = (
        _hidden(dense, windows, data.size) for windows in (data.train, data.held)
    )
    model = _Converted(step, graph, dense)

    def move(batch: np.ndarray, share: float) -> None:
        model.move(data.train[batch], targets[batch], share)
        return_freed()

    def held_out() -> float:
        parts = range(0, len(data.held), data.size)
        losses = [
            model.loss(data.held[i : i + data.size], held_targets[i : i + data.size]) for i in parts
        ]
        return float(np.average(losses, weights=[len(data.held[i : i + data.size]) for i in parts]))

    watch = _watched(
        step,
        data,
        model.units,
        move,
        held_out,
        lambda done: context.progress(Progress("calibrate", done, step.steps, "steps")),
    )
    context.say(watch.summary("KL(dense || converted)"))
    if not watch.improved:
        return None
    units = (
        merged(tuned.unit, parameters)
        for tuned, parameters in zip(model.units, watch.state, strict=True)
    )
    return graph.with_units(tuple(units))


class _Converted:
    """The converted model as it moves, and the heads of both models."""

    def __init__(self, step: Calibrate, graph: Graph, dense: Graph):
        optimizer = step.optimizer()
        update = _updater(optimizer)
        self.units = [_Tuned(step.unit(block), optimizer, update) for block in graph.units]
        self._prologue, *self._blocks, self._head = self.units
        self._tied = graph.is_tied
        self._teacher = frozen(dense.epilogue)
        self._teacher_table = None
        if dense.is_tied:
            self._teacher_table = embedding_matrix(frozen(dense.prologue), {})
        self._moves_table = self._tied and bool(self._prologue.parameters)
        self._measure = jax.jit(self._divergence)
        # by the head's parameters, by the hidden states, and where the head is the embedding by its
        # table
        self._differentiate = jax.jit(
            jax.grad(self._divergence, argnums=(0, 1, 2) if self._moves_table else (0, 1))
        )

    def _divergence(
        self, parameters, hidden, embedding, target, fixed, teacher_fixed, teacher_table
    ):
        """Mean over windows [B, T, D], some positions at a time, so that logits of no more exist;
        weights are arguments, or they would be constants of the compiled program."""
        head = replace(self._head.unit, fixed=fixed)
        teacher = replace(self._teacher, fixed=teacher_fixed)

        @jax.checkpoint
        def part(pair):
            return divergence(head, parameters, pair[0], teacher, pair[1], embedding, teacher_table)

        length = hidden.shape[1]
        step = next((n for n in range(min(POSITIONS, length), 31, -1) if length % n == 0), length)
        parts = (
            x.reshape(-1, step, x.shape[-1]) for x in (hidden, target)
        )  # [B T / step, step, D]
        return jnp.mean(jax.lax.map(part, tuple(parts)))

    def _arguments(self, hidden, target) -> tuple:
        embedding = (
            embedding_matrix(self._prologue.unit, self._prologue.parameters) if self._tied else None
        )
        fixed = self._head.unit.fixed, self._teacher.fixed, self._teacher_table
        return in_float32(self._head.parameters), hidden, embedding, target, *fixed

    def _run(self, tokens) -> tuple[list, jax.Array]:
        """Inputs of prologue and blocks, and the hidden states behind the last one."""
        x, inputs = jnp.asarray(tokens, jnp.int32), []
        for tuned in self.units[:-1]:
            inputs.append(x)
            x = forward(tuned.unit, tuned.parameters, x)
        return inputs, x

    def loss(self, tokens, target) -> float:
        """KL(dense || converted), mean over the positions of the windows; target: the dense model's
        hidden states.
        """
        return float(self._measure(*self._arguments(self._run(tokens)[1], target)))

    def move(self, tokens, target, share: float) -> None:
        """One step of the optimizer: forward, and backward a unit at a time, each moved as soon as
        its gradient is known.
        """
        inputs, hidden = self._run(tokens)
        moves, gradient, *by_table = self._differentiate(*self._arguments(hidden, target))
        self._head.move(moves, share)
        for tuned, x in zip(reversed(self._blocks), reversed(inputs[1:]), strict=True):
            moves, gradient = backward(tuned.unit, tuned.parameters, x, gradient)
            tuned.move(moves, share)
        prologue = self._prologue
        if prologue.parameters:
            moves, _ = backward(prologue.unit, prologue.parameters, inputs[0], gradient)
            if by_table:
                by_head = embedding_backward(prologue.unit, prologue.parameters, by_table[0])
                moves = jax.tree.map(jnp.add, moves, by_head)
            prologue.move(moves, share)


def _hidden(graph: Graph, windows: np.ndarray, batch: int) -> np.ndarray:
    """The residual stream in front of the epilogue, float32 [n, T, D]; one unit's weights in memory
    at a time.
    """
    values = [jnp.asarray(windows[i : i + batch], jnp.int32) for i in range(0, len(windows), batch)]
    for block in graph.units[:-1]:
        unit = frozen(block)
        values = [forward(unit, {}, x) for x in values]
    return np.concatenate([np.asarray(x) for x in values])


# --- block by block -------------------------------------------------------------------------------


def _against_blocks(step: Calibrate, graph: Graph, context: Context, data: _Data) -> Graph | None:
    dense = context.dense
    assert dense is not None
    optimizer = step.optimizer()
    update = _updater(optimizer)

    def inputs(windows: np.ndarray) -> tuple[list, list]:
        tokens = [jnp.asarray(windows[i : i + 1], jnp.int32) for i in range(len(windows))]
        return tuple(  # type: ignore[return-value]
            [np.asarray(forward(unit, {}, x)) for x in tokens]
            for unit in (frozen(g.prologue) for g in (dense, graph))
        )

    streams = {"train": inputs(data.train), "held": inputs(data.held)}
    units, gained = [graph.prologue], 0
    for number, (wanted, block) in enumerate(zip(dense.blocks, graph.blocks, strict=True)):
        tuned, reference = _Tuned(step.unit(block), optimizer, update), frozen(wanted)
        targets = {
            key: [np.asarray(forward(reference, {}, x)) for x in stream[0]]
            for key, stream in streams.items()
        }
        # What the block adds to the stream, so that losses of blocks can be compared.
        scale = float(
            np.mean(
                [
                    np.mean((y - x) ** 2)
                    for y, x in zip(targets["train"], streams["train"][0], strict=True)
                ]
            )
        )

        def error(output, target, scale=scale):
            return jnp.mean((output - target) ** 2) / scale

        slope = jax.jit(jax.grad(error))

        def held_out(tuned=tuned, targets=targets, error=error) -> float:
            pairs = zip(streams["held"][1], targets["held"], strict=True)
            return float(
                np.mean([error(forward(tuned.unit, tuned.parameters, x), y) for x, y in pairs])
            )

        def move(batch, share, tuned=tuned, targets=targets, slope=slope) -> None:
            x, y = (
                jnp.concatenate([stream[j] for j in batch])
                for stream in (streams["train"][1], targets["train"])
            )
            gradient = slope(forward(tuned.unit, tuned.parameters, x), y)
            tuned.move(backward(tuned.unit, tuned.parameters, x, gradient)[0], share)

        def advance(done: int, name=block.name, before=number * step.steps) -> None:
            total = len(graph.blocks) * step.steps
            context.progress(Progress("calibrate", before + done, total, "steps", name))

        watch = _watched(step, data, [tuned], move, held_out, advance)
        context.say(watch.summary(f"{block.name}: relative square error"))
        best = merged(tuned.unit, *watch.state) if watch.improved else block
        gained += watch.improved
        units.append(best)
        after = frozen(best)
        for key, stream in streams.items():
            streams[key] = (targets[key], [np.asarray(forward(after, {}, x)) for x in stream[1]])
    return graph.with_units((*units, graph.epilogue)) if gained else None
