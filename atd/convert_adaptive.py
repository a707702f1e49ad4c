"""convert(): checkpoint -> pipeline -> checkpoint, one unit at a time. The converter, under its historic name.

Peak memory is one weight plus what its passes need, for a model of any size. A run that is cut off at any point and
started again skips the units that are finished and ends in the same bytes. `python -m atd.convert_adaptive` is `atd
convert`.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

import atd
from atd import output
from atd.errors import BadInput, RunFailed
from atd.ir import Block, Graph, WeightRef
from atd.models import frontend
from atd.models.frontend import FORMAT_VERSION
from atd.pipeline import Context, Pass, Pipeline
from atd.recipe import Recipe, read_recipe, with_overrides
from atd.store import INDEX
from atd.tokenizer import open_tokenizer
from atd.weights import Dense, DenseType, bits_per_weight


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: weights done of all, and the unit that was finished last."""

    done: int
    total: int
    unit: str


def convert(
    model: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe | Pipeline = "ternary2",
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Converts the checkpoint `model` (Hugging Face folder or GGUF file) into the folder `out` by a recipe, and returns
    `out`.

    `recipe`: a name (`atd.recipe.recipe_names`), a TOML file, a `Recipe` or a `Pipeline`. `overrides`:
    "pass.option=value". Raises BadInput before any weight is read for whatever cannot work, RunFailed for a full disk
    or a failed verification.
    """
    if isinstance(recipe, Pipeline):
        recipe = Recipe(recipe)
    recipe = with_overrides(recipe, overrides) if isinstance(recipe, Recipe) else read_recipe(recipe, overrides)
    source, target = Path(model), Path(out).absolute()
    graph = _finite(frontend.open(source), recipe.nonfinite, say)
    final = recipe.pipeline.preflight(graph)
    output.check_target(target, source, overwrite)
    tokenizer = tokenizer_files(source, say)
    with output.open_partial(target) as partial:
        output.check_space(partial, sum(ref.type.nbytes for _, ref in final.weights()) - _bytes_written(partial))
        sweeps = recipe.pipeline.sweeps()
        total = len(sweeps) * sum(int(np.prod(ref.type.shape)) for _, ref in graph.weights())
        done = 0
        for i, (passes, after) in enumerate(sweeps):
            last = i == len(sweeps) - 1
            folder = partial if last else partial / f"sweep-{i}"
            folder.mkdir(exist_ok=True)
            context = Context(seed=recipe.seed, say=say)
            entries, done = _sweep(graph, passes, context, recipe, folder, done, total, progress)
            _write_metadata(folder, Pipeline(passes)(graph, Context()), recipe, entries, tokenizer)
            graph = frontend.open(folder)
            for step in after:
                step(
                    graph,
                    replace(
                        context, written_digests={name: sha for entry in entries for name, sha in entry.tensors.items()}
                    ),
                )
        kept = _write_summary(partial, source, recipe, entries, tokenizer)
        output.finish(target, partial, kept)
    return target


def _sweep(
    graph: Graph,
    passes: Sequence[Pass],
    context: Context,
    recipe: Recipe,
    folder: Path,
    done: int,
    total: int,
    progress: Callable,
) -> tuple[list[output.JournalEntry], int]:
    """Carries the passes out unit by unit: load, rewrite, write the shard, one journal line, drop."""
    rewritten = Pipeline(passes)(graph, context)
    journal, entries = output.read_journal(folder), []
    for i, (before, after) in enumerate(zip(graph.units, rewritten.units, strict=True)):
        shard = f"model-{i + 1:05d}-of-{len(graph.units):05d}.safetensors"
        key = _unit_key(before, passes, recipe)
        entry = journal.get(shard)
        if (
            entry is None
            or entry.key != key
            or not (folder / shard).is_file()
            or output.file_digest(folder / shard) != entry.sha256
        ):
            started = time.perf_counter()
            tensors = output.write_shard(folder / shard, [ref for node in after.nodes for ref in node.weights.values()])
            rows = _report(after, context, time.perf_counter() - started)
            entry = output.JournalEntry(
                before.name or "epilogue", key, shard, output.file_digest(folder / shard), tensors, rows
            )
            output.append_journal(folder, entry)
        entries.append(entry)
        done += sum(int(np.prod(ref.type.shape)) for node in before.nodes for ref in node.weights.values())
        progress(Progress(done, total, entry.unit))
    return entries, done


def _unit_key(unit: Block, passes: Sequence[Pass], recipe: Recipe) -> str:
    """Equal keys: equal bytes. Hash of the source tensors' identity, the unit's text, the passes, the seed and the versions that compute."""
    sources = [ref.source for node in unit.nodes for ref in node.weights.values()]
    versions = (FORMAT_VERSION, atd.__version__, jax.__version__)
    parts = [versions, sources, unit.name, str(unit), [str(step) for step in passes], recipe.seed, recipe.nonfinite]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _finite(graph: Graph, nonfinite: str, say: Callable[[str], None]) -> Graph:
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
            found = f"{ref.tensor} holds {int((~finite).sum())} NaN or Inf values, the first at {place}"
            if nonfinite == "refuse":
                raise BadInput(
                    f"{found}; the checkpoint is damaged. To convert it with zeros in their place: --nonfinite zero"
                )
            say(f"warning: {found}; replaced by 0")
            return Dense(np.where(finite, array, np.zeros((), array.dtype)))

        return replace(ref, load=load)

    def unit(block: Block) -> Block:
        return replace(
            block, nodes=tuple(replace(n, weights={s: checked(r) for s, r in n.weights.items()}) for n in block.nodes)
        )

    return graph.with_units(tuple(unit(block) for block in graph.units))


def _report(unit: Block, context: Context, seconds: float) -> list[dict]:
    """A row for each weight matrix: parts of a joined linear have rows of their own. `seconds` is the unit's, shared out by weights."""
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
            rows.append({**row, "error": context.figures.get(full, {}).get("error")})
    total = sum(row["weights"] for row in rows)
    return [{**row, "seconds": seconds * row["weights"] / total} for row in rows]


def tokenizer_files(source: Path, say: Callable[[str], None]) -> dict[str, bytes]:
    """The tokenizer's files by name; none, with a warning, where the source has no tokenizer."""
    try:
        return open_tokenizer(source).files()
    except BadInput as error:
        say(
            f"warning: {error}. The converted checkpoint will have no tokenizer; eval and generate need one (--tokenizer)"
        )
        return {}


def _bytes_written(partial: Path) -> int:
    return sum(path.stat().st_size for path in partial.glob("model-*.safetensors"))


def _write_metadata(
    folder: Path, graph: Graph, recipe: Recipe, entries: Sequence[output.JournalEntry], tokenizer: dict[str, bytes]
) -> None:
    """What a reader needs besides the shards: config, graph, index, tokenizer."""
    weight_map = {name: entry.shard for entry in entries for name in entry.tensors}
    quantization = {
        "quant_method": "atd",
        "format_version": FORMAT_VERSION,
        "passes": [str(step) for step in recipe.pipeline.passes],
    }
    size = sum(ref.type.nbytes for _, ref in graph.weights())
    files = {
        "config.json": json.dumps(graph.config | {"quantization_config": quantization}, indent=2) + "\n",
        output.GRAPH: json.dumps(graph.to_json(), indent=1) + "\n",
        INDEX: json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1, sort_keys=True)
        + "\n",
        **tokenizer,
    }
    for name, content in files.items():
        output.write_file(folder / name, content)


def _write_summary(
    folder: Path, source: Path, recipe: Recipe, entries: Sequence[output.JournalEntry], tokenizer: dict[str, bytes]
) -> list[str]:
    """recipe.toml (resolved), report.json, and the manifest of digests; returns the names of all files of the
    checkpoint.

    The report holds times and so differs from run to run; the manifest covers everything else.
    """
    output.write_file(folder / "recipe.toml", recipe.to_toml())
    report = {"source": source.name, "nodes": [row for entry in entries for row in entry.report]}
    output.write_file(folder / output.REPORT, json.dumps(report, indent=1) + "\n")
    digests = {entry.shard: entry.sha256 for entry in entries}
    for name in ("config.json", output.GRAPH, INDEX, "recipe.toml", *tokenizer):
        digests[name] = output.file_digest(folder / name)
    manifest = {
        "format_version": FORMAT_VERSION,
        "atd": atd.__version__,
        "jax": jax.__version__,
        "files": dict(sorted(digests.items())),
    }
    output.write_file(folder / output.MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return [*digests, output.REPORT, output.MANIFEST]


def read_manifest(folder: Path) -> dict[str, str]:
    """File name -> sha256 of a folder that atd made."""
    try:
        return json.loads((folder / output.MANIFEST).read_text())["files"]
    except FileNotFoundError:
        raise BadInput(f"{folder}: no {output.MANIFEST}: not a checkpoint that atd made") from None
    except (ValueError, KeyError) as error:
        raise BadInput(f"{folder / output.MANIFEST}: damaged: {error}") from None


def verify_checkpoint(folder: str | Path) -> int:
    """Compares every file with the manifest and looks at every weight; returns the number of weights. Raises RunFailed naming what is wrong."""
    from atd.passes.verify import broken

    folder = Path(folder)
    for name, sha256 in read_manifest(folder).items():
        if not (folder / name).is_file():
            raise RunFailed(f"{folder / name} is missing")
        if output.file_digest(folder / name) != sha256:
            raise RunFailed(f"{folder / name} is not what was written: its sha256 differs from {output.MANIFEST}")
    count = 0
    for _, ref in frontend.open(folder).weights():
        if problem := broken(ref.load()):
            raise RunFailed(f"{folder}: tensor {ref.tensor}: {problem}")
        count += 1
    return count


if __name__ == "__main__":
    from atd.cli import main

    main(prefix=("convert",))
