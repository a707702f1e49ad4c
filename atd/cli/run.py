"""The commands that run models: eval, generate, bench.

Heavy imports stay inside the commands, so that `atd --help` answers at once.
"""

import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from atd.cli.options import (
    Activations,
    Backend,
    Context,
    IgnoreExtra,
    Json,
    Model,
    Tokenizer,
    Tokens,
    check_least,
    check_writable,
    command,
)
from atd.errors import BadInput


@command("eval")
def evaluate(
    model: Model,
    *,
    data: Annotated[Path, tyro.conf.arg(metavar="TEXT")],
    against: Annotated[Path | None, tyro.conf.arg(metavar="MODEL")] = None,
    context: Context = 512,
    tokens: Tokens = None,
    bos: bool = False,
    convention: Literal["standard", "llama.cpp"] = "standard",
    backend: Backend = "auto",
    activations: Activations = "model",
    batch: int = 8,
    tokenizer: Tokenizer = None,
    ignore_extra: IgnoreExtra = False,
    json: Json = None,
    card: bool = False,
) -> None:
    """Measure perplexity, and KL divergence and top-1 agreement against a dense model.

    The text is cut into windows that do not overlap, and all tokens after the first of each are
    scored. Perplexity is exp(mean negative log-likelihood); KL(dense || model) is in nats, on the
    same positions.

    Args:
        data: A UTF-8 text.
        against: The dense model to compare with.
        bos: Put the begin-of-sequence token in front of each window, as one of its tokens.
        convention: standard scores whole windows; llama.cpp scores only the second half of each,
            BOS in front where the tokenizer adds one, as llama-perplexity does.
        batch: The number of windows that run together.
        card: Write the figures into the model card of MODEL, its README.md, as well. MODEL is a
            folder that atd made; it counts as unchanged afterwards if it did so before.
    """
    from functools import partial

    from atd.checkpoint.files import write_json
    from atd.checkpoint.hub import hub_id
    from atd.checkpoint.reader import open_tokenizer
    from atd.models import frontend
    from atd.pipeline.card_figures import add_figures, check_card, figures
    from atd.reports.progress import shown
    from atd.reports.tables import EvaluatedModel, console, evaluation_table, print_line
    from atd.runtime.compare import compare, load_checkpoint, read_tokens
    from atd.runtime.evaluate import check_models, cut

    check_least(2, context=context)
    check_least(1, batch=batch, tokens=tokens)
    check_writable("--json", json)
    if card:
        check_card(model)
    # What can be refused is, before a model is loaded.
    graphs = [frontend.open(p, ignore_extra=ignore_extra) for p in (model, against) if p]
    words = open_tokenizer(tokenizer or model)
    _say_assumed(words)
    if bos and words.bos_id is None:
        raise BadInput(f"{words.name}: its tokenizer has no BOS token; leave out --bos")
    texts = {data.name: read_tokens(data, words, tokens)}
    in_front = bos or (convention == "llama.cpp" and words.adds_bos)
    bos_id = words.bos_id if in_front else None
    windows, _ = cut(texts[data.name], context, bos_id, convention)
    check_models(graphs, windows)
    options = {"context": context, "batch": batch, "bos_id": bos_id, "convention": convention}
    with shown() as (_, progress):
        how = {"backend": backend, "ignore_extra": ignore_extra, "progress": progress}
        load = partial(load_checkpoint, **how)
        loaded = load(model, activations=activations)
        dense = load(against) if against else None
        (result,) = compare(loaded, texts, against=dense, **options, progress=progress).values()
    bits, size = loaded.bits_per_weight, loaded.nbytes
    if json:
        made_of = {"model": str(model), "against": str(against) if against else None}
        sizes = {"bits_per_weight": bits, "bytes": size}
        write_json(json, made_of | {"data": str(data)} | sizes | result.to_json())
    if card:
        note = "inputs of linears not rounded" if activations == "float" else ""
        named = str(hub_id(against) or against.name) if against else None
        add_figures(model, figures(result, text=data.name, against=named, note=note))
    console.print(evaluation_table([EvaluatedModel(loaded.name, bits, size, result)]))
    if result.against_perplexity is not None and dense:
        print_line(
            f"{dense.name}: perplexity {result.against_perplexity:.3f}; "
            f"KL is KL({dense.name} || {loaded.name})"
        )


@command()
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
    activations: Activations = "model",
    tokenizer: Tokenizer = None,
    ignore_extra: IgnoreExtra = False,
) -> None:
    """Generate text with a model.

    Args:
        prompt: The text to go on from; with --chat, what the user says.
        chat: Put the prompt into the chat template of the tokenizer.
        max_new_tokens: The number of tokens to stop after; the text ends earlier at an
            end-of-sequence token.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_k: Sample among this number of likeliest tokens; 0 is all.
        top_p: Sample among the likeliest tokens that together have this probability.
        seed: The seed of the sampling; the same seed gives the same text.
    """
    import time

    from atd.checkpoint.reader import open_tokenizer
    from atd.checkpoint.text_stream import TextStream
    from atd.ir.rewrite import float_activations
    from atd.models import frontend
    from atd.models.model import load
    from atd.runtime.generate import check_request
    from atd.runtime.generate import generate as run

    check_least(1, max_new_tokens=max_new_tokens)
    words = open_tokenizer(tokenizer or model)
    _say_assumed(words)
    text = words.apply_chat([{"role": "user", "content": prompt}]) if chat else prompt
    ids = words.encode(text, bos=words.adds_bos and not chat)
    graph = frontend.open(model, ignore_extra=ignore_extra)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    check_request(graph, ids, max_new_tokens=max_new_tokens, **sampling)
    graph = float_activations(graph) if activations == "float" else graph
    loaded = load(graph, backend=backend)
    stream = TextStream(words, () if chat else ids)
    times = [time.perf_counter()]

    def show(token: int) -> None:
        times.append(time.perf_counter())
        if token not in words.eos_ids:
            print(stream.add(token), end="", flush=True)

    if not chat:
        print(prompt, end="", flush=True)
    new = run(
        loaded,
        ids.tolist(),
        max_new_tokens=max_new_tokens,
        **sampling,
        stop_tokens=words.eos_ids,
        on_token=show,
    )
    print(stream.end(), flush=True)
    rate = (len(new) - 2) / max(times[-1] - times[2], 1e-9) if len(new) > 2 else 0.0
    print(
        f"[{len(new)} tokens; the first after {times[1] - times[0]:.1f} s, compilation included, "
        f"then {rate:.1f} tokens/s]",
        file=sys.stderr,
    )


@command()
def bench(
    model: Annotated[Positional[Path | None], tyro.conf.arg(metavar="MODEL")] = None,
    *,
    against: Annotated[Path | None, tyro.conf.arg(metavar="MODEL")] = None,
    backend: Backend = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16,float16}"),
    ] = None,
    prompt: int = 128,
    steps: int = 64,
    repeats: int = 5,
    one_jit: bool = False,
    ignore_extra: IgnoreExtra = False,
    json: Json = None,
    tune: bool = False,
    minutes: float = 8,
) -> None:
    """Measure the speed and memory of a model, or tune the kernels for this GPU.

    The figures are time to first token, tokens per second and peak memory: medians, where two
    models take turns. With --tune, kernel settings are measured on the GPU of this machine, and the
    fastest are kept for all later runs.

    Args:
        model: The model to measure; not needed with --tune.
        against: The dense model to compare with.
        dtype: The dtype of dense matrices and of the cache; by default bfloat16 on a GPU and
            float32 on a CPU.
        prompt: The number of tokens of the prompt.
        steps: The number of tokens to decode after it, one sequence, greedy.
        repeats: How many times each model is measured.
        one_jit: Also decode in one compiled loop, to see what the calls from the host cost. It
            takes a while to compile.
        tune: Search for the fastest kernel settings of this GPU and keep them.
        minutes: The time limit of --tune in minutes. What was left out is listed; a run with more
            minutes measures it.
    """
    from dataclasses import asdict
    from functools import partial

    import jax

    from atd.checkpoint.files import write_json
    from atd.models import frontend
    from atd.models.model import load
    from atd.reports.progress import shown
    from atd.runtime.bench import check_room, measure, speed_table

    if tune:
        if not 0 < minutes < math.inf:
            raise BadInput(f"--minutes is {minutes}; expected a number above 0")
        _tune(minutes)
        return
    if model is None:
        raise BadInput("give a MODEL to measure, or --tune")
    check_least(1, prompt=prompt, steps=steps, repeats=repeats)
    check_writable("--json", json)
    chosen = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    graph = frontend.open(model, ignore_extra=ignore_extra)
    check_room(model.name, graph, prompt, steps, one_jit)
    loaders = {model.name: partial(load, graph, backend=backend, dtype=chosen)}
    if against:
        name = f"{against.name} (dense)" if against.name in loaders else against.name
        graph = frontend.open(against, ignore_extra=ignore_extra)
        check_room(name, graph, prompt, steps, one_jit)
        loaders[name] = partial(load, graph, dtype=chosen)
    sizes = {"prompt": prompt, "steps": steps, "repeats": repeats}
    with shown() as (_, progress):
        rows = measure(loaders, **sizes, one_jit=one_jit, progress=progress)
    if json:
        write_json(json, [asdict(row) for row in rows])
    device = jax.devices()[0].device_kind
    print(f"prompt {prompt}, {steps} tokens, {chosen}, {device}, jax {jax.__version__}")
    print(speed_table(rows, rows[1].model if against else None))


def _say_assumed(words) -> None:
    """Says on stderr what the tokenizer's file does not say."""
    if words.assumed:
        print(f"note: {words.assumed}", file=sys.stderr)


def _tune(minutes: float) -> None:
    from functools import partial

    from atd.kernels.tuning.search import tune

    path, left_out = tune(minutes, partial(print, flush=True))
    rest = f"; no time for (--minutes): {', '.join(left_out)}" if left_out else ""
    print(f"{path}: written; every later run on this GPU uses it{rest}")
