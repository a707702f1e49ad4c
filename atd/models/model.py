"""Graphs as models: `load` fills a Flax NNX module with a graph's weights; what it does is jitted.

All blocks whose nodes read the same (ops, attrs, types of weights) share one compiled function, so
compile time does not grow with depth: the loop over the blocks is in Python and calls it once per
block. A call costs tens of microseconds on the host, which runs ahead of the device.

    model = load(path)                             # or a Graph at any stage of a pipeline
    model(tokens)                                  # int32 [B, T] -> logits float32 [B, T, V]
    logits, cache = model.prefill(tokens, model.new_cache(batch=1, length=256))
    logits, cache = model.decode(token, cache)     # int32 [B] -> logits float32 [B, V]
"""

from collections.abc import Collection
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh

from atd.errors import BadInput, nearest
from atd.host import return_freed_from_now_on
from atd.ir import INT8, Block, Graph
from atd.ir.rewrite import int8_kv
from atd.models import execute
from atd.models.cache import Cache, check_kv, check_room, empty_slots, padded_width
from atd.models.ops import Weights
from atd.models.placement import BACKENDS, DTYPES, backend_here, check_backend, placed_weights
from atd.models.programs import (
    Plan,
    Program,
    attention_shapes,
    logits_of,
    one_step,
    steps_at_once,
    whole_step,
)
from atd.models.tokens import check_tokens
from atd.parallel.devices import CACHE, MODEL, Devices, devices_of
from atd.parallel.partition import partition
from atd.progress import Report, unheard

LARGE = 256 << 20  # bytes of weights; their products take far longer than to give memory back
KV = ("model", INT8)  # how keys and values are cached


def load(
    path_or_graph: str | Path | Graph,
    *,
    backend: str = "auto",
    dtype: str = "float32",
    kv: str = "model",
    mesh: Mesh | None = None,
    shapes: bool = False,
    progress: Report = unheard,
) -> "Model":
    """Loads the model of a checkpoint (a folder or a GGUF file) or of a graph.

    Peak memory is the model and one tensor. From a LARGE model on a CPU on, this process gives
    freed arrays back to the system at once (`atd.host.return_freed_from_now_on`).

    Args:
        path_or_graph: a checkpoint, or a graph at any stage of a pipeline.
        backend: how ternary weights are held and multiplied by.
            `xla` keeps them in memory as they are stored and unpacks them in every multiplication:
            the least memory. `xla-unpacked` dequantizes them once, here. `cpu` keeps them packed
            and has kernels for CPUs, compiled on first use: the most speed there.
            `triton` keeps them packed, in the layout that its kernels read: the most speed on a
            GPU. `mosaic` has kernels for Hopper alone, for one scale per row. `triton-interpret`
            and `mosaic-interpret` run the same kernels in jax's interpreter, for tests.
            `auto`: on a CPU cpu, and xla-unpacked for what it does not take or without a compiler;
            triton on a GPU that has it, for the weights that it takes; xla elsewhere. The model's
            `backend` says which, the logger `atd.kernels` why.
        dtype: float32, bfloat16 or float16, of the dense matrices and the cache. Activations, gains
            and biases are float32.
        kv: keys and values. `int8` rounds them to 8 bits, with a scale per KV head and position,
            and caches them so: half the memory of bfloat16. `model` caches them in dtype.
        mesh: the devices to run on, with the axes "model", over which weights and heads are cut,
            and "data", over which sequences are spread; one of them will do. None: one device.
        shapes: whether the model holds the shapes of its weights alone, to compile it and not to
            run it. Nothing is read. Of one device.
        progress: hears of each tensor that was read.

    Raises:
        BadInput: the backend, dtype or kv is unknown, the backend does not take a weight or the
            device, the mesh has other axes, the model's sizes do not divide by its devices, or the
            checkpoint cannot be opened or read.
    """
    given = ("backend", backend, BACKENDS), ("dtype", dtype, DTYPES), ("kv", kv, KV)
    for what, value, known in given:
        if value not in known:
            raise BadInput(f"unknown {what} {value!r}{nearest(value, known)}")
    if isinstance(path_or_graph, Graph):
        graph = path_or_graph
    else:
        from atd.models.frontend import open

        graph = open(path_or_graph)
    stored = sum(ref.type.nbytes for _, ref in graph.weights())
    if stored >= LARGE and jax.default_backend() == "cpu":
        return_freed_from_now_on()
    graph = int8_kv(graph) if kv == INT8 else graph
    devices = None if mesh is None else devices_of(mesh)
    if backend == "auto":
        chosen = backend_here(graph)
        kernel = chosen if chosen == "cpu" else None
        return Model(graph, chosen, kernel, dtype, progress, shapes, devices)
    check_backend(graph, backend)
    kernel = None if backend == "xla-unpacked" else backend
    return Model(graph, backend, kernel, dtype, progress, shapes, devices)


class Model(nnx.Module):
    """A language model, made by `load`.

    Its parameters: one `nnx.Param` per unit, which holds `{node: {slot: weight}}`.
    """

    def __init__(
        self,
        graph: Graph,
        backend: str,
        kernel: str | None,
        dtype: str,
        progress: Report = unheard,
        shapes: bool = False,
        devices: Devices | None = None,
    ):
        """Fills the slots with the graph's weights.

        Args:
            graph: at any stage of a pipeline.
            backend: how weights are held, one of `placement.BACKENDS` but `auto`.
            kernel: backend of `atd.kernels.matmul`; None: what suits each weight.
            dtype: of dense matrices and the cache, a key of `placement.DTYPES`.
            progress: hears of each tensor that was read.
            shapes: as in `load`.
            devices: those to run on; None: one.
        """
        programs: dict[tuple, Program] = {}
        part = partition(graph, devices.model if devices else 1, MODEL)

        def program(block: Block, cuts: Collection[str]) -> Program:
            key = execute.structure_of(block).text, tuple(sorted(cuts))
            if key not in programs:
                programs[key] = Program(block, kernel, cuts, devices)
            return programs[key]

        weights = placed_weights(graph, backend, dtype, progress, shapes, part, devices)
        units = [nnx.Param(unit) for unit in weights]
        prologue, *of_blocks, epilogue = map(program, part.graph.units, part.cuts)
        self.prologue = units[0]
        self.blocks = nnx.List(units[1:-1])
        self.epilogue = units[-1]
        self.plan = Plan(
            config=graph.config,
            backend=backend,
            dtype=dtype,
            devices=devices,
            vocabulary=graph.vocabulary,
            prologue=prologue,
            blocks=tuple(of_blocks),
            epilogue=epilogue,
            embed=next(node.name for node in graph.prologue.nodes if node.op == "embed"),
            tied=graph.is_tied,
            attention=tuple(attention_shapes(block) for block in graph.blocks),
        )

    @property
    def config(self) -> dict:
        """The Hugging Face config.json that the model came with."""
        return self.plan.config

    @property
    def backend(self) -> str:
        """How weights are held: what `load` was given, or chose."""
        return self.plan.backend

    @property
    def units(self) -> list[Weights]:
        """The weights of prologue, blocks and epilogue, by node and slot."""
        return [unit.get_raw_value() for unit in (self.prologue, *self.blocks, self.epilogue)]

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all weights as they lie in memory; a tied embedding counts once."""
        leaves = jax.tree.leaves(nnx.state(self, nnx.Param))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    @property
    def max_context(self) -> int | None:
        """How many positions the model was made for: max_position_embeddings of its config.json."""
        return self.config.get("max_position_embeddings")

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens: 0 <= id < V."""
        return self.plan.vocabulary

    @property
    def devices(self) -> Devices | None:
        """The devices that it runs on; None: one."""
        return self.plan.devices

    def __call__(self, tokens) -> jax.Array:
        """Returns the logits float32 [B, T, V] of whole sequences of token ids int32 [B, T]."""
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens, chunk: int | None = None) -> jax.Array:
        """Returns what enters the epilogue, float32 [B, T, D], of whole sequences int32 [B, T].

        Args:
            tokens: ids.
            chunk: tokens of a sequence that are read at a time, into a cache, which bounds the
                memory of activations; None: all.

        Raises BadInput for ids outside the vocabulary (not where jax traces the call).
        """
        if not isinstance(tokens, Tracer):
            check_tokens(tokens, self.vocabulary)
        tokens = jnp.asarray(tokens, jnp.int32)
        batch, width = tokens.shape
        if chunk and chunk < width:
            cache, parts = self.new_cache(batch, width), []
            for start in range(0, width, chunk):
                part = tokens[:, start : start + chunk]
                x, cache = self.append(part, np.full(batch, part.shape[1]), cache)
                parts.append(x)
            return jnp.concatenate(parts, axis=1)
        x = self.plan.prologue.forward(self.prologue.get_raw_value(), tokens)
        for program, weights in zip(self.plan.blocks, self.blocks, strict=True):
            x = program.forward(weights.get_raw_value(), x)
        return x

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the logits float32 [..., V] of what `hidden` returned, or rows of it [..., D]."""
        return logits_of(
            self.plan, self.prologue.get_raw_value(), self.epilogue.get_raw_value(), hidden
        )

    def new_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache for `batch` sequences of at most `length` tokens."""
        if batch < 1 or length < 1:
            raise BadInput(
                f"a cache of {batch} sequences of {length} tokens: both must be at least 1"
            )
        dtype, devices = DTYPES[self.plan.dtype], self.devices
        places = devices and devices.sharding(CACHE, batch)
        blocks = tuple(
            {
                name: empty_slots((batch, kv_heads, length, head_dim), dtype, in_8_bits, places)
                for name, kv_heads, head_dim, in_8_bits in nodes
            }
            for nodes in self.plan.attention
        )
        return Cache(blocks, jnp.zeros((batch, 1), jnp.int32), 0, length)

    def prefill(
        self, tokens, cache: Cache, lengths=None, chunk: int | None = None
    ) -> tuple[jax.Array, Cache]:
        """Appends tokens to each sequence: prompts to an empty cache, or what follows to a filled
        one.

        Tokens are padded to a power of two, so that nothing new is compiled for most lengths;
        padding changes no result.

        Args:
            tokens: ids int32 [B, T]; shorter rows end in anything.
            cache: used up.
            lengths: [B] tokens of each row, 1 to T; None: all T.
            chunk: tokens of a row that are read at a time, which bounds the memory of activations;
                None: all.

        Returns:
            Logits float32 [B, V] of each sequence's next token, and the new cache.

        Raises:
            BadInput: a row is empty, holds ids outside the vocabulary, or does not fit into the
                cache; or this is one of a model with another kv.
        """
        tokens = np.asarray(tokens)
        batch, width = tokens.shape
        lengths = np.full(batch, width) if lengths is None else np.asarray(lengths)
        if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > width:
            raise BadInput(
                f"lengths {lengths.tolist()} of prompts [{batch}, {width}]: "
                f"expected {batch} numbers from 1 to {width}"
            )
        read = np.where(np.arange(width) < lengths[:, None], tokens, 0)  # [B, T]
        check_tokens(read, self.vocabulary)
        check_kv(cache, self.plan.kv)
        check_room(cache, batch, width)
        last, step = None, chunk or width
        for start in range(0, width, step):
            counts = np.clip(lengths - start, 0, step)
            part = read[:, start : start + step]
            padding = padded_width(part.shape[1], cache) - part.shape[1]
            x, cache = self.append(np.pad(part, ((0, 0), (0, padding))), counts, cache)
            last = _last(x, counts, last)
        assert last is not None
        return self.logits(last), cache

    def append(self, tokens, counts: np.ndarray, cache: Cache) -> tuple[jax.Array, Cache]:
        """Appends tokens to each sequence, as `prefill` does, with nothing checked or padded.

        Args:
            tokens: ids int32 [B, T].
            counts: [B] tokens of each row, 0 to T; those behind them are no part of the sequence.
            cache: with room for T more; used up.

        Returns:
            What enters the epilogue, float32 [B, T, D], and the new cache.
        """
        positions = _places(cache.positions, tokens.shape[1]) if cache.filled else None
        x = self.plan.prologue.forward(
            self.prologue.get_raw_value(), jnp.asarray(tokens, jnp.int32)
        )
        blocks = []
        for program, weights, slots in zip(
            self.plan.blocks, self.blocks, cache.blocks, strict=True
        ):
            x, slots = program.step(weights.get_raw_value(), x, positions, slots)
            blocks.append(slots)
        filled = cache.filled + int(counts.max())
        positions = cache.positions + jnp.asarray(counts, jnp.int32)[:, None]
        return x, Cache(tuple(blocks), positions, filled, cache.length)

    def decode(self, token, cache: Cache) -> tuple[jax.Array, Cache]:
        """Appends a token to each sequence.

        Args:
            token: ids int32 [B]; a jax array is not checked, as the host does not wait for it.
            cache: used up.

        Returns:
            Logits float32 [B, V] of the next token, and the new cache.

        Raises:
            BadInput: the cache is full, or one of a model with another kv, or ids lie outside the
                vocabulary.
        """
        check_kv(cache, self.plan.kv)
        if not isinstance(token, jax.Array):
            check_tokens(token, self.vocabulary)
        if cache.filled >= cache.length:
            raise BadInput(
                f"the cache is full: it was made for {cache.length} tokens; "
                f"make a longer one with new_cache"
            )
        step = whole_step if steps_at_once(self.backend) else one_step
        logits, positions, blocks = step(
            self.plan, self.units, token, cache.positions, cache.blocks
        )
        return logits, Cache(blocks, positions, cache.filled + 1, cache.length)


@partial(jax.jit, static_argnames="width")
def _places(positions, width: int):
    """Where `width` next tokens of each sequence stand: int32 [B, 1] -> [B, width]."""
    return positions + jnp.arange(width, dtype=jnp.int32)


@jax.jit
def _last(x, counts, before):
    """Row by row the last of the first counts [B] of x [B, T, D]; of `before` [B, D] where 0."""
    row = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return row if before is None else jnp.where(counts[:, None] > 0, row, before)
