"""The engine: `run` executes the nodes of a unit (prologue, block or epilogue) for all who ask.

Models run units with caches, and with kernels that compute several nodes at once. Calibration runs
parts of a unit and takes values inside it. Gradients are by weights, or by offsets of such values.
`atd.models.ops` has the reference of each op, `atd.models.fusion` says which nodes kernels take
together.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as cached
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from atd.ir import OPS, Block, Node
from atd.kernels import matmul as kernels
from atd.models import fusion, ops
from atd.models.ops import Cache, Weights
from atd.models.rope import rope_frequencies
from atd.weights import Dense, Weight

Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class Structure:
    """What the values of a block depend on besides its weights: equal ones share compilations.

    Hashable, so that it can be a static argument of `jax.jit`.
    """

    text: str
    block: Block = field(compare=False)


def structure_of(block: Block) -> Structure:
    """Returns the block without its name, its weights and what passes noted in attrs for passes."""
    bare = Block("", tuple(_bare(node) for node in block.nodes))
    return Structure(str(bare), bare)


def _bare(node: Node) -> Node:
    """The node without weights, which may keep data alive, and with the attrs that its op reads."""
    op = OPS[node.op]
    attrs = {key: node.attrs[key] for key in (*op.attrs, *op.optional_attrs) if key in node.attrs}
    return Node(node.name, node.op, node.inputs, {}, attrs)


def dense_weights(nodes: Iterable[Node]) -> Weights:
    """Loads all weights of the nodes, dense and in float32."""

    def dense(node: Node) -> dict[str, Weight]:
        return {slot: Dense(jnp.asarray(ref.dense())) for slot, ref in node.weights.items()}

    return {node.name: dense(node) for node in nodes}


def run(
    block: Block,
    weights: Weights,
    known: Mapping[str, Array],
    wanted: Sequence[str] | None = None,
    *,
    positions: jax.Array | None = None,
    cache: Mapping[str, Cache] | None = None,
    embedding: Weight | None = None,
    backend: str | None = None,
    offsets: Mapping[str, jax.Array] | None = None,
    run_node: Callable[..., tuple[jax.Array, Cache | None]] = ops.run_node,
) -> tuple[dict[str, jax.Array], dict[str, Cache]]:
    """Executes the nodes that the wanted values need, in order.

    Args:
        block: a unit; its name and its nodes' weights are not looked at.
        weights: by node and slot.
        known: values that are there already, by name, each [B, T, features]: the block's input as
            "x" (token ids [B, T] in the prologue), or values inside it.
        wanted: names of the values to return; None: the last node's, the block's output.
        positions: int32 [B, T], where each token stands in its sequence; None: the sequences begin
            here, 0 ... T-1.
        cache: keys and values so far of each attention node. With positions, the tokens are
            appended to it and attend to all of it; without, they begin the sequences, attend to
            themselves and fill the cache. None: no cache.
        embedding: the weight of a linear with `tied_to`.
        backend: of `atd.kernels.matmul`, for weights that are not dense.
        offsets: what is added to values, by name: their gradient is that of the value.
        run_node: `ops.run_node`, or `compiled_node` to compile each node by itself.

    Returns:
        The wanted values by name, and the new cache.
    """
    wanted = (block.output,) if wanted is None else wanted
    offsets, cache = offsets or {}, cache or {}
    values: dict[str, jax.Array] = {name: jnp.asarray(value) for name, value in known.items()}
    new_cache: dict[str, Cache] = {}

    def keep(node: Node, value: jax.Array, places: Cache | None) -> None:
        values[node.name] = value + offsets[node.name] if node.name in offsets else value
        if places is not None:
            new_cache[node.name] = places

    def run_together(step: fusion.Product | fusion.Attention) -> bool:
        """Whether there are kernels for all nodes at once, which have then run."""
        *inner, last = step.nodes
        if any(node.name in wanted or node.name in offsets for node in inner):
            return False
        if isinstance(step, fusion.Product):
            value, places = _product(step, values, weights, embedding, backend), None
        else:
            value, places = _attend(step, values, positions, cache.get(last.name), backend)
        if value is not None:
            keep(last, value, places)
        return value is not None

    for step in fusion.plan(replace(block, nodes=needed(block, known, wanted)), weights):
        if isinstance(step, Node) or not run_together(step):
            for node in (step,) if isinstance(step, Node) else step.nodes:
                if node.name not in values:  # a norm that another linear reads may have run
                    inputs = [values[name] for name in node.inputs]
                    mine, places = weights.get(node.name, {}), cache.get(node.name)
                    if node.op == "rope":
                        places = next(iter(cache.values()), None)
                    keep(node, *run_node(node, inputs, mine, positions, places, embedding, backend))
    return {name: values[name] for name in wanted}, new_cache


def output(block: Block, weights: Weights, x: Array, **options) -> jax.Array:
    """Returns the block's output for its input x; options as in `run`."""
    return run(block, weights, {"x": x}, **options)[0][block.output]


@partial(jax.jit, static_argnames="structure")
def forward(structure: Structure, weights: Weights, x, embedding: Weight | None = None):
    """Returns `output` by a compiled function, which all units of one structure share."""
    return output(structure.block, weights, x, embedding=embedding)


def needed(block: Block, known: Collection[str], wanted: Sequence[str]) -> tuple[Node, ...]:
    """Returns the nodes that have to run, in order, for wanted values from the known ones."""
    missing = {name for name in wanted if name not in known}
    for node in reversed(block.nodes):
        if node.name in missing:
            missing |= {value for value in node.inputs if value not in known}
    return tuple(node for node in block.nodes if node.name in missing)


def compiled_node(
    node: Node, inputs, weights: dict[str, Weight], positions, places, embedding, backend
) -> tuple[jax.Array, Cache | None]:
    """Runs a node as `ops.run_node` does, compiled by itself.

    Nodes of one op and attrs share it, whatever they are called.
    """
    compiled = _compiled(node.op, tuple(sorted(_bare(node).attrs.items())), backend)
    return compiled(inputs, weights, positions, places, embedding)


@cached
def _compiled(op: str, attrs: tuple, backend: str | None) -> Callable:
    return jax.jit(partial(ops.run_node, Node("value", op, (), {}, dict(attrs)), backend=backend))


def _product(
    product: fusion.Product,
    values: dict[str, jax.Array],
    weights: Weights,
    embedding: Weight | None,
    backend: str | None,
) -> jax.Array | None:
    """The value of a product by kernels that compute all of it; None where none do here."""
    mine = weights.get(product.linear.name, {})
    weight, x = mine.get("weight") or embedding, values[product.source]
    if isinstance(weight, Dense | None):
        return None
    norm = None
    if product.norm is not None:
        gain = jnp.asarray(weights[product.norm.name]["weight"].dequantize())
        norm = kernels.Norm(gain, product.norm.attrs["eps"])
    residual = None if product.residual is None else values[product.residual]
    how = {"int8": ops.reads_int8(product.linear), "backend": backend}
    y = kernels.fused(x, weight, norm, residual, product.gated, **how)
    return y if y is None or "bias" not in mine else y + mine["bias"].dequantize().astype(y.dtype)


def _attend(
    found: fusion.Attention,
    values: dict[str, jax.Array],
    positions: jax.Array | None,
    places: Cache | None,
    backend: str | None,
) -> tuple[jax.Array, Cache] | tuple[None, None]:
    """An attention by one kernel: (value, new cache), or (None, None) where none computes it."""
    q, k, v = ((values[name], first) for name, first in found.parts)
    if places is None or q[0].shape[1] > 1:
        return None, None
    positions = ops.from_start(q[0]) if positions is None else positions
    rope, attrs = found.rope.attrs, found.attention.attrs
    frequencies = rope_frequencies(rope["head_dim"], rope["theta"], rope["scaling"])
    attended = kernels.attend(
        q, k, v, positions, places, frequencies, attrs["heads"], attrs["window"], backend=backend
    )
    return attended or (None, None)
