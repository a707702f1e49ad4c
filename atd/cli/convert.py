"""The commands that make models and look at what was made: demo, convert, sweep, inspect, verify, export, experiment. See cli.py.

Heavy imports stay inside the commands, so that `atd --help` answers at once.
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from atd.cli.options import Model, app


@app.command
def demo(
    *,
    out: Path = Path("demo"),
    recipe: str = "datafree3",
    data: Path | None = None,
    tokens: int = 6144,
    context: int = 512,
) -> None:
    """Convert SmolLM2-135M, compare it with the original, draw a picture, let both write.

    Args:
        out: folder for the converted model and the picture; a former demo there is replaced.
        recipe: recipe to convert with (datafree2, datafree3, greedy3, adaptive, ..., or a .toml file).
        data: UTF-8 text to evaluate on; by default the English of Python's own help topics, which is on every machine.
        tokens: how many tokens of it to score.
        context: window length in tokens.
    """
    from atd.cli.demo import run

    run(out, recipe=recipe, data=data, tokens=tokens, context=context)


@app.command
def convert(
    model: Model,
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")],
    *,
    recipe: str = "adaptive",
    overrides: Annotated[
        UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="PASS.OPTION=VALUE")
    ] = (),
    nonfinite: Literal["refuse", "zero"] | None = None,
    overwrite: bool = False,
    calib: UseAppendAction[tuple[str, ...]] = (),
    calibration_tokens: int | None = None,
    bits: float | None = None,
    budget: str | None = None,
) -> None:
    """Turn a checkpoint into an N-base ternary checkpoint.

    The output folder appears whole or not at all. A run that was interrupted goes on where it stopped when the same
    command is given again.

    Args:
        model: Hugging Face folder or .gguf file.
        out: folder to write.
        recipe: adaptive (N by layer, under --bits or --budget), ternary1, ternary2, ternary3 (one N), llama3-8b-4gb,
            datafree2, datafree3 (quick, no calibration), greedy3 (historic), or the path of a .toml file.
        overrides: change one option of a pass, e.g. --set decompose.bases=3 --set decompose.group=row.
        nonfinite: what NaN and Inf weights get: refused (default), or zero.
        overwrite: replace OUT if atd made it.
        calib: UTF-8 calibration text, or self (default): text that the model writes. Give it again to mix several.
        calibration_tokens: how much of it, or how much the model writes; by default what the recipe says.
        bits: average bits a weight of the decoder's linears, scales and padding included; embedding and head stay dense.
        budget: bytes of the whole checkpoint, embedding and head included, e.g. 3.9GB, 75MB.
    """
    from dataclasses import replace

    from atd.pipeline.convert import convert as run
    from atd.pipeline.recipe import under_budget
    from atd.reports.allocation import allocation_table, read_rows
    from atd.reports.progress import conversion_progress
    from atd.reports.tables import console, sizes

    chosen = under_budget(recipe, overrides, bits=bits, budget=budget)
    given = {"nonfinite": nonfinite, "calibration_tokens": calibration_tokens}
    chosen = replace(chosen, **{name: value for name, value in given.items() if value is not None})
    with conversion_progress() as (say, progress):
        folder = run(
            model, out, chosen, calib=calib, overwrite=overwrite, say=say, progress=progress
        )
    allocates = any(step.name == "allocate" for step in chosen.pipeline.passes)
    if allocates:
        console.print(allocation_table(read_rows(folder)))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    look = f"atd inspect {out}{f' --plot {out}.png' if allocates else ''}"
    print(
        f"{out}: {sizes(size)} of weights. Next: atd eval {out} --against {model} --data TEXT, atd generate {out}, {look}"
    )


@app.command
def sweep(
    model: Model,
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")],
    *,
    recipe: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE")] = (),
    vary: Annotated[
        UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PASS.OPTION=VALUE,...")
    ] = (),
    data: Annotated[UseAppendAction[tuple[Path, ...]], tyro.conf.arg(metavar="TEXT")] = (),
    calib: UseAppendAction[tuple[str, ...]] = (),
    context: int = 512,
    tokens: int | None = None,
    keep: bool = False,
) -> None:
    """Convert and evaluate a grid of recipes x options: one table, and a picture of bits against KL divergence.

    OUT gets results.csv, pareto.png and a folder for each point. A sweep that was interrupted goes on where it stopped
    when the same command is given again; one with more values does what is new.

    Args:
        model: Hugging Face folder or .gguf file.
        out: folder for the table, the picture and the points.
        recipe: a recipe or the path of a .toml file; give it again for more.
        vary: values of one option, e.g. --vary decompose.bases=1,2,3 --vary decompose.group=64,128,row: all combinations.
        data: UTF-8 text to evaluate on; give it again for more.
        calib: UTF-8 calibration text for recipes with calibrated passes, or self (default): text that the model writes.
            Give it again to mix several.
        context: window length in tokens.
        tokens: use the first so many tokens of each text alone.
        keep: keep the weights of each point (else deleted once evaluated; what is left repeats them to the byte).
    """
    from atd.reports.plots import need_matplotlib
    from atd.reports.progress import progress_bar
    from atd.reports.tables import console
    from atd.study import results
    from atd.study import run as grid_run
    from atd.study.run import raise_failed

    need_matplotlib()
    with progress_bar() as bar:
        say = lambda line: bar.console.print(line, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
        shared = {
            "calib": calib,
            "context": context,
            "tokens": tokens,
            "keep": keep,
            "bar": bar,
            "say": say,
        }
        rows, failed = grid_run.run(model, out, recipe, vary, data=data, **shared)
    if rows:
        console.print(results.table(rows))
        results.picture(rows, out / results.PICTURE)
        console.print(f"table: {out / results.RESULTS}; picture: {out / results.PICTURE}")
    raise_failed(failed)


@app.command
def inspect(model: Model, *, nodes: bool = False, plot: Path | None = None) -> None:
    """Type, bits and size of the weights by layer, from the headers alone.

    Args:
        model: Hugging Face folder, .gguf file or converted folder.
        nodes: a row for each weight matrix rather than each layer.
        plot: draw what allocate gave each matrix into this file (.png, .svg, .pdf).
    """
    from atd.models import frontend
    from atd.reports.allocation import allocation_picture, read_rows
    from atd.reports.tables import console, graph_table

    console.print(graph_table(frontend.open(model), nodes=nodes))
    if plot is not None:
        allocation_picture(read_rows(model), plot)
        print(f"picture: {plot}")


@app.command
def verify(model: Annotated[Positional[Path], tyro.conf.arg(metavar="FOLDER")]) -> None:
    """Compare a converted folder with its manifest and look at every weight for invalid codes.

    Args:
        model: folder that atd made.
    """
    from atd.pipeline.integrity import verify_checkpoint

    print(f"{model}: {verify_checkpoint(model)} weights are as they were written")


@app.command
def export(
    model: Model,
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")],
    *,
    to: Literal["hf"],
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Write the dequantized weights as a dense checkpoint that any other tool can judge.

    Args:
        model: a folder that atd made (any other model works as well).
        out: folder to write.
        to: format; hf is a Hugging Face folder (config.json, safetensors, tokenizer).
        dtype: of the written weights; float32 holds every ternary sum exactly.
        overwrite: replace DIR if atd made it.
    """
    from atd.pipeline.export import export_hf
    from atd.reports.progress import conversion_progress

    with conversion_progress() as (say, progress):
        export_hf(model, out, dtype=dtype, overwrite=overwrite, say=say, progress=progress)
    print(f"{out}: dense {dtype} weights in Hugging Face form")


@app.command
def experiment(
    name: Annotated[Positional[Literal["gaussian"]], tyro.conf.arg(metavar="gaussian")],
    *,
    size: int = 4096,
    seed: int = 0,
    plot: Path = Path("gaussian.png"),
) -> None:
    """The experiment that started it: bytes against error for a random matrix, N = 1..4.

    Args:
        name: gaussian: a size x size matrix of independent normal numbers.
        size: rows and columns.
        seed: of the random matrix.
        plot: where to draw it.
    """
    from atd.reports.progress import progress_bar
    from atd.reports.tables import console
    from atd.study import gaussian

    with progress_bar() as bar:
        rows = gaussian.gaussian(size=size, seed=seed, progress=gaussian.bar_progress(bar))
    console.print(gaussian.table(rows))
    gaussian.plot(rows, plot)
    console.print(f"picture: {plot}")
