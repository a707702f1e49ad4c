"""The driver carries out one stage of a pipeline: unit by unit, with a journal, so that a run that
was cut off goes on.

For each unit (embedding, decoder layer, final norm and head): load a weight, rewrite it, write it,
drop it; then one line in the journal. Peak memory is one weight plus what its passes need. With
calibration the unit's new weights stay until the unit has run once more, and move the stream of
the quantized model on (`atd.calibration.streams`)."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from atd.checkpoint.journal import JournalEntry, append_journal, read_journal
from atd.checkpoint.safetensors import shard_name
from atd.checkpoint.writer import file_digest, is_intact, write_file, write_shard, written
from atd.ir import Block, Graph, WeightRef
from atd.ir.rewrite import joined_parts
from atd.models import frontend
from atd.models.frontend import FORMAT_VERSION
from atd.models.numerics import numerics
from atd.parallel.hosts import agree, agreeing, alone, from_first, hosts
from atd.pipeline.base import Pass, identity
from atd.pipeline.context import Context, Figures
from atd.pipeline.output import write_metadata
from atd.pipeline.pipeline import Pipeline
from atd.pipeline.recipe import Recipe
from atd.progress import Progress, Report, unheard
from atd.version import __version__
from atd.weights import DenseType, bits_per_weight

# Keys of a row of the report that no pass records.
_MEASURED = ("node", "type", "weights", "bits", "bytes")


@dataclass(frozen=True)
class Written:
    """What a stage hands on: the model that it wrote, and what the report and later stages need to
    know of it.
    """

    graph: Graph
    dense: Graph  # the model in front of the first pass that changes its function
    entries: tuple[JournalEntry, ...]  # of each unit

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of each stored tensor as it was in memory."""
        return {name: sha for entry in self.entries for name, sha in entry.tensors.items()}

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """What passes recorded for each node, up to the end of this stage."""
        own = (*_MEASURED, "seconds")
        rows = (row for entry in self.entries for row in entry.report)
        return {row["node"]: {k: v for k, v in row.items() if k not in own} for row in rows}


def run_stage(
    graph: Graph,
    passes: Sequence[Pass],
    context: Context,
    recipe: Recipe,
    folder: Path,
    *,
    known: Mapping[str, dict[str, float]] | None = None,
    progress: Report = unheard,
) -> Written:
    """Carries the passes out and writes the result into `folder`, a shard per unit.

    Units that the folder's journal knows by the same key, and whose shard has the digest it had,
    are not done again.

    Args:
      graph: the model as it is read.
      context: what passes may read; what they record goes to the report, and not where
        `context.record` leads.
      known: figures that earlier stages recorded for nodes: the report goes on from there.
      progress: hears how many weights are done.
    """
    figures = Figures(known or {})
    context = replace(context, record=figures.record)
    with alone():  # one process may find in its cache what another computes
        dense, rest = prepared(graph, passes, context)
    context = replace(context, dense=dense if context.dense is None else context.dense)
    pipeline = Pipeline(rest)
    rewritten = pipeline(dense, context)
    calibration = context.calibration if pipeline.calibrated else None
    journal, entries, previous = read_journal(folder), [], calibration.digest if calibration else ""
    sizes = [_weights(unit) for unit in graph.units]
    units = zip(graph.units, dense.units, rewritten.units, strict=True)
    for i, (before, reference, after) in enumerate(units):
        shard = folder / shard_name(i, len(sizes))
        key = _unit_key(before, after, passes, recipe, previous)
        entry = _finished(journal, shard, key)
        agree({f"key of {before.name or 'epilogue'}": key, "state of OUT": entry is not None})
        if calibration:
            after = calibration.begin(reference, after if entry is None else written(after, shard))
            previous = key  # what is quantized later depends on what was quantized before
        if entry is None:
            entry = _write_unit(before.name or "epilogue", after, key, folder, shard, figures)
        if calibration and i < len(sizes) - 1:
            calibration.finish()
        entries.append(entry)
        progress(Progress("converting", sum(sizes[: i + 1]), sum(sizes), "weights", entry.unit))
    assert context.dense is not None
    return Written(rewritten, context.dense, tuple(entries))


def prepared(
    graph: Graph, passes: Sequence[Pass], context: Context
) -> tuple[Graph, Sequence[Pass]]:
    """Returns (the graph behind the passes that keep the model's function, the other passes).

    The others begin with the first node or block pass that asks for activations or makes a dense
    weight ternary. Passes of graph scope that ask (equalize, allocate) do so on behalf of those
    behind them.
    """

    def dense_weights(graph: Graph) -> int:
        return sum(isinstance(ref.type, DenseType) for _, ref in graph.weights())

    for i, step in enumerate(passes):
        if step.scope != "graph" and "activations" in step.needs:
            return graph, passes[i:]
        after = step(graph, replace(context, passes=tuple(map(identity, passes[:i]))))
        if step.scope != "graph" and dense_weights(after) < dense_weights(graph):
            return graph, passes[i:]
        graph = after
    return graph, ()


def rewrite_written(
    graph: Graph,
    passes: Sequence[Pass],
    entries: Sequence[JournalEntry],
    context: Context,
    recipe: Recipe,
    folder: Path,
    tokenizer: Mapping[str, bytes],
) -> Graph:
    """Returns what the last of the passes makes of a written model: written itself, so that a run
    that was cut off need not do it again, or the same graph where it changes nothing.

    Args:
      graph: the model as it was read again.
      passes: those that have read the written model, the last of them now.
      entries: the journal's entries of the written model.
      folder: where the result goes.
    """
    keys, step = [entry.key for entry in entries], passes[-1]
    made_from = f"{recipe.calibration_sha256} {keys} {[identity(step) for step in passes]}"
    key = hashlib.sha256(made_from.encode()).hexdigest()
    mark = folder / "made_from"
    made = mark.read_text() if mark.is_file() else ""
    if made == f"{key} unchanged":
        return graph
    if made != key:
        after = step(graph, context)
        if after is graph:  # it only looked, or found nothing to do
            if step.rewrites:
                folder.mkdir(exist_ok=True)
                write_file(mark, f"{key} unchanged")
            return graph
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        done = run_stage(_named(after, key), (), Context(say=context.say), recipe, folder)
        write_metadata(folder, done.graph, recipe, done.entries, tokenizer)
        write_file(mark, key)
    return reopened(folder, read_journal(folder).values())


def reopened(folder: Path, entries: Iterable[JournalEntry]) -> Graph:
    """Returns the graph of a folder that was written as these entries say."""
    return frontend.open(folder, digests={folder / e.shard: e.sha256 for e in entries})


def _named(graph: Graph, key: str) -> Graph:
    """The graph whose weights, made in memory, have this key for their identity."""

    def named(ref: WeightRef) -> WeightRef:
        return replace(ref, source=f"{key} {ref.tensor}")

    return graph.with_units(tuple(unit.map_weights(named) for unit in graph.units))


def _weights(unit: Block) -> int:
    """How many weights the unit has."""
    return sum(math.prod(ref.type.shape) for node in unit.nodes for ref in node.weights.values())


def _unit_key(
    before: Block, after: Block, passes: Sequence[Pass], recipe: Recipe, previous: str
) -> str:
    """Equal keys: equal bytes. The hash of the identity of all tensors that go into the unit, its
    text, the passes, the seed, the versions and settings that compute, and where errors propagate
    the unit before it."""
    sources = [
        ref.source
        for unit in (before, after)
        for node in unit.nodes
        for ref in node.weights.values()
    ]
    versions = (FORMAT_VERSION, __version__, numerics())
    texts = [before.name, str(before), str(after), *map(identity, passes)]
    parts = [versions, sources, texts, recipe.seed, recipe.nonfinite, previous]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _finished(journal: Mapping[str, JournalEntry], shard: Path, key: str) -> JournalEntry | None:
    """The journal's entry of a shard that was made from the same key and is intact."""
    entry = journal.get(shard.name)
    if entry is None or entry.key != key or not is_intact(shard, entry.sha256):
        return None
    return entry


def _write_unit(
    name: str, unit: Block, key: str, folder: Path, shard: Path, figures: Mapping[str, dict]
) -> JournalEntry:
    """Computes the unit's weights, in all processes, and writes them and their line of the journal
    in the first.
    """
    started, text = time.perf_counter(), ""
    refs = [ref for node in unit.nodes for ref in node.weights.values()]
    with agreeing():
        if hosts().first:
            tensors = write_shard(shard, refs)
            rows = _report(unit, figures, time.perf_counter() - started)
            entry = JournalEntry(name, key, shard.name, file_digest(shard), tensors, rows)
            append_journal(folder, entry)
            text = json.dumps(asdict(entry))
        else:
            for ref in refs:
                ref.load()
    return JournalEntry(**json.loads(from_first(text)))


def _report(unit: Block, figures: Mapping[str, dict], seconds: float) -> list[dict]:
    """A row for each weight matrix: parts of a joined linear have rows of their own. `seconds` is
    the unit's, shared out by weights; "error" and what else passes recorded for the node
    (predicted_kl, damping, ...) follow."""
    rows = []
    for node in unit.nodes:
        if "weight" not in node.weights or len(node.weights["weight"].type.shape) != 2:
            continue
        type = node.weights["weight"].type
        parts = [
            (part.name, part.attrs["stop"] - part.attrs["start"])
            for part in joined_parts(unit, node)
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
            rows.append({"error": None} | figures.get(full, {}) | row)
    total = sum(row["weights"] for row in rows)
    return [
        {key: row[key] for key in _MEASURED} | {"seconds": seconds * row["weights"] / total} | row
        for row in rows
    ]
