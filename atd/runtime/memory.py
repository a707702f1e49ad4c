"""Counts the buffers of a model that reads and writes one sequence; nothing is allocated.

weights
    All of them, as they lie in memory.
cache
    Keys and values of the whole sequence.
prefill
    What reading a prompt adds, `chunk` tokens at a time: of its calls the most.
step
    What a step of decoding adds.

The last two are what XLA says of the compiled functions (`memory_analysis`): results and temporary
buffers, without those that lie in the place of an argument, and the residual stream that enters.
Kernels of backend `cpu` have work space besides, which is some rows of a matrix per thread.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.stages import Wrapped

from atd.errors import BadInput
from atd.kernels.tuning.timing import columns
from atd.models.cache import bucket
from atd.models.model import Model
from atd.models.programs import steps_at_once, whole_step


@dataclass(frozen=True)
class Memory:
    """Bytes of buffers."""

    weights: int
    cache: int
    prefill: int
    step: int

    @property
    def total(self) -> int:
        """The most at any time."""
        return self.weights + self.cache + max(self.prefill, self.step)


def count(model: Model, context: int, chunk: int) -> Memory:
    """Counts the buffers of a sequence of `context` tokens.

    Args:
        model: what `atd.load` returns; shapes are enough.
        context: tokens that the cache is for, prompt and answer.
        chunk: tokens of the prompt that are read at a time.

    Raises BadInput for less than 1, and a context beyond the model's.
    """
    if min(context, chunk) < 1:
        raise BadInput(f"context {context} and chunk {chunk} must be at least 1")
    if model.max_context and context > model.max_context:
        raise BadInput(f"a context of {context} is beyond the {model.max_context} of the model")
    blocks = jax.eval_shape(lambda: model.new_cache(1, context).blocks)
    width = min(bucket(min(chunk, context)), context)
    return Memory(
        weights=model.weights_nbytes,
        cache=sum(slots.size * slots.dtype.itemsize for slots in jax.tree.leaves(blocks)),
        prefill=max(_added(*call) for call in _prefill(model, blocks, width, context)),
        step=max(_added(*call) for call in _step(model, blocks)),
    )


def memory_table(memory: Memory, chunk: int, beside: int) -> str:
    """Formats the bytes in units of 1e9.

    Args:
        chunk: that it was counted for.
        beside: bytes that the total is compared with.
    """

    def row(name: str, size: int, note: str = "") -> list[str]:
        return [name, f"{size / 1e9:.3f}", note]

    left = beside - memory.total
    rows = [
        row("weights", memory.weights),
        row("cache", memory.cache),
        row("prefill", memory.prefill, f"{chunk:,} tokens at a time"),
        row("step", memory.step),
        row("total", memory.total, "with the larger of prefill and step"),
        row("left", left, f"of {beside / 1e9:.3f}" if left >= 0 else f"beyond {beside / 1e9:.3f}"),
    ]
    return columns(["buffers", "GB", ""], rows)


Call = tuple[Wrapped, tuple]  # a compiled function and its arguments, or their shapes


def _prefill(model: Model, blocks, width: int, context: int) -> Iterator[Call]:
    """The calls of `Model.prefill`, each kind once."""
    plan, (first, *weights, last) = model.plan, model.units
    tokens, x = _shape((1, width), jnp.int32), None
    yield plan.prologue.forward, (first, tokens)
    x = jax.eval_shape(plan.prologue.forward, first, tokens)
    begins = [None, tokens] if context > width else [None]  # tokens: as many positions
    for positions in begins:
        yield from _block_calls(model, weights, x, positions, blocks)
    yield _logits_call(model, first, last, x)


def _step(model: Model, blocks) -> Iterator[Call]:
    """The calls of `Model.decode`, each kind once."""
    plan, (first, *weights, last) = model.plan, model.units
    token, position = _shape((1,), jnp.int32), _shape((1, 1), jnp.int32)
    if steps_at_once(model.backend):
        yield whole_step, (plan, model.units, token, position, blocks)
        return
    x = jax.eval_shape(plan.prologue.forward, first, position)
    yield from _block_calls(model, weights, x, position, blocks)
    yield _logits_call(model, first, last, x)


def _block_calls(model: Model, weights, x, positions, blocks) -> Iterator[Call]:
    distinct = dict(zip(model.plan.blocks, zip(weights, blocks, strict=True), strict=True))
    for program, (mine, slots) in distinct.items():
        yield program.step, (mine, x, positions, slots)


def _logits_call(model: Model, first, last, x) -> Call:
    plan = model.plan
    embedding = first[plan.embed]["weight"] if plan.tied else None
    return plan.epilogue.logits, (last, _shape((1, x.shape[-1]), x.dtype), embedding)


def _shape(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _added(function: Wrapped, arguments: tuple) -> int:
    """What a call holds beside weights and cache."""
    memory = function.lower(*arguments).compile().memory_analysis()
    assert memory is not None
    streams = [x for x in arguments if isinstance(x, jax.ShapeDtypeStruct)]  # and positions
    held = sum(x.size * x.dtype.itemsize for x in streams)
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + made + memory.temp_size_in_bytes
