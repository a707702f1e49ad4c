"""Converts a checkpoint by a pipeline into another checkpoint, one unit at a time.

Peak memory is one weight plus what its passes need, for a model of any size. A run that is cut off
at any point and started again skips the units that are finished and ends in the same bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from atd.calibration.memory import SHARE, available, memory
from atd.calibration.room import Room
from atd.calibration.streams import Calibration
from atd.calibration.text import SELF, calibration_text, window_count, window_length
from atd.calibration.uncertainty import token_counts
from atd.calibration.windows import tokens_digest
from atd.checkpoint.cache import Cache
from atd.checkpoint.files import read_text
from atd.checkpoint.folder import (
    check_space,
    check_target,
    finish,
    open_result,
    result_folder,
)
from atd.checkpoint.hub import local
from atd.checkpoint.identity import check_unchanged
from atd.checkpoint.journal import JournalEntry, read_journal
from atd.checkpoint.reader import checkpoint_contents
from atd.errors import BadInput
from atd.host import default_cache
from atd.ir import Graph
from atd.models import frontend
from atd.models.numerics import surroundings
from atd.parallel.hosts import agree, agreeing, alone, from_first, hosts
from atd.parallel.workers import check_mesh, working
from atd.pipeline.base import Pass
from atd.pipeline.context import Context
from atd.pipeline.driver import reopened, rewrite_written, run_stage
from atd.pipeline.finite import finite
from atd.pipeline.output import tokenizer_files, write_metadata, write_summary
from atd.pipeline.pipeline import Pipeline, Stage
from atd.pipeline.plan import Plan, planned
from atd.pipeline.recipe import Recipe, read_recipe, suited, with_overrides
from atd.progress import Progress, Report, Say, unheard

STREAMS = "streams"  # in the partial folder: what calibration has no room for in memory


def convert(
    model: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe | Pipeline = "adaptive",
    *,
    overrides: Sequence[str] = (),
    calib: str | Path | Sequence[str | Path] = (),
    overwrite: bool = False,
    ignore_extra: bool = False,
    cache: Path | None = None,
    limit: int | None = None,
    mesh: Mesh | None = None,
    say: Say = print,
    progress: Report = unheard,
) -> Path:
    """Converts a checkpoint into a folder of N-base ternary weights and returns that folder.

    Args:
      model: Hugging Face folder, GGUF file, or name of the hub, "user/repo[@revision]".
      out: the folder to write. It appears whole or not at all.
      recipe: a name (`atd.pipeline.recipe.recipe_names`), a TOML file, a `Recipe` or a `Pipeline`.
      overrides: "pass.option=value" each.
      calib: UTF-8 texts for passes that need activations, or "self" for text that the model
        writes; by default what the recipe says.
      overwrite: replace `out` if atd made it.
      ignore_extra: leave out tensors of `model` that are not part of its architecture.
      cache: folder for what other runs can use again; by default
        `atd.host.default_cache()`.
      limit: bytes of memory that calibration keeps to; by default three quarters of what is
        available. The result is the same.
      mesh: devices of this process, with the axis "data": batches of calibration text and rows of
        matrices are spread over them. None: the one that jax computes on by default. The bytes are
        the same.
      say: takes lines for people.
      progress: hears how far the conversion is.

    Raises:
      BadInput: before any weight is read, for whatever cannot work.
      RunFailed: for a full disk, a failed verification, or a model that was changed meanwhile.
    """
    with agreeing():
        check_mesh(mesh)
        recipe = _resolved(recipe, overrides, calib, say)
        source, target = Path(model), Path(out).absolute()
        opened = frontend.open(source, ignore_extra=ignore_extra)
        recipe = suited(recipe, opened, say)
        final = recipe.pipeline.preflight(opened)
        if hosts().first:
            check_target(target, local(source), overwrite)
        bytes = _bytes_for_values(opened, recipe, limit, mesh, say)
        tokenizer = tokenizer_files(source, say)
        store = Cache(default_cache() if cache is None else cache)
        if hosts().first:
            say(planned(opened, recipe, bytes).time(store))
    stages, windows = recipe.pipeline.stages(), None
    agree(surroundings() | {"recipe": recipe.to_toml(), "OUT": target})
    with working(mesh), _opened_by_first(target) as result:
        with agreeing():
            if hosts().first:
                missing = _bytes_to_write(stages, final) - _bytes_written(result.parent)
                check_space(result.parent, missing)
            contents = checkpoint_contents(source, progress)
        agree({"content of MODEL": sorted(contents.digests.values())})
        graph = frontend.open(source, ignore_extra=ignore_extra, digests=contents.digests)
        graph = finite(graph, recipe.nonfinite, say)
        calibration = None
        if recipe.pipeline.calibrated:
            with alone():
                windows = _calibration_windows(recipe, source, graph, store, say, progress)
            recipe = replace(recipe, calibration_sha256=tokens_digest(windows))
            room, counts = Room(bytes, result.parent / STREAMS / f"{hosts().process_id}"), None
            if recipe.pipeline.counts_tokens:
                with alone():
                    counts = token_counts(graph, windows, room, store, progress)
            calibration = partial(Calibration, windows, room, counts)
        context = Context(recipe.seed, cache=store, say=say, progress=progress)
        entries = _run_stages(graph, stages, context, recipe, calibration, tokenizer, result)
        with agreeing():
            check_unchanged(contents)
            if hosts().first:
                files = write_summary(result, source, recipe, entries, tokenizer, windows)
                finish(target, result, files, overwrite)
    return target


@contextmanager
def _opened_by_first(target: Path) -> Iterator[Path]:
    """The folder that becomes the target, which the first process opens and the others see."""
    first, opened = hosts().first, ExitStack()
    with opened:
        with agreeing():
            result = opened.enter_context(open_result(target)) if first else result_folder(target)
        with agreeing():
            if not result.is_dir():
                raise BadInput(
                    f"{result}: {hosts().names[0]} has made this folder, and it is not seen here; "
                    "OUT must lie on a file system that all processes share"
                )
        yield result


def _resolved(
    recipe: str | Path | Recipe | Pipeline,
    overrides: Sequence[str],
    calib: str | Path | Sequence[str | Path],
    say: Say,
) -> Recipe:
    """The recipe with what was given besides it."""
    if isinstance(recipe, Pipeline):
        recipe = Recipe(recipe)
    if isinstance(recipe, Recipe):
        recipe = with_overrides(recipe, overrides)
    else:
        recipe = read_recipe(recipe, overrides)
    texts = tuple(map(str, (calib,) if isinstance(calib, str | Path) else calib))
    if not texts:
        return recipe
    if not recipe.pipeline.calibrated:
        say("warning: no pass of this recipe reads calibration text; --calib changes nothing")
    return replace(recipe, calibration=texts)


def _calibration_windows(
    recipe: Recipe, source: Path, graph: Graph, cache: Cache, say: Say, progress: Report
) -> np.ndarray:
    """The recipe's calibration text, int32 [windows, context]."""
    return calibration_text(
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


def plan(
    model: str | Path,
    recipe: str | Path | Recipe | Pipeline = "adaptive",
    *,
    overrides: Sequence[str] = (),
    calib: str | Path | Sequence[str | Path] = (),
    ignore_extra: bool = False,
    limit: int | None = None,
    mesh: Mesh | None = None,
    say: Say = print,
) -> Plan:
    """Plans a conversion: reads headers, and neither weights nor calibration text; writes nothing.

    Arguments and errors are those of `convert`. Its time is that of one device.
    """
    check_mesh(mesh)
    recipe = _resolved(recipe, overrides, calib, say)
    opened = frontend.open(Path(model), ignore_extra=ignore_extra)
    recipe = suited(recipe, opened, say)
    recipe.pipeline.preflight(opened)
    return planned(opened, recipe, _bytes_for_values(opened, recipe, limit, mesh, say))


def _check_calibration(recipe: Recipe, graph: Graph) -> None:
    """Raises BadInput, before the model is read, where a pass needs more windows than there will
    be, and for a file that is no text.
    """
    texts, length = len(recipe.calibration), window_length(graph, recipe.calibration_context)
    count = window_count(recipe.calibration, recipe.calibration_tokens, length)
    step = max(recipe.pipeline.passes, key=_least_windows)
    if count < (least := _least_windows(step)):
        tokens = -(-least // texts) * texts * length  # an equal part from each text
        raise BadInput(
            f"pass {step.name} needs at least {least} calibration windows, there are {count} of "
            f"{length} tokens; set calibration_tokens (--calibration-tokens) to at least {tokens:,}"
        )
    for text in recipe.calibration:
        if text != SELF:
            read_text(text)


def _bytes_for_values(
    graph: Graph, recipe: Recipe, limit: int | None, mesh: Mesh | None, say: Say
) -> float:
    """How many bytes the values of calibration may take; says what is taken before any work.

    Raises BadInput for a limit below what the work takes, and for text that will not do.
    """
    if not recipe.pipeline.calibrated:
        return float("inf")
    _check_calibration(recipe, graph)
    length = window_length(graph, recipe.calibration_context)
    count = window_count(recipe.calibration, recipe.calibration_tokens, length)
    devices = 1 if mesh is None else mesh.size
    needed = memory(graph, count * length, length, devices)
    most = limit or SHARE * available()
    say(needed.under(most))
    needed.check_device()
    return needed.left(most) if limit else max(0, most - needed.work)


def _least_windows(step: Pass) -> int:
    """How many windows a pass needs: one where it reads activations and says no number."""
    return step.least_windows or int("activations" in step.needs)


def _run_stages(
    graph: Graph,
    stages: Sequence[Stage],
    context: Context,
    recipe: Recipe,
    begin: Callable[[], Calibration] | None,
    tokenizer: dict[str, bytes],
    result: Path,
) -> tuple[JournalEntry, ...]:
    """Carries out all stages, the last of them into the folder `result`, the others beside it;
    returns the entries of its units. `begin` begins a new calibration.

    What a stage hands on (`Written`) goes into the context and the report of the next one.
    """
    figures, entries = {}, ()
    for i, (passes, after) in enumerate(stages):
        folder = result if i == len(stages) - 1 else result.with_name(f"stage-{i}")
        with agreeing():
            folder.mkdir(exist_ok=True)
        # The streams of a new calibration start in front of the model.
        context = replace(context, calibration=begin and begin())
        done = run_stage(
            graph,
            passes,
            context,
            recipe,
            folder,
            known=figures,
            progress=_part(context.progress, i, len(stages)),
        )
        with agreeing():
            if hosts().first:
                write_metadata(folder, done.graph, recipe, done.entries, tokenizer)
        figures, entries = done.figures, done.entries
        graph = reopened(folder, entries)
        context = replace(context, dense=done.dense, written_digests=done.digests)
        for n in range(len(after)):
            beside, written = folder / f"after-{n}", graph
            with agreeing():
                if hosts().first:  # one process trains, and the others wait
                    with alone():
                        graph = rewrite_written(
                            graph, after[: n + 1], entries, context, recipe, beside, tokenizer
                        )
            if from_first("" if graph is written else "changed") and not hosts().first:
                graph = reopened(beside, read_journal(beside).values())
    return entries


def _part(progress: Report, i: int, count: int) -> Report:
    """Takes the progress of part i of `count` equal ones for that of the whole."""

    def report(part: Progress) -> None:
        assert part.total is not None
        progress(replace(part, done=i * part.total + part.done, total=count * part.total))

    return report


def _bytes_to_write(stages: Sequence[Stage], final: Graph) -> int:
    """How many bytes all stages write: a copy of the model each, and one for each pass that changes
    what was written.
    """
    copies = len(stages) + sum(step.rewrites for stage in stages for step in stage.after)
    return copies * sum(ref.type.nbytes for _, ref in final.weights())


def _bytes_written(partial: Path) -> int:
    """How many bytes a run that was cut off has left."""
    return sum(path.stat().st_size for path in partial.rglob("model-*.safetensors"))
