"""The sweep: passes carried out unit by unit, with a journal, so that a run that was cut off goes on where it stopped.

For each unit (embedding, decoder layer, final norm and head): load a weight, rewrite it, write it, drop it; then one
line in the journal. Peak memory is one weight plus what its passes need. With calibration the unit's new weights stay
until the unit has run once more, and move the quantized stream on (`atd.calibration`).
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from atd.checkpoint.journal import JournalEntry, append_journal, read_journal
from atd.checkpoint.writer import file_digest, is_intact, write_shard, written
from atd.errors import BadInput
from atd.ir import Block, Graph, WeightRef
from atd.models.frontend import FORMAT_VERSION
from atd.pipeline import Context, Pass, Pipeline
from atd.pipeline.recipe import Recipe
from atd.version import __version__
from atd.weights import Dense, DenseType, bits_per_weight

_MEASURED = (
    "node",
    "type",
    "weights",
    "bits",
    "bytes",
)  # keys of a row of the report that no pass records


def sweep(
    graph: Graph,
    passes: Sequence[Pass],
    context: Context,
    recipe: Recipe,
    folder: Path,
    progress: Callable[[int, str], None],
) -> tuple[Graph, list[JournalEntry]]:
    """Carries the passes out into `folder` -> the rewritten graph and the journal's entry of each unit.

    Units that the journal knows by the same key, and whose shard has the digest it had, are not done again.
    `progress(weights, unit)` hears of each unit.
    """
    dense, rest = prepared(graph, passes, context)
    context.dense = dense if context.dense is None else context.dense
    pipeline = Pipeline(rest)
    rewritten = pipeline(dense, context)
    calibration = context.calibration if pipeline.calibrated else None
    journal, entries, previous = read_journal(folder), [], calibration.digest if calibration else ""
    for i, (before, reference, after) in enumerate(
        zip(graph.units, dense.units, rewritten.units, strict=True)
    ):
        shard = folder / f"model-{i + 1:05d}-of-{len(graph.units):05d}.safetensors"
        key = _unit_key(before, after, passes, recipe, previous)
        entry = journal.get(shard.name)
        finished = entry is not None and entry.key == key and is_intact(shard, entry.sha256)
        if calibration:
            after = calibration.begin(reference, written(after, shard) if finished else after)
            previous = key  # what is quantized later depends on what was quantized before
        if entry is None or not finished:
            started = time.perf_counter()
            tensors = write_shard(
                shard, [ref for node in after.nodes for ref in node.weights.values()]
            )
            rows = _report(after, context, time.perf_counter() - started)
            entry = JournalEntry(
                before.name or "epilogue", key, shard.name, file_digest(shard), tensors, rows
            )
            append_journal(folder, entry)
        if calibration and i < len(graph.units) - 1:
            calibration.finish()
        entries.append(entry)
        progress(
            sum(int(np.prod(ref.type.shape)) for n in before.nodes for ref in n.weights.values()),
            entry.unit,
        )
    return rewritten, entries


def prepared(
    graph: Graph, passes: Sequence[Pass], context: Context
) -> tuple[Graph, Sequence[Pass]]:
    """(the graph behind the passes that keep the model's function, the other passes): up to the first node or block pass
    that asks for activations or makes a dense weight ternary.

    Passes of graph scope that ask (equalize, allocate) do so on behalf of those behind them.
    """

    def dense_weights(graph: Graph) -> int:
        return sum(isinstance(ref.type, DenseType) for _, ref in graph.weights())

    for i, step in enumerate(passes):
        if step.scope != "graph" and "activations" in step.needs:
            return graph, passes[i:]
        after = step(graph, context)
        if step.scope != "graph" and dense_weights(after) < dense_weights(graph):
            return graph, passes[i:]
        graph = after
    return graph, ()


def _unit_key(
    before: Block, after: Block, passes: Sequence[Pass], recipe: Recipe, previous: str
) -> str:
    """Equal keys: equal bytes. Hash of the identity of all tensors that go into the unit, its text, the passes, the
    seed, the versions that compute, and where errors propagate the unit before it."""
    sources = [
        ref.source
        for unit in (before, after)
        for node in unit.nodes
        for ref in node.weights.values()
    ]
    versions = (FORMAT_VERSION, __version__, jax.__version__)
    texts = [before.name, str(before), str(after), *map(str, passes)]
    parts = [versions, sources, texts, recipe.seed, recipe.nonfinite, previous]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def finite(graph: Graph, nonfinite: str, say: Callable[[str], None]) -> Graph:
    """The graph whose weights are looked at as they are read: NaN and Inf are refused by name, or become 0."""

    def checked(ref: WeightRef) -> WeightRef:
        if not isinstance(ref.type, DenseType):
            return ref

        def load() -> Dense:
            weight = ref.load()
            assert isinstance(weight, Dense)
            array = np.asarray(weight.array)
            finite = np.isfinite(array)
            if finite.all():
                return weight
            place = [int(i) for i in np.argwhere(~finite)[0]]
            found = (
                f"{ref.tensor} holds {int((~finite).sum())} NaN or Inf values, the first at {place}"
            )
            if nonfinite == "refuse":
                raise BadInput(
                    f"{found}; the checkpoint is damaged. To convert it with zeros in their place: --nonfinite zero"
                )
            say(f"warning: {found}; replaced by 0")
            return Dense(np.where(finite, array, np.zeros((), array.dtype)))

        return replace(ref, load=load)

    return graph.with_units(tuple(unit.map_weights(checked) for unit in graph.units))


def _report(unit: Block, context: Context, seconds: float) -> list[dict]:
    """A row for each weight matrix: parts of a joined linear have rows of their own. `seconds` is the unit's, shared out
    by weights; "error" and what else passes recorded for the node (predicted_kl, damping, ...) follow."""
    rows = []
    for node in unit.nodes:
        if "weight" not in node.weights or len(node.weights["weight"].type.shape) != 2:
            continue
        type = node.weights["weight"].type
        parts = [
            (p.name, p.attrs["stop"] - p.attrs["start"])
            for p in unit.nodes
            if p.op == "slice" and p.inputs == (node.name,)
        ]
        for name, out in parts or [(node.name, type.shape[0])]:
            full = f"{unit.name}.{name}" if unit.name else name
            weights, bits = out * type.shape[1], bits_per_weight(type)
            row = {
                "node": full,
                "type": str(type),
                "weights": weights,
                "bits": bits,
                "bytes": round(bits * weights / 8),
            }
            rows.append({"error": None} | context.figures.get(full, {}) | row)
    total = sum(row["weights"] for row in rows)
    return [
        {key: row[key] for key in _MEASURED} | {"seconds": seconds * row["weights"] / total} | row
        for row in rows
    ]


def figures_of(entries: Sequence[JournalEntry]) -> dict[str, dict]:
    """What passes recorded for each node up to the end of a sweep: the next one's report goes on from there."""
    return {
        row["node"]: {
            key: value for key, value in row.items() if key not in (*_MEASURED, "seconds")
        }
        for entry in entries
        for row in entry.report
    }
