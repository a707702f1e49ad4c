"""The commands that make models and look at them: demo, convert, inspect, verify, export, push.

Heavy imports stay inside the commands, so that `atd --help` answers at once.
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from atd.cli.options import (
    Calib,
    Context,
    Coordinator,
    CoordinatorTimeout,
    Device,
    Devices,
    IgnoreExtra,
    Model,
    Processes,
    ProcessId,
    Quiet,
    check_writable,
    command,
    joined,
    mesh_of,
)
from atd.exports.formats import To


@command()
def demo(
    *,
    out: Path = Path("demo"),
    recipe: str = "ternary2",
    data: Annotated[Path | None, tyro.conf.arg(metavar="TEXT")] = None,
    tokens: int = 4096,
    context: Context = 512,
    calibration_tokens: int = 4096,
) -> None:
    """Convert a real model, compare it with the original and let both generate text.

    The model is SmolLM2-135M. A picture shows bits and error of each layer, and a table has the
    published figures of llama.cpp's types on the same model, which are on WikiText-2.

    Args:
        out: The folder for the converted model and the picture; an earlier demo there is replaced.
        recipe: The recipe to convert with: ternary2, ternary3, rotated3, datafree3, adaptive and so
            on, or the path of a .toml file.
        data: A UTF-8 text to evaluate on; by default the help topics of Python, which are on every
            machine.
        tokens: The number of tokens of the text to evaluate on.
        calibration_tokens: The number of tokens of calibration text that the model writes, where
            the recipe reads any.
    """
    from atd.cli.demo import run_demo

    run_demo(out, recipe, data, tokens, context, calibration_tokens)


@command()
def convert(
    model: Model,
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")],
    *,
    recipe: str = "adaptive",
    overrides: Annotated[
        UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="PASS.OPTION=VALUE")
    ] = (),
    nonfinite: Annotated[
        Literal["refuse", "zero"] | None, tyro.conf.arg(metavar="{refuse,zero}")
    ] = None,
    overwrite: bool = False,
    calib: Calib = (),
    calibration_tokens: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    bits: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None,
    budget: Annotated[str | None, tyro.conf.arg(metavar="BYTES")] = None,
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    memory: Annotated[str | None, tyro.conf.arg(metavar="BYTES")] = None,
    plan: bool = False,
    device: Device = None,
    devices: Devices = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process_id: ProcessId = None,
    coordinator_timeout: CoordinatorTimeout = 300,
    ignore_extra: IgnoreExtra = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint into one of N-base ternary weights.

    The output folder appears whole or not at all. A run that was interrupted goes on where it
    stopped when the same command is given again.

    Args:
        out: The folder to write.
        recipe: The recipe to convert with. adaptive chooses N for each matrix under --bits or
            --budget; ternary1, ternary2 and ternary3 use one N; rotated2, rotated3, datafree2 and
            datafree3 need no calibration and are quick; greedy3 is the simplest; llama3-8b-4gb fits
            Llama 3 8B into 4 GB. Or the path of a .toml file.
        overrides: Change an option of a pass, for instance --set decompose.bases=3. Give it again
            for more.
        nonfinite: What to do with weights that are NaN or infinite: refuse the model, which is the
            default, or set them to zero.
        overwrite: Replace OUT if it is a folder that atd made, with no file changed or added.
        calibration_tokens: The number of tokens of calibration text to use or to let the model
            write; by default what the recipe says.
        bits: The average bits per weight of the decoder's linears, scales and padding included;
            embedding and head stay dense.
        budget: The size of the whole checkpoint, embedding and head included, such as 3.9GB or
            75MB.
        seed: The seed of what is drawn at random: rotations, and the text that the model writes. By
            default what the recipe says. The same seed gives the same bytes.
        memory: The memory that calibration keeps to, such as 16GB; by default three quarters of
            what is available. What finds no room is computed again or goes to files beside OUT, and
            the result is the same.
        plan: Only say what would be done: passes, types, bytes, memory, and the predicted time by
            part, on this machine. Headers are read, and nothing is written but the speeds that were
            measured, into the cache.
    """
    from dataclasses import replace
    from shlex import quote

    from atd.calibration.rates import rates
    from atd.checkpoint.cache import Cache
    from atd.checkpoint.folder import read_report
    from atd.decomposition.allocation import parse_bytes
    from atd.host import default_cache
    from atd.pipeline.convert import convert as run
    from atd.pipeline.convert import plan as planned
    from atd.pipeline.recipe import under_budget
    from atd.reports.allocation import allocation_table
    from atd.reports.progress import shown
    from atd.reports.tables import console, sizes

    first = joined(coordinator, processes, process_id, coordinator_timeout)
    mesh = mesh_of(device, 1, devices, spread=True)
    chosen = under_budget(recipe, overrides, bits=bits, budget=budget)
    given = {"nonfinite": nonfinite, "calibration_tokens": calibration_tokens, "seed": seed}
    chosen = replace(chosen, **{name: value for name, value in given.items() if value is not None})
    limit = None if memory is None else parse_bytes(memory, "--memory")
    options = {"calib": calib, "ignore_extra": ignore_extra, "limit": limit, "mesh": mesh}
    if plan:
        with shown(quiet=quiet or not first) as (say, _):
            found = planned(model, chosen, **options, say=say)
        if first:
            print(found.shown(rates(Cache(default_cache()))))
        return
    with shown(quiet=quiet or not first) as (say, progress):
        options |= {"overwrite": overwrite}
        folder = run(model, out, chosen, **options, say=say, progress=progress)
    if not first:
        return
    allocates = any(step.name == "allocate" for step in chosen.pipeline.passes)
    if allocates:
        console.print(allocation_table(read_report(folder)))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    made, source, plot = quote(str(out)), quote(str(model)), quote(f"{out}.png")
    print(
        f"{out}: {sizes(size)} of weights. Next: atd eval {made} --against {source} --data TEXT, "
        f"atd generate {made}, atd inspect {made}{f' --plot {plot}' if allocates else ''}"
    )


@command()
def inspect(
    model: Model,
    *,
    nodes: bool = False,
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    ignore_extra: IgnoreExtra = False,
) -> None:
    """Show type, bits and size of the weights of each layer.

    Only headers are read.

    Args:
        nodes: Show each weight matrix rather than each layer.
        plot: Draw the bits that the pass allocate gave each matrix into this file (.png, .svg,
            .pdf).
    """
    from atd.checkpoint.folder import read_report
    from atd.checkpoint.hub import local
    from atd.models import frontend
    from atd.reports.allocation import allocation_picture
    from atd.reports.plots import check_picture
    from atd.reports.tables import console, graph_table

    if plot is not None:
        check_writable("--plot", plot)
        check_picture(plot)
    console.print(graph_table(frontend.open(model, ignore_extra=ignore_extra), nodes=nodes))
    if plot is not None:
        allocation_picture(read_report(local(model)), plot)
        print(f"picture: {plot}")


@command()
def verify(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="FOLDER")], *, quiet: Quiet = False
) -> None:
    """Check that a converted folder is as it was written.

    Files are compared with the manifest, and every weight is searched for invalid codes.

    Args:
        folder: A folder that atd made.
    """
    from atd.pipeline.integrity import verify_checkpoint
    from atd.reports.progress import shown

    with shown(quiet=quiet) as (_, progress):
        count = verify_checkpoint(folder, progress)
    print(f"{folder}: {count} weights are as they were written")


@command()
def export(
    model: Model,
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")],
    *,
    to: To,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "q8_0"] | None,
        tyro.conf.arg(metavar="{float32,float16,bfloat16,q8_0}"),
    ] = None,
    overwrite: bool = False,
    ignore_extra: IgnoreExtra = False,
    quiet: Quiet = False,
) -> None:
    """Write a model in a format that other tools read.

    Args:
        out: The folder to write; with --to gguf the file, NAME.gguf.
        to: The format; hf is a Hugging Face folder of dense weights (config.json, safetensors,
            tokenizer), gguf one file for llama.cpp, exact where the scales are tied, bitnet a
            folder for transformers with N = 1, bit-ttt one for Bit-TTT-Engine; these two need one
            scale per base and matrix.
        dtype: The dtype of the weights that hf writes; float32, the default, holds every ternary
            sum exactly. With --to gguf, that of the matrices that no type of llama.cpp's holds
            exactly; q8_0 by default.
        overwrite: Replace OUT if it is one that atd made, with no file changed or added.
    """
    from atd.exports.formats import FORMATS
    from atd.exports.formats import export as run
    from atd.reports.progress import shown

    with shown(quiet=quiet) as (say, progress):
        how = {"overwrite": overwrite, "ignore_extra": ignore_extra}
        run(model, out, to, {"dtype": dtype}, **how, say=say, progress=progress)
    print(f"{out}: {FORMATS[to].makes}")


@command()
def push(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="FOLDER")],
    name: Annotated[Positional[str], tyro.conf.arg(metavar="USER/REPO")],
    *,
    private: bool = False,
    revision: Annotated[str | None, tyro.conf.arg(metavar="BRANCH")] = None,
    quiet: Quiet = False,
) -> None:
    """Upload a folder that atd made to the Hugging Face hub, as one commit.

    The folder is verified first. The token is that of HF_TOKEN or of `hf auth login`.

    Args:
        folder: A folder that atd made; its README.md, the model card, may have been edited.
        name: The repository, which is made where there is none.
        private: Make a private repository. One that is there already stays as it is.
        revision: The branch to upload to, which is made where there is none; main by default.
    """
    from atd.pipeline.push import push as run
    from atd.reports.progress import shown

    with shown(quiet=quiet) as (_, progress):
        address = run(folder, name, private=private, revision=revision, progress=progress)
    print(f"{address}: uploaded")
