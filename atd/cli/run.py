"""The commands that run models: eval, generate, bench. See cli.py.

Heavy imports stay inside the commands, so that `atd --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from atd.cli.options import Backend, Model, app
from atd.errors import BadInput, RunFailed


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
        batch: windows a step.
        tokenizer: folder or .gguf file to take the tokenizer from, where MODEL has none.
        json: also write the figures to this file.
    """
    import json as json_module

    from atd.checkpoint.files import read_text
    from atd.checkpoint.reader import open_tokenizer
    from atd.models import frontend
    from atd.models.model import load
    from atd.reports.progress import progress_bar
    from atd.reports.tables import console, evaluation_table, graph_size
    from atd.runtime.evaluate import evaluate as run

    _check_folder_of(json)
    if tokens is not None and tokens < 1:
        raise BadInput(f"--tokens must be at least 1, not {tokens}")
    graph = frontend.open(model)
    words = open_tokenizer(tokenizer or model)
    ids = words.encode(read_text(data), bos=bos)
    ids, bos_id = (
        (ids[1:], words.bos_id)
        if bos
        else (ids, words.bos_id if convention == "llama.cpp" else None)
    )
    with progress_bar() as bar:
        models = []
        for path in filter(None, (model, against)):
            task = bar.add_task(f"loading {path.name}", total=None, unit="tensors")
            models.append(
                load(
                    path,
                    backend=backend,
                    progress=lambda done, total, task=task: bar.update(
                        task, completed=done, total=total
                    ),
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
        tokenizer: folder or .gguf file to take the tokenizer from, where MODEL has none.
    """
    import time

    from atd.checkpoint.reader import open_tokenizer
    from atd.models.model import load
    from atd.runtime.generate import generate as run

    words = open_tokenizer(tokenizer or model)
    ids = words.encode(
        words.apply_chat([{"role": "user", "content": prompt}]) if chat else prompt,
        bos=words.adds_bos and not chat,
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
    first, rate = (
        times[1] - times[0],
        (len(new) - 2) / max(times[-1] - times[2], 1e-9) if len(new) > 2 else 0.0,
    )
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

    from atd.models.model import load
    from atd.reports.tables import console
    from atd.runtime import bench as speed

    if tune:
        _tune(minutes)
        return
    if model is None:
        raise BadInput("give a MODEL to measure, or --tune")
    _check_folder_of(json)
    chosen = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    loaders = {model.name: partial(load, model, backend=backend, dtype=chosen)}
    if against:
        name = f"{against.name} (dense)" if against.name in loaders else against.name
        loaders[name] = partial(load, against, dtype=chosen)
    with console.status("loading") as status:
        sizes = {"prompt": prompt, "steps": steps, "repeats": repeats}
        rows = speed.measure(loaders, **sizes, one_jit=one_jit, say=status.update)
    print(
        f"prompt {prompt}, {steps} tokens, {chosen}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    print(speed.table(rows, rows[1].model if against else None))
    if json:
        json.write_text(json_module.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _check_folder_of(json: Path | None) -> None:
    if json and not json.absolute().parent.is_dir():
        raise BadInput(f"--json {json}: the folder {json.absolute().parent} does not exist")


def _tune(minutes: float) -> None:
    from functools import partial

    from atd.kernels.triton import backend as triton
    from atd.kernels.tuning import search as tune

    if reason := triton.device_refuses():
        raise BadInput(f"--tune: {reason}")
    try:
        path, left_out = tune.tune(minutes, partial(print, flush=True))
    except OSError as error:
        raise RunFailed(f"the settings cannot be written: {error}") from None
    rest = f"; left out for want of time (--minutes): {', '.join(left_out)}" if left_out else ""
    print(f"{path}: written; every later run on this GPU uses it{rest}")
