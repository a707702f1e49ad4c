"""Takes gradients through a converted model, one trainable unit at a time.

Gradient checkpointing per unit (embedding, block, final norm and head): `forward` keeps nothing but
a unit's input, and `backward` computes the unit again. Both are compiled once for all units of one
structure, whatever their bases, so compile time does not grow with depth, and the gradient of one
unit at a time exists.
"""

from functools import partial

import jax
import jax.numpy as jnp

from atd.calibration.trainable import (
    Deltas,
    Parameters,
    QuantizedMatrix,
    TrainableUnit,
    weight_at,
    weights_at,
)
from atd.models import execute
from atd.models.execute import Structure
from atd.weights import Dense


def forward(unit: TrainableUnit, parameters: Parameters, x) -> jax.Array:
    """Returns the unit's output for x [B, T, D] (token ids [B, T] in the prologue)."""
    return execute.forward(unit.structure, weights_at(unit, parameters), x)


def backward(
    unit: TrainableUnit, parameters: Parameters, x, gradient
) -> tuple[Parameters, jax.Array | None]:
    """Takes a gradient back through a unit.

    Args:
        x: the unit's input, [B, T, D] (token ids [B, T] in the prologue).
        gradient: at the unit's output, [B, T, D].

    Returns:
        The gradients of the parameters, and that at the input; token ids have none: None.
    """
    weights = weights_at(unit, parameters)
    rows = tuple(name for name in parameters if _only_rows(unit, name, parameters[name]))
    changed = {name: weights[name]["weight"] for name in parameters if name not in rows}
    by_weight, by_row, at_input = _backward(unit.structure, changed, rows, weights, x, gradient)
    by_parameter = {
        name: _by_deltas(unit.fixed[name]["weight"], parameters[name], gradient.array)
        for name, gradient in by_weight.items()
    }
    for name, slope in by_row.items():
        by_parameter[name] = {"scales": slope.reshape(parameters[name]["scales"].shape)}
    return by_parameter, at_input


def _only_rows(unit: TrainableUnit, name: str, deltas: Deltas) -> bool:
    """Whether all that moves of a node is one factor for each of a linear's outputs."""
    scales = deltas.get("scales")
    if scales is None or "codes" in deltas or unit.block.node(name).op != "linear":
        return False
    return scales.size == len(scales) == unit.block.node(name).weights["weight"].type.shape[0]


@partial(jax.jit, static_argnames=("structure", "rows"))
def _backward(structure: Structure, changed, rows: tuple[str, ...], weights, x, gradient):
    """(gradients by the changed weights, by the logarithm of each output's scale, by x), of dense
    weights.

    With y = W x, an output's scale s has s dL/ds = sum_t g_t y_t, which takes no product; the
    gradient by all of W would take one as large as that forward.

    Each kind of ternary weight has a small program of its own (`_by_deltas`), or every combination
    of them in a unit would be compiled.
    """
    block = structure.block
    has_input = not jnp.issubdtype(x.dtype, jnp.integer)  # token ids have no gradient

    def output(changed, offsets, at):
        merged = weights | {
            name: weights[name] | {"weight": weight} for name, weight in changed.items()
        }
        known = {"x": at if has_input else x}
        found, _ = execute.run(block, merged, known, [block.output, *rows], offsets=offsets)
        return found[block.output], {name: found[name] for name in rows}

    offsets = {name: jnp.zeros((*x.shape[:2], len(weights[name]["weight"].array))) for name in rows}
    _, pull, outputs = jax.vjp(output, changed, offsets, x if has_input else (), has_aux=True)
    by_weight, at_output, at_input = pull(gradient)
    by_row = {}
    for name, y in outputs.items():
        bias = weights[name].get("bias")
        y = y if bias is None else y - bias.array
        by_row[name] = jnp.sum(at_output[name] * y, axis=(0, 1))
    return by_weight, by_row, at_input if has_input else None


@jax.jit
def _by_deltas(fixed: QuantizedMatrix | jax.Array, deltas: Deltas, gradient) -> Deltas:
    """The gradient at a weight -> those by its deltas."""
    return jax.vjp(partial(weight_at, fixed), in_float32(deltas))[1](gradient)[0]


def in_float32(parameters):
    """Returns parameters in float32: gradients have their dtype, and may be too small for less."""
    return jax.tree.map(lambda p: p.astype(jnp.float32), parameters)


def embedding_matrix(prologue: TrainableUnit, parameters: Parameters) -> jax.Array:
    """Returns the embedding [V, D], which a tied head multiplies by."""
    name = _embed_name(prologue)
    return weight_at(prologue.fixed[name]["weight"], parameters.get(name, {}))


def embedding_backward(prologue: TrainableUnit, parameters: Parameters, gradient) -> Parameters:
    """Returns the parameters' gradients from that of the embedding [V, D]; 0 for other nodes."""
    name = _embed_name(prologue)
    by_deltas = _by_deltas(prologue.fixed[name]["weight"], parameters.get(name, {}), gradient)
    return {
        other: by_deltas if other == name else jax.tree.map(jnp.zeros_like, deltas)
        for other, deltas in parameters.items()
    }


def _embed_name(prologue: TrainableUnit) -> str:
    return next(node.name for node in prologue.block.nodes if node.op == "embed")


def divergence(
    head: TrainableUnit,
    parameters: Parameters,
    hidden,
    teacher: TrainableUnit,
    target,
    embedding: jax.Array | None,
    teacher_embedding: jax.Array | None,
) -> jax.Array:
    """Returns the mean KL(dense || converted) over positions, in nats.

    Args:
        head, parameters: the converted model's epilogue.
        hidden: its input, [P, D].
        teacher: the dense model's epilogue.
        target: its input, [P, D].
        embedding, teacher_embedding: what tied heads multiply by, [V, D]; None for heads with a
            matrix of their own.
    """

    def log_probabilities(unit: TrainableUnit, parameters: Parameters, x, embedding):
        tied = None if embedding is None else Dense(embedding)
        block, weights = unit.structure.block, weights_at(unit, parameters)
        return jax.nn.log_softmax(execute.output(block, weights, x[None], embedding=tied)[0])

    dense = jax.lax.stop_gradient(log_probabilities(teacher, {}, target, teacher_embedding))
    converted = log_probabilities(head, parameters, hidden, embedding)
    return jnp.mean(jnp.sum(jnp.exp(dense) * (dense - converted), axis=-1))
