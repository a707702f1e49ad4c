"""convert(): checkpoint -> pipeline -> checkpoint, one unit at a time. The converter, under its historic name.

Peak memory is one weight plus what its passes need, for a model of any size. A run that is cut off at any point and
started again skips the units that are finished and ends in the same bytes. `python -m atd.convert_adaptive` is `atd
convert`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from atd.calibration.streams import Calibration
from atd.calibration.text import SELF, calibration_text
from atd.calibration.windows import tokens_digest
from atd.checkpoint.cache import default_cache
from atd.checkpoint.folder import (
    GRAPH,
    MANIFEST,
    REPORT,
    check_space,
    check_target,
    finish,
    open_partial,
)
from atd.checkpoint.journal import JournalEntry
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.safetensors import INDEX
from atd.checkpoint.writer import file_digest, write_file
from atd.errors import BadInput
from atd.ir import Graph
from atd.models import frontend
from atd.models.frontend import FORMAT_VERSION
from atd.pipeline import Context, Pass, Pipeline
from atd.pipeline.driver import figures_of, finite, sweep
from atd.pipeline.recipe import Recipe, read_recipe, with_overrides
from atd.progress import Progress
from atd.version import __version__


def convert(
    model: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe | Pipeline = "adaptive",
    *,
    overrides: Sequence[str] = (),
    calib: str | Path | Sequence[str | Path] = (),
    overwrite: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Converts the checkpoint `model` (Hugging Face folder or GGUF file) into the folder `out` and returns `out`.

    recipe: a name (`atd.pipeline.recipe.recipe_names`), a TOML file, a `Recipe` or a `Pipeline`. overrides: "pass.option=value".
    calib: UTF-8 texts for passes that need activations, or "self" for text that the model writes; else as the recipe
    says. cache: folder for what other runs can use again (`atd.checkpoint.cache.default_cache()` by default). say, progress:
    where lines and progress go.
    Raises BadInput before any weight is read for whatever cannot work, RunFailed for a full disk or a failed
    verification.
    """
    if isinstance(recipe, Pipeline):
        recipe = Recipe(recipe)
    recipe = (
        with_overrides(recipe, overrides)
        if isinstance(recipe, Recipe)
        else read_recipe(recipe, overrides)
    )
    source, target = Path(model), Path(out).absolute()
    cache = default_cache() if cache is None else cache
    if given := [str(c) for c in ((calib,) if isinstance(calib, str | Path) else calib)]:
        recipe = replace(recipe, calibration=tuple(given))
    calibrated = recipe.pipeline.calibrated
    if given and not calibrated:
        say("warning: no pass of this recipe reads calibration text; --calib changes nothing")
    graph = finite(frontend.open(source), recipe.nonfinite, say)
    final = recipe.pipeline.preflight(graph)
    check_target(target, source, overwrite)
    tokenizer = tokenizer_files(source, say)
    windows = None
    if calibrated:
        windows = calibration_text(
            recipe.calibration,
            source,
            graph,
            cache,
            tokens=recipe.calibration_tokens,
            context=recipe.calibration_context,
            seed=recipe.seed,
            sha256=recipe.calibration_sha256,
            say=say,
            progress=progress,
        )
        for step in recipe.pipeline.passes:
            if len(windows) < step.least_windows:
                raise BadInput(
                    f"pass {step.name} needs at least {step.least_windows} calibration windows, there are {len(windows)} of "
                    f"{windows.shape[1]} tokens; set calibration_tokens to at least {step.least_windows * windows.shape[1]:,}"
                )
        recipe = replace(recipe, calibration_sha256=tokens_digest(windows))
    with open_partial(target) as partial:
        sweeps = recipe.pipeline.sweeps()
        copies = len(sweeps) + sum(step.rewrites for _, after in sweeps for step in after)
        size = sum(ref.type.nbytes for _, ref in final.weights())
        check_space(partial, copies * size - _bytes_written(partial))
        total = len(sweeps) * sum(int(np.prod(ref.type.shape)) for _, ref in graph.weights())
        done, dense, figures = 0, None, {}

        def advance(weights: int, unit: str) -> None:
            nonlocal done
            done += weights
            progress(Progress("converting", done, total, "weights", unit))

        for i, (passes, after) in enumerate(sweeps):
            folder = partial if i == len(sweeps) - 1 else partial / f"sweep-{i}"
            folder.mkdir(exist_ok=True)
            calibration = (
                None if windows is None else Calibration(windows)
            )  # its streams start in front of the model
            context = Context(
                recipe.seed,
                figures=figures,
                calibration=calibration,
                dense=dense,
                cache=cache,
                say=say,
                advance=lambda what, done, total: progress(Progress(what, done, total, "steps")),
            )
            rewritten, entries = sweep(graph, passes, context, recipe, folder, advance)
            dense, figures = context.dense, figures_of(entries)
            _write_metadata(folder, rewritten, recipe, entries, tokenizer)
            graph = frontend.open(folder)
            context.written_digests = {
                name: sha256 for entry in entries for name, sha256 in entry.tensors.items()
            }
            for number, step in enumerate(after):
                keys = [entry.key for entry in entries]
                made_from = (
                    f"{recipe.calibration_sha256} {keys} {[str(s) for s in after[: number + 1]]}"
                )
                graph = _kept(
                    step, graph, context, recipe, folder / f"after-{number}", made_from, tokenizer
                )
        kept = _write_summary(partial, source, recipe, entries, tokenizer, windows)
        finish(target, partial, kept)
    return target


def _kept(
    step: Pass,
    graph: Graph,
    context: Context,
    recipe: Recipe,
    folder: Path,
    made_from: str,
    tokenizer: dict[str, bytes],
) -> Graph:
    """What a pass makes of a written model, written itself, so that a run that was cut off need not do it again."""
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
        named = after.with_units(
            tuple(
                unit.map_weights(lambda ref: replace(ref, source=f"{key} {ref.tensor}"))
                for unit in after.units
            )
        )
        rewritten, entries = sweep(
            named, (), Context(say=context.say), recipe, folder, lambda weights, unit: None
        )
        _write_metadata(folder, rewritten, recipe, entries, tokenizer)
        write_file(mark, key)
    return frontend.open(folder)


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
    return sum(path.stat().st_size for path in partial.rglob("model-*.safetensors"))


def _write_metadata(
    folder: Path,
    graph: Graph,
    recipe: Recipe,
    entries: Sequence[JournalEntry],
    tokenizer: dict[str, bytes],
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
        "config.json": json.dumps(graph.config | {"quantization_config": quantization}, indent=2)
        + "\n",
        GRAPH: json.dumps(graph.to_json(), indent=1) + "\n",
        INDEX: json.dumps(
            {"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1, sort_keys=True
        )
        + "\n",
        **tokenizer,
    }
    for name, content in files.items():
        write_file(folder / name, content)


def _write_summary(
    folder: Path,
    source: Path,
    recipe: Recipe,
    entries: Sequence[JournalEntry],
    tokenizer: dict[str, bytes],
    windows: np.ndarray | None,
) -> list[str]:
    """recipe.toml (resolved), report.json, and the manifest of digests; returns the names of all files of the
    checkpoint.

    The report holds times and so differs from run to run; the manifest covers everything else.
    """
    write_file(folder / "recipe.toml", recipe.to_toml())
    report = {"source": source.name, "nodes": [row for entry in entries for row in entry.report]}
    write_file(folder / REPORT, json.dumps(report, indent=1) + "\n")
    digests = {entry.shard: entry.sha256 for entry in entries}
    for name in ("config.json", GRAPH, INDEX, "recipe.toml", *tokenizer):
        digests[name] = file_digest(folder / name)
    manifest = {
        "format_version": FORMAT_VERSION,
        "atd": __version__,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        **({} if windows is None else {"calibration": _calibration(recipe, windows)}),
        "files": dict(sorted(digests.items())),
    }
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return [*digests, REPORT, MANIFEST]


def _calibration(recipe: Recipe, windows: np.ndarray) -> dict:
    """What a model was calibrated on, for its manifest."""
    return {
        "texts": [text if text == SELF else Path(text).name for text in recipe.calibration],
        "tokens_sha256": recipe.calibration_sha256,
        "windows": list(windows.shape),
    }
