"""Runs text through the dense model and the model as far as it is quantized, unit by unit.

Two streams of the same tokens stand in front of the unit that is being worked on: `dense`, the
residual stream of the model in front of the first pass that asks, and `quantized`, that of the
model with all earlier units as they will be written. Within the unit, values are computed batch by
batch when they are asked for. What will be read again is kept where there is room for all batches
of it (`atd.calibration.room`), and computed again where there is none; a residual stream that finds
no room is kept in files.

Inputs of a linear in the quantized stream are made by the unit's own earlier linears as they were
just quantized, so a unit's linears are worked on in order of execution.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import batched, islice

import jax
import jax.numpy as jnp
import numpy as np

from atd.calibration.room import STREAM, Batches, Room
from atd.calibration.windows import tokens_digest
from atd.decomposition.second_moments import matmul, symmetric, upper_products
from atd.host import return_freed
from atd.ir import Block, Node
from atd.models.execute import compiled_node, dense_weights, needed, run
from atd.models.tokens import check_tokens
from atd.parallel.hosts import hosts
from atd.parallel.workers import on_each_device, spread_here, together, workers

LARGE = 128 << 20  # bytes of a value, behind which freed memory is given back, which takes time
Values = tuple[np.ndarray, ...]  # in one batch
BATCH = 4096  # most positions that run together, unless one window has more


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a linear's inputs, X_d in the dense stream and X_q in the quantized one.

    Products are float32, sums over batches float64. Where tokens count differently, each has its
    products times its count.
    """

    hessian: np.ndarray  # H = X_q' X_q / n, float32 [in, in]: what feedback weighs errors with
    cross: np.ndarray  # C = X_d' X_q / n, float32 [in, in]: what its target is corrected by
    positions: int  # n
    # R = (S_d - S_q)' X_q / n, float32 [out, in], where outputs are added to the residual stream S:
    # what that lacks so far, which the outputs can make up for; else None
    residual: np.ndarray | None = None


class Calibration:
    """The two streams of a run over calibration text."""

    def __init__(
        self, tokens: np.ndarray, room: Room | None = None, counts: np.ndarray | None = None
    ):
        """tokens: int32 [windows, context]; room: for the values, without a limit by default;
        counts: how much each token counts, float32 as tokens, 1 on average; None: all alike.
        """
        self.tokens = tokens
        self.digest = tokens_digest(tokens)
        room, here = room or Room(), hosts()
        mine = slice(here.process_id, None, here.count)
        batches = batches_of(np.asarray(tokens, np.int32))
        self._rounds = -(-len(batches) // workers().of_all)
        self._counts = None if counts is None else batches_of(counts)[mine]
        self._dense = Stream("dense", batches[mine], room)
        self._quantized = Stream("quantized", batches[mine], room)
        self._moments: dict[tuple[tuple[str, ...], bool], Moments] = {}

    def begin(self, dense: Block, quantized: Block) -> Block:
        """Goes to the next unit, as it was and as it becomes.

        Returns:
            The latter, with weights that are kept once they were loaded.

        Raises:
            BadInput: the unit embeds tokens, and their ids lie outside its vocabulary.
        """
        for node in dense.nodes:
            if node.op == "embed":
                check_tokens(self.tokens, node.weights["weight"].type.shape[0])
        quantized = _loaded_once(quantized)
        self._dense.enter(dense)
        self._quantized.enter(quantized)
        self._moments = {}
        return quantized

    def finish(self) -> None:
        """Moves both streams behind the unit."""
        self._dense.leave()
        self._quantized.leave()

    def moments(self, full_name: str, counted: bool = False, residual: bool = False) -> Moments:
        """Returns the moments of what a linear of the unit reads.

        Linears that share an input share them.

        Args:
            full_name: the linear's.
            counted: whether tokens count as much as was said of them, or alike.
            residual: whether to find `Moments.residual`.
        """
        unit = self._dense.block
        node = next(node for node in unit.nodes if unit.full_name(node) == full_name)
        values = (*node.inputs, *(added_to(unit, node) if residual else ()))
        if (values, counted) not in self._moments:
            streams = self._dense.each(*values), self._quantized.each(*values)
            if counted and self._counts is not None:
                streams = (_counted(values, self._counts) for values in streams)
            found = _moments(*streams, self._rounds)
            self._moments[values, counted] = found
            if found.hessian.nbytes > LARGE:
                return_freed()
        return self._moments[values, counted]


def added_to(unit: Block, node: Node) -> Sequence[str]:
    """Returns the value that a node's output is added to, if that is all that becomes of it."""
    readers = unit.readers(node.name)
    if [reader.op for reader in readers] != ["add"]:
        return ()
    return [value for value in readers[0].inputs if value != node.name]


class Stream:
    """One model's values in all batches: its input, and those inside the unit that are kept."""

    def __init__(self, name: str, batches: list[np.ndarray], room: Room):
        self._name, self._room = name, room
        self._x = Batches(batches)
        self._placed, self._taken = False, 0  # whether it has its room or files; bytes of room
        self.block = Block("", ())
        self._values: dict[str, list[np.ndarray]] = {}
        self._run: set[str] = set()  # nodes that need not run again for others' sake

    def enter(self, block: Block) -> None:
        self.block, self._run = block, set()

    def inputs(self) -> Iterator[np.ndarray]:
        """Yields what enters the unit, in each batch."""
        yield from self._x

    def close(self) -> None:
        """Gives back the room of the residual stream, or deletes its files."""
        self._room.give_back(self._taken)
        self._x.remove()
        self._taken = 0

    def leave(self) -> None:
        """Puts the unit's output in the place of its input."""
        for i, (output,) in enumerate(self.each(self.block.output)):
            if i == 0:
                self._make_room(STREAM.itemsize * output.size * len(self._x))
            self._x[i] = output
        for name in [*self._values]:
            self._drop(name)

    def _make_room(self, bytes: int) -> None:
        """Has the residual stream in memory where there is room for it, else in files."""
        if not self._placed:
            if self._room.take(bytes):
                self._taken = bytes
            else:
                assert self._room.folder is not None
                self._x = Batches([*self._x], self._room.folder / self._name)
        self._placed = True  # it stays as wide as it is

    def each(self, *names: str) -> Iterator[Values]:
        """Yields values in each batch, [B, T, features] each: of nodes, or the unit's input "x".

        They and what is computed on the way are kept, if others will read them and there is room.
        """
        nodes = needed(self.block, {"x", *self._values}, names)
        weights = on_each_device(dense_weights(nodes))
        sources = {*names, *(source for node in nodes for source in node.inputs)}
        known, self._run = sources & self._values.keys(), self._run | {node.name for node in nodes}
        asked = [node.name for node in nodes if self._is_read(node.name)]
        wanted = [node.name for node in nodes if node.name in {*asked, *names}]

        def values_of(i: int) -> dict[str, np.ndarray]:
            values = {source: self._values[source][i] for source in known}
            if "x" in sources:
                values["x"] = self._x[i]
            found, _ = run(self.block, weights(), values, wanted, run_node=compiled_node)
            made = {v: found[v] for v in {*(asked if kept is None else kept), *names} if v in found}
            return values | {v: np.asarray(value) for v, value in made.items()}

        kept: dict[str, list[np.ndarray]] | None = None
        for batches in batched(range(len(self._x)), workers().count):
            for found in spread_here(values_of, batches):
                if kept is None:
                    room = {v: found[v].nbytes * len(self._x) for v in asked}
                    kept = {value: [] for value, bytes in room.items() if self._room.take(bytes)}
                for value, arrays in kept.items():
                    arrays.append(found[value])
                yield tuple(found[name] for name in names)
        self._values |= kept or {}
        for source in known.difference(names):
            if not self._is_read(source):
                self._drop(source)

    def _is_read(self, value: str) -> bool:
        """Whether a node that has not run reads it."""
        return any(node.name not in self._run for node in self.block.readers(value))

    def _drop(self, name: str) -> None:
        """Forgets a value that is kept."""
        bytes = self._values[name][0].nbytes * len(self._x)
        del self._values[name]
        self._room.give_back(bytes)
        if bytes > LARGE:
            return_freed()


def batches_of(array: np.ndarray) -> list[np.ndarray]:
    """Cuts [windows, context] into the batches that run together, whole windows each."""
    windows = max(1, BATCH // array.shape[1])
    return [array[i : i + windows] for i in range(0, len(array), windows)]


def _loaded_once(block: Block) -> Block:
    """The block with weights that are kept once loaded: shard and stream ask for the same ones."""
    return block.map_weights(lambda ref: replace(ref, load=cache(ref.load)))


@jax.jit
def _products(dense, quantized):
    """What a linear reads in both streams [B, T, in], and what it is added to [B, T, out], if any
    -> X_d' X_q [in, in], (S_d - S_q)' X_q [out, in], X_q' X_q in strips (`upper_products`).
    """
    dense, quantized = (
        [value.reshape(-1, value.shape[-1]) for value in values] for values in (dense, quantized)
    )
    (x_dense, *stream_dense), (x, *stream) = dense, quantized
    lack = jnp.zeros((0, x.shape[1]))
    if stream:
        lack = matmul((stream_dense[0] - stream[0]).T, x)
    return matmul(x_dense.T, x), lack, *upper_products(x)


def _counted(streams: Iterator[Values], counts: list[np.ndarray]) -> Iterator[Values]:
    """Yields [B, T, features] times the roots of [B, T]: products of two such have the counts."""
    for values, count in zip(streams, counts, strict=True):
        yield tuple(value * np.sqrt(count)[..., None] for value in values)


def _moments(dense: Iterator[Values], quantized: Iterator[Values], rounds: int) -> Moments:
    """The moments over the batches of all processes, of which each has some in every round, unless
    there are too few.
    """

    def products(values: tuple[Values, Values]) -> Values:
        count = np.asarray(values[1][0][..., 0].size, np.int64)
        return count, *map(np.asarray, _products(*values))

    pairs = zip(dense, quantized, strict=True)
    sums: list[np.ndarray] = []
    positions = 0
    for _ in range(rounds):
        for count, *found in together(products, [*islice(pairs, workers().count)]):
            sums = sums or [np.zeros(product.shape) for product in found]
            for total, product in zip(sums, found, strict=True):
                total += product
            positions += int(count)
    assert next(pairs, None) is None  # the streams keep what they keep once they are at their end
    for total in sums:
        total /= positions
    cross, lack, *strips = sums
    residual = lack.astype(np.float32) if len(lack) else None
    return Moments(symmetric(strips), cross.astype(np.float32), positions, residual)
