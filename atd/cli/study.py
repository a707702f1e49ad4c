"""The commands that compare many conversions: study, experiment.

Heavy imports stay inside the commands, so that `atd --help` answers at once.
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from atd.cli.options import (
    Calib,
    Context,
    Device,
    Devices,
    IgnoreExtra,
    Model,
    Quiet,
    Tokens,
    check_least,
    check_writable,
    command,
    mesh_of,
)


@command()
def study(
    model: Model,
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")],
    *,
    recipe: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE")] = (),
    vary: Annotated[
        UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PASS.OPTION=VALUE,...")
    ] = (),
    data: Annotated[UseAppendAction[tuple[Path, ...]], tyro.conf.arg(metavar="TEXT")] = (),
    calib: Calib = (),
    context: Context = 512,
    tokens: Tokens = None,
    keep: bool = False,
    device: Device = None,
    devices: Devices = None,
    ignore_extra: IgnoreExtra = False,
    quiet: Quiet = False,
) -> None:
    """Convert and evaluate a model at each point of a grid of recipes and options.

    A table and a picture show bits against KL divergence. OUT gets results.csv, pareto.png and a
    folder for each point. A study that was interrupted goes on where it stopped when the same
    command is given again; with more values it does the new points.

    Args:
        out: The folder for the table, the picture and the points.
        recipe: A recipe, by name or as the path of a .toml file. Give it again for more.
        vary: The values of one option, for instance --vary decompose.bases=1,2,3. Give it again for
            another option: all combinations are done.
        data: A UTF-8 text to evaluate on. Give it again for more.
        keep: Keep the weights of each point. By default they are deleted once they are evaluated;
            the recipe.toml that stays makes them again, to the byte.
    """
    from atd.reports.plots import check_picture
    from atd.reports.progress import shown
    from atd.reports.tables import console, print_line
    from atd.study.results import PICTURE, RESULTS, study_picture, study_table
    from atd.study.run import raise_failed, run_study

    check_least(2, context=context)
    check_least(1, tokens=tokens)
    check_picture(out / PICTURE)
    mesh = mesh_of(device, 1, devices, spread=True)
    options = {"calib": calib, "context": context, "tokens": tokens, "keep": keep}
    options |= {"ignore_extra": ignore_extra, "mesh": mesh}
    with shown(quiet=quiet) as (say, progress):
        rows, failed = run_study(
            model, out, recipe, vary, data=data, **options, say=say, progress=progress
        )
    if rows:
        study_picture(rows, out / PICTURE)
        console.print(study_table(rows))
        print_line(f"table: {out / RESULTS}; picture: {out / PICTURE}")
    raise_failed(failed)


@command()
def experiment(
    name: Annotated[Positional[Literal["gaussian"]], tyro.conf.arg(metavar="gaussian")],
    *,
    size: int = 4096,
    seed: int = 0,
    plot: Path = Path("gaussian.png"),
) -> None:
    """Decompose a random matrix with N = 1 to 4 bases: bytes against error.

    Args:
        name: gaussian is a matrix of independent normal numbers.
        size: The number of rows, and of columns.
        seed: The seed of the matrix.
        plot: Draw it into this file (.png, .svg, .pdf).
    """
    from atd.reports.plots import check_picture
    from atd.reports.progress import shown
    from atd.reports.tables import console, print_line
    from atd.study.gaussian import gaussian, gaussian_picture, gaussian_table

    check_writable("--plot", plot)
    check_picture(plot)
    with shown() as (_, progress):
        rows = gaussian(size=size, seed=seed, progress=progress)
    gaussian_picture(rows, plot)
    console.print(gaussian_table(rows))
    print_line(f"picture: {plot}")
