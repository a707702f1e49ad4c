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
    changed = {name: weights[name]["weight"] for name in parameters}
    by_weight, at_input = _backward(unit.structure, changed, weights, x, gradient)
    by_parameter = {
        name: _by_deltas(unit.fixed[name]["weight"], parameters[name], gradient.array)
        for name, gradient in by_weight.items()
    }
    return by_parameter, at_input


@partial(jax.jit, static_argnames="structure")
def _backward(structure: Structure, changed, weights, x, gradient):
    """(gradients by the changed weights, by x), of dense weights.

    Each kind of ternary weight has a small program of its own (`_by_deltas`), or every combination
    of them in a unit would be compiled.
    """

    def output(changed, x):
        merged = {name: weights[name] | {"weight": weight} for name, weight in changed.items()}
        return execute.output(structure.block, weights | merged, x)

    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.vjp(lambda changed: output(changed, x), changed)[1](gradient)[0], None
    return jax.vjp(output, changed, x)[1](gradient)


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
