"""What a model runs: the compiled functions of its units, and one step of decoding made of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atd.ir import INT8, Block
from atd.models import execute
from atd.models.ops import Weights
from atd.parallel.devices import CACHE, ROWS, SHARES, WHOLE, Devices


class Program:
    """The compiled functions of all blocks that read the same and lie on the devices alike.

    forward     (weights, x) -> output
    step        (weights, x, positions, cache) -> (output, new cache); positions None: 0 ... T-1
    logits      (weights, hidden [..., D], embedding or None) -> logits float32 [..., V]
    """

    def __init__(
        self,
        block: Block,
        kernel: str | None,
        cuts: Collection[str] = (),
        devices: Devices | None = None,
    ):
        """Compiles nothing yet.

        Args:
            block: what a device runs.
            kernel: backend of `atd.kernels.matmul`; None: what suits each weight.
            cuts: nodes of whose weights a device has a share.
            devices: those that run it; None: one.
        """
        with_weights = [node.name for node in block.nodes if node.weights]
        block = execute.structure_of(block).block

        def forward(weights, x):
            return execute.output(block, weights, x, backend=kernel)

        def step(weights, x, positions, cache):
            values, cache = execute.run(
                block, weights, {"x": x}, positions=positions, cache=cache, backend=kernel
            )
            return values[block.output], cache

        def logits(weights, hidden, embedding):
            x = hidden.reshape(1, -1, hidden.shape[-1])  # [1, positions, D]
            value = execute.output(block, weights, x, embedding=embedding, backend=kernel)
            return value.reshape(*hidden.shape[:-1], -1).astype(jnp.float32)

        if devices is not None:
            weights = {name: SHARES if name in cuts else WHOLE for name in with_weights}
            embedding = SHARES if devices.model > 1 else WHOLE
            forward = devices.over(forward, (weights, ROWS), ROWS)
            step = devices.over(step, (weights, ROWS, ROWS, CACHE), (ROWS, CACHE))
            logits = devices.over(logits, (weights, ROWS, embedding), ROWS)
        self.forward = jax.jit(forward)
        self.step = jax.jit(step, donate_argnums=3)
        self.logits = jax.jit(logits)


def attention_shapes(block: Block) -> tuple[tuple[str, int, int, bool], ...]:
    """(name, kv_heads, head_dim, in 8 bits) of the attention nodes, which need a cache."""
    found = ((node.name, node.attrs) for node in block.nodes if node.op == "attention")
    return tuple((name, a["kv_heads"], a["head_dim"], a.get("kv") == INT8) for name, a in found)


@dataclass(frozen=True, eq=False)
class Plan:
    """The part of a model that is no array; hashed by identity, so that jit takes the model."""

    config: dict
    backend: str
    dtype: str
    prologue: Program
    blocks: tuple[Program, ...]
    epilogue: Program
    devices: Devices | None
    vocabulary: int
    embed: str  # the prologue's embed node
    tied: bool  # the epilogue takes the embedding's weight
    attention: tuple[tuple[tuple[str, int, int, bool], ...], ...]  # by block: `attention_shapes`

    @property
    def kv(self) -> str:
        """How keys and values are cached: int8, or model."""
        return INT8 if any(node[-1] for nodes in self.attention for node in nodes) else "model"


def steps_at_once(backend: str) -> bool:
    """Returns whether a step is one compiled function, rather than one per block.

    A GPU is done with a block before the host has called the next, and so are the kernels of
    backend `cpu`; XLA's products on a CPU take longer to compile than this gains.
    """
    return jax.default_backend() == "gpu" or backend == "cpu"


def one_step(plan: Plan, weights: Sequence[Weights], token, positions: jax.Array, blocks):
    """One step of decoding: (logits float32 [B, V], the next positions, the blocks' caches)."""
    x = plan.prologue.forward(weights[0], _as_column(token))
    filled = []
    for program, of_block, slots in zip(plan.blocks, weights[1:-1], blocks, strict=True):
        x, slots = program.step(of_block, x, positions, slots)
        filled.append(slots)
    return _only_row(logits_of(plan, weights[0], weights[-1], x)), _next(positions), tuple(filled)


def logits_of(plan: Plan, prologue: Weights, epilogue: Weights, hidden: jax.Array) -> jax.Array:
    """`Model.logits`, of the weights of prologue and epilogue."""
    embedding = prologue[plan.embed]["weight"] if plan.tied else None
    return plan.epilogue.logits(epilogue, hidden, embedding)


whole_step = jax.jit(one_step, static_argnames="plan", donate_argnames="blocks")


_as_column = jax.jit(lambda token: jnp.asarray(token, jnp.int32)[:, None])  # [B] -> [B, 1]
_only_row = jax.jit(lambda logits: logits[:, 0])  # [B, 1, V] -> [B, V]
_next = jax.jit(lambda positions: positions + 1)
