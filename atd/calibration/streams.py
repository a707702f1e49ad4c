"""Runs text through the dense model and the model as far as it is quantized, unit by unit.

Two streams of the same tokens stand in front of the unit that is being worked on: `dense`, the
residual stream of the model in front of the first pass that asks, and `quantized`, that of the
model with all earlier units as they will be written. Within the unit, values are computed when they
are asked for and dropped when nothing can ask again.

Inputs of a linear in the quantized stream are made by the unit's own earlier linears as they were
just quantized, so a unit's linears are worked on in order of execution.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from atd.calibration.windows import tokens_digest
from atd.host import return_freed
from atd.ir import Block
from atd.models.execute import compiled_node, dense_weights, needed, run
from atd.models.tokens import check_tokens

LARGE = 128 << 20  # bytes of a value, behind which freed memory is given back, which takes time
BATCH = 4096  # most positions that run together, unless one window has more


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a linear's inputs, X_d in the dense stream and X_q in the quantized one.

    Products are float32, sums over batches float64.
    """

    # H = X_q' X_q / n, float32 [in, in]: what error feedback weighs errors with
    hessian: np.ndarray
    cross: np.ndarray  # C = X_d' X_q / n, float32 [in, in]: what its target is corrected by
    positions: int  # n


class Calibration:
    """The two streams of a run over calibration text."""

    def __init__(self, tokens: np.ndarray):
        """tokens: int32 [windows, context]."""
        self.tokens = tokens
        self.digest = tokens_digest(tokens)
        windows = max(1, BATCH // tokens.shape[1])
        batches = [
            np.asarray(tokens[i : i + windows], np.int32) for i in range(0, len(tokens), windows)
        ]
        self._dense, self._quantized = _Stream(batches), _Stream(batches)
        self._moments: dict[str, Moments] = {}

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

    def moments(self, full_name: str) -> Moments:
        """Returns the moments of what a linear of the unit reads.

        Linears that share an input share them.

        Args:
            full_name: the linear's.
        """
        unit = self._dense.block
        node = next(node for node in unit.nodes if unit.full_name(node) == full_name)
        (value,) = node.inputs
        if value not in self._moments:
            self._moments[value] = _moments(self._dense.value(value), self._quantized.value(value))
        return self._moments[value]


class _Stream:
    """One model's values in all batches: its input, and the watched ones inside the unit."""

    def __init__(self, batches: list):
        self.x = batches
        self.block = Block("", ())
        self._values: dict[str, list] = {}
        self._readers: Counter = Counter()

    def enter(self, block: Block) -> None:
        self.block, self._values = block, {"x": self.x}
        self._readers = Counter(value for node in block.nodes for value in node.inputs)

    def leave(self) -> None:
        self.x, self._values = self.value(self.block.output), {}

    def value(self, name: str) -> list[jax.Array]:
        """Returns the value of a node in each batch, [B, T, features].

        What it needs is computed with it, batch by batch: of what nobody reads afterwards, as an
        MLP's gate and up, one batch is there at a time.
        """
        if name not in self._values:
            nodes = needed(self.block, self._values, [name])
            for node in nodes:
                self._readers.subtract(node.inputs)
            known = {source for node in nodes for source in node.inputs if source in self._values}
            kept = [node.name for node in nodes if node.name == name or self._readers[node.name]]
            weights, found = dense_weights(nodes), {value: [] for value in kept}
            for i in range(len(self.x)):
                values = {source: self._values[source][i] for source in known}
                values, _ = run(self.block, weights, values, kept, run_node=compiled_node)
                for value in kept:
                    found[value].append(values[value])
            self._values |= found
            for source in known - {"x"}:
                if not self._readers[source]:
                    del self._values[source]
            if sum(batch.nbytes for batch in found[name]) > LARGE:
                return_freed()
        return self._values[name]


def _loaded_once(block: Block) -> Block:
    """The block with weights that are kept once loaded: shard and stream ask for the same ones."""
    return block.map_weights(lambda ref: replace(ref, load=cache(ref.load)))


@jax.jit
def _products(dense, quantized):
    """[B, T, in] twice -> X_q' X_q, X_d' X_q, both [in, in]."""
    dense, quantized = (x.reshape(-1, x.shape[-1]) for x in (dense, quantized))
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return product(quantized.T, quantized), product(dense.T, quantized)


def _moments(dense: list, quantized: list) -> Moments:
    width = quantized[0].shape[-1]
    sums = np.zeros((2, width, width))
    for d, q in zip(dense, quantized, strict=True):
        sums += np.stack([np.asarray(product, np.float64) for product in _products(d, q)])
    positions = sum(q.shape[0] * q.shape[1] for q in quantized)
    hessian, cross = (sums / positions).astype(np.float32)
    return Moments(hessian, cross, positions)
