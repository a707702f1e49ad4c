"""The command line: `atd COMMAND`. Each command is a thin function over the library; `atd COMMAND --help` teaches its
options.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted. `--debug` anywhere shows the traceback behind an
error.
"""

# Heavy imports stay inside the commands, so that `atd --help` answers at once.
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from atd.errors import AtdError, BadInput, RunFailed

DESCRIPTION = """\
A JAX compiler for the weights of language models: every matrix becomes a sum of N ternary bases, packed, and runs
under jit.

Start with `atd demo` (a real model, under 5 minutes), then `atd convert MODEL OUT`, `atd eval OUT --against MODEL
--data TEXT`, `atd generate OUT`. MODEL is a Hugging Face folder (safetensors), a .gguf file, or a folder that atd made.
`--debug` shows the traceback of an error."""

Backend = Literal["auto", "xla", "xla-unpacked", "triton"]
Model = Annotated[Positional[Path], tyro.conf.arg(metavar="MODEL")]
app = tyro.extras.SubcommandApp()


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
    from atd.demo import run

    run(out, recipe=recipe, data=data, tokens=tokens, context=context)


@app.command
def convert(
    model: Model,
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")],
    *,
    recipe: str = "adaptive",
    overrides: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="PASS.OPTION=VALUE")] = (),
    nonfinite: Literal["refuse", "zero"] | None = None,
    overwrite: bool = False,
    calib: UseAppendAction[tuple[str, ...]] = (),
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
        bits: average bits a weight of the decoder's linears, scales and padding included; embedding and head stay dense.
        budget: bytes of the whole checkpoint, embedding and head included, e.g. 3.9GB, 75MB.
    """
    from dataclasses import replace

    from atd.allocation_report import allocation_table, read_rows
    from atd.convert_adaptive import convert as run
    from atd.recipe import under_budget
    from atd.report import console, conversion_progress, sizes

    chosen = under_budget(recipe, overrides, bits=bits, budget=budget)
    chosen = replace(chosen, nonfinite=nonfinite) if nonfinite else chosen
    with conversion_progress() as (say, progress):
        folder = run(model, out, chosen, calib=calib, overwrite=overwrite, say=say, progress=progress)
    allocates = any(step.name == "allocate" for step in chosen.pipeline.passes)
    if allocates:
        console.print(allocation_table(read_rows(folder)))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    look = f"atd inspect {out}{f' --plot {out}.png' if allocates else ''}"
    print(
        f"{out}: {sizes(size)} of weights. Next: atd eval {out} --against {model} --data TEXT, atd generate {out}, {look}"
    )


@app.command(name="eval")
def evaluate(
    model: Model,
    *,
    data: Path,
    against: Path | None = None,
    context: int = 512,
    tokens: int | None = None,
    bos: bool = False,
    convention: Literal["standard", "llama.cpp"] = "standard",
    backend: Backend = "auto",
    batch: int = 8,
    tokenizer: Path | None = None,
    json: Path | None = None,
) -> None:
    """Perplexity, and against a dense model KL divergence and top-1 agreement.

    Non-overlapping windows, all shifted tokens scored, perplexity = exp(mean negative log-likelihood); KL(dense ||
    model) in nats on the same positions.

    Args:
        model: the model to evaluate.
        data: UTF-8 text.
        against: the dense model to compare with.
        context: window length in tokens.
        tokens: use the first so many tokens of the text alone.
        bos: put the begin-of-sequence token in front of each window (counted in its length).
        convention: "llama.cpp" scores the second half of each window alone, BOS in front, as its perplexity tool does.
        backend: xla keeps weights packed in memory, xla-unpacked unpacks them once at load (faster on CPUs), triton keeps them packed and is
            fast on NVIDIA GPUs. auto: triton on a GPU that has it, xla-unpacked on a CPU.
        batch: windows a step.
        tokenizer: folder or .gguf file to take the tokenizer from, where MODEL has none.
        json: also write the figures to this file.
    """
    import json as json_module

    from atd.evaluate import evaluate as run
    from atd.models import frontend
    from atd.models.model import load
    from atd.report import console, evaluation_table, graph_size, progress_bar
    from atd.tokenizer import open_tokenizer, read_text

    if json and not json.absolute().parent.is_dir():
        raise BadInput(f"--json {json}: the folder {json.absolute().parent} does not exist")
    if tokens is not None and tokens < 1:
        raise BadInput(f"--tokens must be at least 1, not {tokens}")
    graph = frontend.open(model)
    words = open_tokenizer(tokenizer or model)
    ids = words.encode(read_text(data), bos=bos)
    ids, bos_id = (ids[1:], words.bos_id) if bos else (ids, words.bos_id if convention == "llama.cpp" else None)
    with progress_bar() as bar:
        models = []
        for path in filter(None, (model, against)):
            task = bar.add_task(f"loading {path.name}", total=None, unit="tensors")
            models.append(
                load(
                    path,
                    backend=backend,
                    progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),
                )
            )
        task = bar.add_task("evaluating", total=len(ids[:tokens]), unit="tokens")
        result = run(
            models[0],
            ids[:tokens],
            context=context,
            against=models[1] if against else None,
            bos_id=bos_id,
            batch=batch,
            convention=convention,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    bits, size = graph_size(graph)
    console.print(evaluation_table([(model.name, bits, size, result, None)]))
    if result.against_perplexity is not None and against:
        console.print(
            f"{against.name}: perplexity {result.against_perplexity:.3f}; KL is KL({against.name} || {model.name})"
        )
    if json:
        row = {
            "model": str(model),
            "against": str(against) if against else None,
            "data": str(data),
            "bits_per_weight": bits,
            "bytes": size,
        }
        json.write_text(json_module.dumps(row | result.to_json(), indent=1) + "\n")


@app.command
def sweep(
    model: Model,
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")],
    *,
    recipe: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE")] = (),
    vary: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PASS.OPTION=VALUE,...")] = (),
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
    from atd import grid, results
    from atd.report import console, need_matplotlib, progress_bar

    need_matplotlib()
    with progress_bar() as bar:
        say = lambda line: bar.console.print(line, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
        shared = {"calib": calib, "context": context, "tokens": tokens, "keep": keep, "bar": bar, "say": say}
        rows, failed = grid.run(model, out, recipe, vary, data=data, **shared)
    if rows:
        console.print(results.table(rows))
        results.picture(rows, out / results.PICTURE)
        console.print(f"table: {out / results.RESULTS}; picture: {out / results.PICTURE}")
    grid.raise_failed(failed)


@app.command
def generate(
    model: Model,
    *,
    prompt: str = "Once upon a time",
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    backend: Backend = "auto",
    tokenizer: Path | None = None,
) -> None:
    """Let a model write.

    Args:
        model: the model that writes.
        prompt: text to go on from, or what the user says with --chat.
        chat: put the prompt into the tokenizer's chat template.
        max_new_tokens: stop after so many tokens, or at the end-of-sequence token.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_k: sample among the k likeliest tokens (0: all).
        top_p: sample among the likeliest tokens that hold this much probability.
        seed: same seed, same text.
        backend: xla keeps weights packed in memory, xla-unpacked unpacks them once at load (faster on CPUs), triton keeps them packed and is
            fast on NVIDIA GPUs. auto: triton on a GPU that has it, xla-unpacked on a CPU.
        tokenizer: folder or .gguf file to take the tokenizer from, where MODEL has none.
    """
    import time

    from atd.generate import generate as run
    from atd.models.model import load
    from atd.tokenizer import open_tokenizer

    words = open_tokenizer(tokenizer or model)
    ids = words.encode(
        words.apply_chat([{"role": "user", "content": prompt}]) if chat else prompt, bos=words.adds_bos and not chat
    )
    loaded = load(model, backend=backend)
    new: list[int] = []
    times = [time.perf_counter()]

    def show(token: int) -> None:
        before = words.decode(new)
        new.append(token)
        times.append(time.perf_counter())
        text = words.decode(new)
        if not text.endswith("\ufffd"):  # the bytes of a character come one token at a time
            print(text[len(before.rstrip("\ufffd")) :], end="", flush=True)

    if not chat:
        print(prompt, end="", flush=True)
    run(
        loaded,
        ids.tolist(),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=words.eos_ids,
        on_token=show,
    )
    first, rate = times[1] - times[0], (len(new) - 2) / max(times[-1] - times[2], 1e-9) if len(new) > 2 else 0.0
    print(
        f"\n[{len(new)} tokens; the first after {first:.1f} s, compilation included, then {rate:.1f} tokens/s]",
        file=sys.stderr,
    )


@app.command
def bench(
    model: Annotated[Positional[Path | None], tyro.conf.arg(metavar="MODEL")] = None,
    *,
    against: Path | None = None,
    backend: Backend = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    prompt: int = 128,
    steps: int = 64,
    repeats: int = 5,
    one_jit: bool = False,
    json: Path | None = None,
    tune: bool = False,
    minutes: float = 8,
) -> None:
    """Speed and memory of a model: time to first token, tokens/s, peak memory. Or tune the kernels for this GPU.

    `atd bench OUT --against SOURCE` puts a converted model beside the one it was made from. Figures are medians; models
    take turns. `atd bench --tune` measures kernel shapes on this machine's GPU and keeps the fastest for all later runs.

    Args:
        model: model to measure; not needed with --tune.
        against: dense model to compare with.
        backend: xla keeps weights packed in memory, xla-unpacked unpacks them once at load (faster on CPUs), triton keeps them packed and is
            fast on NVIDIA GPUs. auto: triton on a GPU that has it, xla-unpacked on a CPU.
        dtype: of dense matrices and the cache; by default bfloat16 on a GPU, float32 on a CPU.
        prompt: tokens of the prompt.
        steps: tokens decoded after it, one sequence, greedy.
        repeats: rounds over the models.
        one_jit: decode in one compiled loop as well, to see what the calls from the host cost; compiles for a while.
        json: also write the figures to this file.
        tune: search for this GPU's fastest kernel settings and write them into the installed package.
        minutes: with --tune, begin nothing after so long, and say what was left out; run it again with more for the rest.
    """
    import json as json_module
    from dataclasses import asdict
    from functools import partial

    import jax

    from atd import bench as speed
    from atd.models.model import load
    from atd.report import console

    if tune:
        _tune(minutes)
        return
    if model is None:
        raise BadInput("give a MODEL to measure, or --tune")
    if json and not json.absolute().parent.is_dir():
        raise BadInput(f"--json {json}: the folder {json.absolute().parent} does not exist")
    chosen = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    loaders = {model.name: partial(load, model, backend=backend, dtype=chosen)}
    if against:
        name = f"{against.name} (dense)" if against.name in loaders else against.name
        loaders[name] = partial(load, against, dtype=chosen)
    with console.status("loading") as status:
        sizes = {"prompt": prompt, "steps": steps, "repeats": repeats}
        rows = speed.measure(loaders, **sizes, one_jit=one_jit, say=status.update)
    print(f"prompt {prompt}, {steps} tokens, {chosen}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(speed.table(rows, rows[1].model if against else None))
    if json:
        json.write_text(json_module.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _tune(minutes: float) -> None:
    from functools import partial

    from atd.kernels import triton, tune

    if reason := triton.device_refuses():
        raise BadInput(f"--tune: {reason}")
    try:
        path, left_out = tune.tune(minutes, partial(print, flush=True))
    except OSError as error:
        raise RunFailed(f"the settings cannot be written: {error}") from None
    rest = f"; left out for want of time (--minutes): {', '.join(left_out)}" if left_out else ""
    print(f"{path}: written; every later run on this GPU uses it{rest}")


@app.command
def inspect(model: Model, *, nodes: bool = False, plot: Path | None = None) -> None:
    """Type, bits and size of the weights by layer, from the headers alone.

    Args:
        model: Hugging Face folder, .gguf file or converted folder.
        nodes: a row for each weight matrix rather than each layer.
        plot: draw what allocate gave each matrix into this file (.png, .svg, .pdf).
    """
    from atd.allocation_report import allocation_picture, read_rows
    from atd.models import frontend
    from atd.report import console, graph_table

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
    from atd.convert_adaptive import verify_checkpoint

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
    from atd.export import export_hf
    from atd.report import conversion_progress

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
    from atd import experiments
    from atd.report import console, progress_bar

    with progress_bar() as bar:
        rows = experiments.gaussian(size=size, seed=seed, progress=experiments.bar_progress(bar))
    console.print(experiments.table(rows))
    experiments.plot(rows, plot)
    console.print(f"picture: {plot}")


def main(prefix: tuple[str, ...] = ()) -> None:
    """Entry point. `prefix` puts words in front of the arguments (`python -m atd.convert_adaptive` is `atd convert`)."""
    # Before numpy is read: BLAS's threads wait for one another spinning, and XLA's threads, which do the large products,
    # have the cores. On two busy cores the factorisation of a 576 x 576 matrix took 240 ms of CPU time so, and 8 by one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = [*prefix, *(a for a in sys.argv[1:] if a != "--debug")]
    debug = "--debug" in sys.argv[1:]
    try:
        app.cli(
            prog="atd",
            description=DESCRIPTION,
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except AtdError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        print(
            "\ninterrupted; a conversion goes on where it stopped when the same command is given again", file=sys.stderr
        )
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `atd inspect M | head`
        sys.stderr.close()


if __name__ == "__main__":
    main()
