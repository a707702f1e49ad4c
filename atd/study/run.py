"""Runs a study: converts and evaluates one model by each point of a grid of recipes and options.

    rows, failed = run_study(model, out, ["ternary2"], ["decompose.bases=1,2,3"], data=["text.txt"])
    study_table(rows), study_picture(rows, out / "pareto.png")

OUT holds results.csv and a folder for each point. A row stands for its key: a hash of the resolved
recipe without its description, of all tensors of the model, of the texts and of how they are
evaluated, and of the version of atd. A point that has a row is not done again, so a study that was
cut off goes on, and one that grew does what is new; conversions that were cut off go on as well.
The folder of a point keeps recipe.toml, report.json, config.json and the manifest with the digests
of its weights: `atd convert MODEL DIR --recipe OUT/POINT/recipe.toml` makes them again, to the
byte.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from jax.sharding import Mesh

from atd.checkpoint.folder import MANIFEST, REPORT, check_target, locked, read_manifest
from atd.checkpoint.hub import local
from atd.checkpoint.writer import is_intact
from atd.errors import AtdError, BadInput, RunFailed
from atd.pipeline.convert import convert
from atd.pipeline.recipe import read_recipe
from atd.progress import Progress, Report, Say, unheard
from atd.runtime.compare import LoadedCheckpoint, compare, load_checkpoint
from atd.study.points import Point, grid, value_in
from atd.study.results import RESULTS, StudyRow, is_option, number, read_results, write_results
from atd.study.setting import Setting, read_setting

_KEPT = ("recipe.toml", REPORT, "config.json", MANIFEST)  # of a point whose weights are dropped


def run_study(
    model: str | Path,
    out: str | Path,
    recipes: Sequence[str],
    vary: Sequence[str] = (),
    *,
    data: Sequence[str | Path],
    calib: str | Path | Sequence[str | Path] = (),
    context: int = 512,
    tokens: int | None = None,
    keep: bool = False,
    ignore_extra: bool = False,
    mesh: Mesh | None = None,
    say: Say = print,
    progress: Report = unheard,
) -> tuple[list[StudyRow], list[str]]:
    """Converts and evaluates each of `grid(recipes, vary)` that has no row in results.csv yet.

    A point that fails has its error in its row; the study goes on, and the next run tries it again.

    Args:
      model: a Hugging Face folder or a GGUF file.
      out: the study's folder.
      recipes, vary: see `atd.study.points.grid`.
      data: UTF-8 texts to evaluate on. Each gives columns of its own, called "kl_mean:NAME" and so
        on, NAME being the file's without its ending.
      calib: calibration texts for recipes with calibrated passes, or "self"; none: those of each
        recipe.
      context: window length in tokens.
      tokens: how many tokens of each text to use; None: all.
      ignore_extra: leaves out tensors of the model that are not part of its architecture.
      keep: keeps whole checkpoints; else a point's weights are deleted once it is evaluated.
      mesh: devices of this process, with the axis "data", that each point is spread over.
      say, progress: where lines and progress go.

    Returns (all finished rows of the same model, texts and settings, those of former grids in `out`
    as well; labels and errors of the points of this grid that failed).

    Raises BadInput, before anything is written, for what no point could be done with.
    """
    model, out = Path(model), Path(out)
    points = grid(recipes, vary, say)
    calibration = tuple(map(str, (calib,) if isinstance(calib, str | Path) else calib))
    texts = [Path(path) for path in data]
    setting = read_setting(
        model,
        points,
        data=texts,
        calib=calibration,
        context=context,
        tokens=tokens,
        ignore_extra=ignore_extra,
    )
    with _opened(out, model) as rows:
        by_key = {row["key"]: row for row in rows}
        todo = [p for p in points if by_key.get(setting.key(p), {"error": "new"})["error"]]
        say(f"{len(points)} points, {len(points) - len(todo)} of them done already")
        options = {"ignore_extra": ignore_extra, "mesh": mesh, "progress": progress}
        dense = load_checkpoint(model, **options) if todo else None
        for i, point in enumerate(todo):
            progress(Progress("study", i, len(todo), "points", point.label))
            row = _done(setting, point, out, dense, mesh, say, progress)
            by_key[row["key"]] = row
            write_results(out / RESULTS, list(by_key.values()))
            if not keep and not row["error"]:
                _drop_weights(out / row["folder"])
        if todo:
            progress(Progress("study", len(todo), len(todo), "points"))
        _complete(list(by_key.values()), out)
        write_results(out / RESULTS, list(by_key.values()))
    mine = [(point, by_key[setting.key(point)]) for point in points]
    if keep:
        _say_which_are_gone([row for _, row in mine], out, say)
    failed = [f"{point.label}: {row['error']}" for point, row in mine if row["error"]]
    finished = [row for row in by_key.values() if not row["error"]]
    return [row for row in finished if row["setting"] == setting.digest], failed


def raise_failed(failed: Sequence[str]) -> None:
    """Raises RunFailed naming the points that failed, if any did."""
    if failed:
        many = f"{len(failed)} points" if len(failed) > 1 else "1 point"
        head = f"{many} failed (the same command tries again):"
        raise RunFailed("\n  ".join([head, *failed]))


# --- one point ------------------------------------------------------------------------------------


def _done(
    setting: Setting,
    point: Point,
    out: Path,
    dense: LoadedCheckpoint | None,
    mesh: Mesh | None,
    say: Say,
    progress: Report,
) -> StudyRow:
    """Converts and evaluates a point; its row, which holds the error where it failed."""
    row = setting.row(point)
    try:
        row |= _figures(setting, point, out / row["folder"], dense, mesh, say, progress)
        say(f"{point.label}: {_summary(row, setting)}")
    except AtdError as error:
        row["error"] = str(error)
        say(f"{point.label} failed: {error}")
    return row


def _figures(
    setting: Setting,
    point: Point,
    folder: Path,
    dense: LoadedCheckpoint | None,
    mesh: Mesh | None,
    say: Say,
    progress: Report,
) -> StudyRow:
    """Converts and evaluates a point; the columns that hold what came out."""
    seconds = _convert(setting, point, folder, mesh, say, progress)
    converted = load_checkpoint(folder, mesh=mesh, progress=progress)
    results = compare(
        converted,
        {name: text.tokens for name, text in setting.texts.items()},
        context=setting.context,
        against=dense,
        progress=progress,
    )
    figures: dict[str, object] = {
        "bits_per_weight": converted.bits_per_weight,
        "bytes": converted.nbytes,
        "convert_seconds": seconds,
    }
    for name, result in results.items():
        of_text = {
            "perplexity": result.perplexity,
            "kl_mean": result.kl_mean,
            "kl_median": result.kl_median,
            "kl_99": result.kl_99,
            "top1": result.top1_agreement,
            "dense_perplexity": result.against_perplexity,
            "windows": result.windows,
            "positions": result.positions,
            "sha256": setting.texts[name].sha256,
        }
        figures |= {f"{figure}:{name}": value for figure, value in of_text.items()}
    figures["evaluate_seconds"] = round(sum(result.seconds for result in results.values()), 1)
    return {column: "" if value is None else str(value) for column, value in figures.items()}


def _convert(
    setting: Setting, point: Point, folder: Path, mesh: Mesh | None, say: Say, progress: Report
) -> float | None:
    """Makes the checkpoint of a point; the seconds it took, or None where a whole one was there."""
    if _is_whole(folder):
        return None
    started = time.perf_counter()
    convert(
        setting.model,
        folder,
        point.recipe,
        calib=setting.calib if point.calibrated else (),
        overwrite=folder.exists(),
        ignore_extra=setting.ignore_extra,
        mesh=mesh,
        say=say,
        progress=progress,
    )
    return round(time.perf_counter() - started, 1)


def _summary(row: StudyRow, setting: Setting) -> str:
    kl = (f"KL {number(row, f'kl_mean:{name}'):.4f} on {name}" for name in setting.texts)
    return f"{number(row, 'bits_per_weight'):.2f} bits, {', '.join(kl)}"


# --- the study's folder ---------------------------------------------------------------------------


@contextmanager
def _opened(out: Path, model: Path) -> Iterator[list[StudyRow]]:
    """The rows in `out`, which is made where there is none and locked against a second study."""
    if out.exists() and not (out / RESULTS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(
            f"{out} exists and holds no {RESULTS}: not a study's folder; choose another name"
        )
    # Outside the model's folder, and writable; this makes `out`.
    check_target(out / "point", local(model), overwrite=False)
    with locked(out, out):
        if not (out / RESULTS).exists():
            write_results(out / RESULTS, [])  # from here on this is a study's folder
        yield read_results(out / RESULTS)


def _complete(rows: Sequence[StudyRow], out: Path) -> None:
    """Fills in the options that other grids in the same folder vary, from each recipe.toml."""
    options = dict.fromkeys(column for row in rows for column in row if is_option(column))
    for row in rows:
        missing = [option for option in options if not row.get(option)]
        file = out / row["folder"] / "recipe.toml"
        if missing and file.is_file():
            with suppress(BadInput):  # a recipe of another version of atd
                recipe = read_recipe(file)
                row.update({option: value_in(recipe, option) for option in missing})


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds all files of its manifest as they were written."""
    try:
        files = read_manifest(folder)
    except BadInput:
        return False
    return all(is_intact(folder / name, sha256) for name, sha256 in files.items())


def _drop_weights(folder: Path) -> None:
    """Deletes the files of a point's manifest but for those that are kept."""
    for name in read_manifest(folder):
        if name not in _KEPT:
            (folder / name).unlink(missing_ok=True)


def _say_which_are_gone(rows: Sequence[StudyRow], out: Path, say: Say) -> None:
    done = [row for row in rows if not row["error"]]
    gone = [row for row in done if not any((out / row["folder"]).glob("*.safetensors"))]
    if gone:
        say(
            f"{len(gone)} points were done without --keep: atd convert makes their weights again "
            "from their recipe.toml"
        )
