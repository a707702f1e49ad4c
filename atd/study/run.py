"""A sweep: a grid of recipes x options over one model, each point converted, compared with the dense model, dropped.

    points     the cartesian product of recipes and values of options; what resolves to the same passes is done once
    run        converts and evaluates the points that have no row yet -> OUT/results.csv, a folder for each point
               (`atd.study.results`: their table and picture)

A row stands for its key: a hash of the resolved recipe (its description left out), of all tensors of the model, of the
texts and of what the evaluation was asked for, and of atd's version. A point whose row stands is not done again, so a
sweep that was cut off goes on, and one that grew does what is new; conversions that were cut off go on as `convert`
does. A point's folder keeps recipe.toml, report.json, config.json and the manifest of the digests that its weights had:
`atd convert MODEL DIR --recipe OUT/POINT/recipe.toml` makes them again, to the byte.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.progress import Progress

from atd.calibration.text import SELF
from atd.checkpoint.files import read_text
from atd.checkpoint.folder import MANIFEST, REPORT, check_target, read_manifest
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.writer import digest, file_digest, is_intact
from atd.errors import AtdError, BadInput, RunFailed
from atd.models import frontend
from atd.models.model import Model, load
from atd.pipeline.convert import convert
from atd.pipeline.recipe import read_recipe
from atd.reports.tables import graph_size
from atd.runtime.evaluate import cut, evaluate
from atd.study.points import Point, digest_of, points, value_in
from atd.study.results import RESULTS, Row, is_option, number, read_results, write_results
from atd.version import __version__

_KEPT = ("recipe.toml", REPORT, "config.json", MANIFEST)  # of a point whose weights are dropped


@dataclass(frozen=True)
class _Text:
    name: str
    tokens: np.ndarray
    sha256: str  # of the file


@dataclass(frozen=True)
class _Study:
    """A model and what its conversions are compared on. `setting`: hash of all of it; rows of one setting compare."""

    model: Path
    identity: str
    texts: list[_Text]
    context: int
    tokens: int | None
    calib: tuple[str, ...]  # calibration texts; none: those of each recipe
    calib_sha256: dict[str, str]  # of each text that a point calibrates on: of the file, or SELF
    setting: str

    def calibration(self, point: Point) -> tuple[str, ...]:
        """The texts that a point is calibrated on; none where it is not."""
        return (self.calib or point.recipe.calibration) if point.calibrated else ()

    def digests(self, point: Point) -> str:
        """Of its calibration texts."""
        return " ".join(self.calib_sha256[text] for text in self.calibration(point))

    def key(self, point: Point) -> str:
        return digest_of(self.setting, point.digest, self.digests(point))

    def folder(self, point: Point) -> str:
        """Name of the point's folder: what it is, and a digest of all that its weights depend on."""
        made_of = self.identity, point.digest, self.digests(point), __version__
        readable = re.sub(r"[^\w.=+-]+", "_", point.label.replace(" ", "-")).strip("._")[:120]
        return f"{readable}-{digest_of(*made_of)[:8]}"


def _study(
    model: Path,
    grid: Sequence[Point],
    data: Sequence[Path],
    calib: tuple[str, ...],
    context: int,
    tokens: int | None,
) -> _Study:
    """Reads the headers of the model and the texts; refuses what no point could be evaluated on."""
    if not data:
        raise BadInput("a sweep needs a text to evaluate on: --data TEXT")
    if tokens is not None and tokens < 1:
        raise BadInput(f"--tokens must be at least 1, not {tokens}")
    graph = frontend.open(model)
    limit = graph.config.get("max_position_embeddings")
    if limit is not None and context > limit:
        raise BadInput(
            f"a context of {context} is beyond the {limit} positions the model was made for"
        )
    words, texts = open_tokenizer(model), []
    for path in data:
        text = _Text(path.stem, words.encode(read_text(path))[:tokens], file_digest(path))
        if text.name in (other.name for other in texts):
            raise BadInput(
                f"two texts are called {text.name}, as their columns would be; rename one"
            )
        cut(text.tokens, context, None)
        texts.append(text)
    calib_sha256 = {SELF: SELF}
    for name in dict.fromkeys(
        [*calib, *(text for p in grid if p.calibrated for text in p.recipe.calibration)]
    ):
        if name != SELF:
            read_text(name)  # refused now rather than at each point
            calib_sha256[name] = file_digest(Path(name))
    sources = [ref.source for _, ref in graph.weights()]
    identity = digest_of(json.dumps([sources, graph.to_json(), graph.config], sort_keys=True))
    conditions = [identity, context, __version__, *((t.name, digest(t.tokens)) for t in texts)]
    return _Study(
        model,
        identity,
        texts,
        context,
        tokens,
        calib,
        calib_sha256,
        digest_of(json.dumps(conditions)),
    )


def run(
    model: str | Path,
    out: str | Path,
    recipes: Sequence[str],
    vary: Sequence[str] = (),
    *,
    data: Sequence[str | Path],
    calib: str | Path | Sequence[str | Path] | None = None,
    context: int = 512,
    tokens: int | None = None,
    keep: bool = False,
    bar: Progress | None = None,
    say: Callable[[str], None] = print,
) -> tuple[list[Row], list[str]]:
    """Converts and evaluates each of `points(recipes, vary)` that has no row in `out`/results.csv yet.

    Args:
      data: UTF-8 texts to evaluate on; each gives columns of its own, "kl_mean:NAME OF THE FILE WITHOUT ITS ENDING".
      calib: calibration texts for recipes with calibrated passes, or "self"; None: what each recipe says, else "self".
      context, tokens: window length, and how many tokens of each text to use, as in `atd eval`.
      keep: leaves whole checkpoints; else a point's weights are deleted once it is evaluated.
      bar: progress goes there.

    Returns (all finished rows of the same model, texts and settings, those of former grids in `out` as well; labels and
    errors of the points of this grid that failed). A point that fails has its error in its row, the sweep goes on, and
    the next run tries it again. Raises BadInput, before anything is written, for what no point could be done with.
    """
    model, out = Path(model), Path(out)
    grid = points(recipes, vary, say)
    given = (calib,) if isinstance(calib, str | Path) else calib or ()
    study = _study(
        model, grid, [Path(path) for path in data], tuple(map(str, given)), context, tokens
    )
    bar = bar or Progress(disable=True)
    with _opened(out, model) as rows:
        standing = {row["key"]: row for row in rows}
        todo = [
            point
            for point in grid
            if standing.get(study.key(point), {"error": "none yet"})["error"]
        ]
        say(f"{len(grid)} points, {len(grid) - len(todo)} of them done before")
        sweep = bar.add_task("sweep", total=len(todo), unit="points")
        dense = _loaded(model, bar) if todo else None
        for point in todo:
            row = _base(study, point)
            try:
                row |= _figures(study, point, out / row["folder"], dense, bar, say)
                say(f"{point.label}: {_summary(row, study)}")
            except AtdError as error:
                row["error"] = str(error)
                say(f"{point.label} failed: {error}")
            standing[row["key"]] = row
            write_results(out / RESULTS, list(standing.values()))
            if not keep and not row["error"]:
                _drop_weights(out / row["folder"])
            bar.advance(sweep)
        _complete(list(standing.values()), out)
        write_results(out / RESULTS, list(standing.values()))
        mine = [standing[study.key(point)] for point in grid]
    gone = [
        row
        for row in mine
        if not row["error"] and not any((out / row["folder"]).glob("*.safetensors"))
    ]
    if keep and gone:
        say(
            f"{len(gone)} points were done without --keep: atd convert makes their weights again from their recipe.toml"
        )
    failed = [
        f"{point.label}: {row['error']}"
        for point, row in zip(grid, mine, strict=True)
        if row["error"]
    ]
    return [
        row for row in standing.values() if row["setting"] == study.setting and not row["error"]
    ], failed


def _complete(rows: Sequence[Row], out: Path) -> None:
    """Fills in the options that other grids in the same folder vary, from each point's recipe.toml."""
    options = dict.fromkeys(column for row in rows for column in row if is_option(column))
    for row in rows:
        missing = [option for option in options if not row.get(option)]
        file = out / row["folder"] / "recipe.toml"
        if missing and file.is_file():
            with suppress(BadInput):  # a recipe of another version of atd
                recipe = read_recipe(file)
                row.update({option: value_in(recipe, option) for option in missing})


def _base(study: _Study, point: Point) -> Row:
    """What of a row is known before the work."""
    return {
        "key": study.key(point),
        "setting": study.setting,
        "recipe": point.name,
        **point.values,
        "error": "",
        "folder": study.folder(point),
        "recipe_sha256": point.digest,
        "model": study.model.name,
        "context": str(study.context),
        "tokens": str(study.tokens or ""),
        "bos": "no",
        "calib": " + ".join(Path(text).name for text in study.calibration(point)),
        "calib_sha256": study.digests(point),
        "atd": __version__,
        "jax": jax.__version__,
    }


def _figures(
    study: _Study,
    point: Point,
    folder: Path,
    dense: Model | None,
    bar: Progress,
    say: Callable[[str], None],
) -> Row:
    """Converts and evaluates a point; the columns that hold what came out."""
    seconds = _convert(study, point, folder, bar, say)
    bits, size = graph_size(frontend.open(folder))
    figures: dict[str, object] = {
        "bits_per_weight": bits,
        "bytes": size,
        "convert_seconds": seconds,
    }
    converted, spent = _loaded(folder, bar), 0.0
    for text in study.texts:
        with _task(
            bar, f"{point.label}: evaluating on {text.name}", len(text.tokens), "tokens"
        ) as progress:
            result = evaluate(
                converted, text.tokens, context=study.context, against=dense, progress=progress
            )
        spent += result.seconds
        of_text = {
            "perplexity": result.perplexity,
            "kl_mean": result.kl_mean,
            "kl_median": result.kl_median,
            "kl_99": result.kl_99,
            "top1": result.top1_agreement,
            "dense_perplexity": result.against_perplexity,
            "windows": result.windows,
            "positions": result.positions,
            "sha256": text.sha256,
        }
        figures |= {f"{figure}:{text.name}": value for figure, value in of_text.items()}
    figures["evaluate_seconds"] = round(spent, 1)
    return {column: "" if value is None else str(value) for column, value in figures.items()}


def _convert(
    study: _Study, point: Point, folder: Path, bar: Progress, say: Callable[[str], None]
) -> float | None:
    """Makes the point's checkpoint; returns seconds, or None where a whole one stood there (kept, or not evaluated yet)."""
    if _is_whole(folder):
        return None
    started = time.perf_counter()
    with _task(bar, f"{point.label}: converting", None, "weights") as progress:
        convert(
            study.model,
            folder,
            point.recipe,
            calib=study.calib if point.calibrated else (),
            overwrite=folder.exists(),
            say=say,
            progress=lambda at: progress(at.done, at.total),
        )
    return round(time.perf_counter() - started, 1)


def _is_whole(folder: Path) -> bool:
    """The folder holds all files of its manifest as they were written."""
    try:
        return all(
            is_intact(folder / name, sha256) for name, sha256 in read_manifest(folder).items()
        )
    except BadInput:
        return False


def _drop_weights(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in _KEPT:
            path.unlink()


def _loaded(path: Path, bar: Progress) -> Model:
    with _task(bar, f"loading {path.name}", None, "tensors") as progress:
        return load(path, progress=progress)


@contextmanager
def _task(
    bar: Progress, title: str, total: int | None, unit: str
) -> Iterator[Callable[[int, int], None]]:
    """A line of the progress display that goes when its work is done."""
    task = bar.add_task(title, total=total, unit=unit)
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        bar.remove_task(task)


def _summary(row: Row, study: _Study) -> str:
    kl = ", ".join(
        f"KL {number(row, f'kl_mean:{text.name}'):.4f} on {text.name}" for text in study.texts
    )
    return f"{number(row, 'bits_per_weight'):.2f} bits, {kl}"


@contextmanager
def _opened(out: Path, model: Path) -> Iterator[list[Row]]:
    """The rows that stand in `out`, which is made where there is none and locked against a second sweep."""
    if out.exists() and not (out / RESULTS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(
            f"{out} exists and holds no {RESULTS}: not a sweep's folder; choose another name"
        )
    check_target(
        out / "point", model, overwrite=False
    )  # outside the model's folder and writable; makes `out`
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"another sweep is writing {out} now; wait for it or choose another name"
            ) from None
        if not (out / RESULTS).exists():
            write_results(out / RESULTS, [])  # from here on this is a sweep's folder
        yield read_results(out / RESULTS)
    finally:
        os.close(folder)


def raise_failed(failed: Sequence[str]) -> None:
    """Raises RunFailed naming the points that failed, if any did."""
    if failed:
        raise RunFailed(
            "\n  ".join(
                [f"{len(failed)} points failed (the same command tries them again):", *failed]
            )
        )
