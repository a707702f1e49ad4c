"""The commands that measure models: eval, bench.

Heavy imports stay inside the commands, so that `atd --help` answers at once.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from atd.cli.options import (
    Activations,
    Backend,
    Chunk,
    Coordinator,
    CoordinatorTimeout,
    Device,
    Dtype,
    IgnoreExtra,
    Json,
    Kv,
    Model,
    Processes,
    ProcessId,
    Quiet,
    TensorParallel,
    Tokenizer,
    Tokens,
    check_least,
    check_writable,
    command,
    joined,
    mesh_of,
    say_assumed,
    say_expected_bos,
)
from atd.errors import BadInput


@command("eval")
def evaluate(
    model: Model,
    *,
    data: Annotated[Path | None, tyro.conf.arg(metavar="TEXT")] = None,
    tasks: Annotated[str | None, tyro.conf.arg(metavar="NAMES")] = None,
    against: Annotated[Path | None, tyro.conf.arg(metavar="MODEL")] = None,
    num_fewshot: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    limit: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    apply_chat_template: bool = False,
    context: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    tokens: Tokens = None,
    bos: bool = False,
    convention: Literal["standard", "llama.cpp"] = "standard",
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    kv: Kv = "model",
    device: Device = None,
    tensor_parallel: TensorParallel = 1,
    devices: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process_id: ProcessId = None,
    coordinator_timeout: CoordinatorTimeout = 300,
    activations: Activations = "model",
    chunk: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    batch: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    tokenizer: Tokenizer = None,
    ignore_extra: IgnoreExtra = False,
    json: Json = None,
    card: bool = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, and KL divergence and top-1 agreement against a dense model; or run tasks
    of lm-evaluation-harness.

    The text is cut into windows that do not overlap, and all tokens after the first of each are
    scored. Perplexity is exp(mean negative log-likelihood); KL(dense || model) is in nats, on the
    same positions.

    Args:
        data: A UTF-8 text.
        tasks: Run these tasks instead: names of lm-evaluation-harness, or YAML files, with commas
            between them. It needs the extra eval: pip install 'atd-jax[eval]'.
        against: The dense model to compare with.
        num_fewshot: The number of examples in front of each question of a task; by default what the
            task says.
        limit: Run the first documents of each task alone, this many.
        apply_chat_template: Put what tasks ask into the chat template of the tokenizer.
        context: The length of a window in tokens: 512 by default, and for tasks what the model was
            made for.
        bos: Put the begin-of-sequence token in front of each window, as one of its tokens; in tasks
            in front of each question, also where the tokenizer does not.
        convention: standard scores whole windows; llama.cpp scores only the second half of each,
            BOS in front where the tokenizer adds one, as llama-perplexity does.
        chunk: The number of tokens of a window that are read at a time, into the cache: fewer take
            less memory. By default the whole window at once, without a cache.
        devices: The number of devices to run on: windows are spread over them, or over groups of
            them where --tensor-parallel has several share a model. By default all of this process;
            for tasks, as many as share a model.
        batch: The number of windows that run together on a device: 8 by default, and for tasks as
            many as make 2,048 tokens.
        card: Write the figures into the model card of MODEL, its README.md, as well. MODEL is a
            folder that atd made; it counts as unchanged afterwards if it did so before.
    """
    from functools import partial

    from atd.calibration.windows import tokens_digest
    from atd.checkpoint.files import write_json
    from atd.checkpoint.hub import hub_id
    from atd.checkpoint.reader import checkpoint_contents, open_tokenizer
    from atd.cli.tasks import evaluate_tasks
    from atd.models import frontend
    from atd.models.numerics import surroundings
    from atd.parallel.devices import MODEL
    from atd.parallel.hosts import agree, agreeing, hosts
    from atd.parallel.partition import partition
    from atd.pipeline.card_figures import add_figures, check_card, figures
    from atd.reports.progress import shown
    from atd.reports.tables import EvaluatedModel, console, evaluation_table, print_line
    from atd.runtime.compare import compare, load_checkpoint, read_tokens
    from atd.runtime.evaluate import check_models, cut

    check_least(2, context=context)
    check_least(1, batch=batch, tokens=tokens, limit=limit, chunk=chunk)
    check_least(0, num_fewshot=num_fewshot)
    check_writable("--json", json)
    if tasks is not None:
        _refuse("--tasks", {"coordinator": coordinator})
    first = joined(coordinator, processes, process_id, coordinator_timeout)
    mesh = mesh_of(device, tensor_parallel, devices, spread=tasks is None)
    of_tasks = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
    }
    if tasks is not None:
        of_texts = {"data": data, "tokens": tokens, "convention": convention != "standard"}
        _refuse("--tasks", of_texts | {"card": card, "chunk": chunk})
        evaluate_tasks(
            [path for path in (model, against) if path],
            [name.strip() for name in tasks.split(",") if name.strip()],
            **of_tasks,
            context=context,
            batch=batch,
            bos=bos,
            backend=backend,
            dtype=dtype,
            kv=kv,
            activations=activations,
            mesh=mesh,
            tokenizer=tokenizer,
            ignore_extra=ignore_extra,
            json=json,
            quiet=quiet,
        )
        return
    if data is None:
        raise BadInput("give a text to evaluate on (--data TEXT), or tasks (--tasks NAMES)")
    _refuse("--data", of_tasks)
    context, batch = context or 512, batch or 8
    if card:
        check_card(model)
    # What can be refused is, before a model is loaded.
    graphs = [frontend.open(p, ignore_extra=ignore_extra) for p in (model, against) if p]
    for graph in graphs:
        partition(graph, tensor_parallel, MODEL)
    words = open_tokenizer(tokenizer or model)
    say_assumed(words, quiet)
    if bos and words.bos_id is None:
        raise BadInput(f"{words.name}: its tokenizer has no BOS token; leave out --bos")
    texts = {data.name: read_tokens(data, words, tokens)}
    in_front = bos or (convention == "llama.cpp" and words.adds_bos)
    bos_id = words.bos_id if in_front else None
    if bos_id is None:
        say_expected_bos(graphs[0], words, quiet)
    windows, _ = cut(texts[data.name], context, bos_id, convention)
    check_models(graphs, windows)
    options = {"context": context, "batch": batch, "bos_id": bos_id, "convention": convention}
    options |= {"chunk": chunk}
    with shown(quiet=quiet or not first) as (_, progress):
        if hosts().count > 1:
            asked = {"dtype": dtype, "backend": backend, "kv": kv, "activations": activations}
            asked |= {"tensor parallel": tensor_parallel, "windows": tokens_digest(windows)}
            agree(surroundings() | asked | options)
            with agreeing():
                files = [checkpoint_contents(p, progress) for p in (model, against) if p]
            agree({"content of the models": [sorted(file.digests.values()) for file in files]})
        how = {"backend": backend, "dtype": dtype, "ignore_extra": ignore_extra, "mesh": mesh}
        load = partial(load_checkpoint, **how, progress=progress)
        loaded = load(model, activations=activations, kv=kv)
        dense = load(against) if against else None
        (result,) = compare(loaded, texts, against=dense, **options, progress=progress).values()
    if not first:
        return
    bits, size = loaded.bits_per_weight, loaded.nbytes
    if json:
        made_of = {"model": str(model), "against": str(against) if against else None}
        sizes = {"bits_per_weight": bits, "bytes": size, "dtype": dtype, "kv": kv}
        write_json(json, made_of | {"data": str(data)} | sizes | result.to_json())
    if card:
        notes = {
            "inputs of linears not rounded": activations == "float",
            "inputs of linears rounded to 8 bits": activations == "int8",
            "keys and values in 8 bits": kv == "int8",
        }
        note = ", ".join(note for note, holds in notes.items() if holds)
        named = str(hub_id(against) or against.name) if against else None
        add_figures(model, figures(result, text=data.name, against=named, note=note))
    console.print(evaluation_table([EvaluatedModel(loaded.name, bits, size, result)]))
    if result.against_perplexity is not None and dense:
        print_line(
            f"{dense.name}: perplexity {result.against_perplexity:.3f}; "
            f"KL is KL({dense.name} || {loaded.name})"
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
    kv: Kv = "model",
    device: Device = None,
    tensor_parallel: TensorParallel = 1,
    activations: Activations = "model",
    random: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    prompt: int = 128,
    chunk: Chunk = 512,
    steps: int = 64,
    repeats: int = 5,
    one_jit: bool = False,
    context: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    budget: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "4GB",
    ignore_extra: IgnoreExtra = False,
    json: Json = None,
    tune: bool = False,
    minutes: float = 8,
    quiet: Quiet = False,
) -> None:
    """Measure the speed and memory of a model, or tune the kernels for this GPU.

    The figures are time to first token, tokens per second and peak memory: medians, where two
    models take turns. With --context, the bytes of buffers are counted, and nothing is run. With
    --tune, kernel settings are measured on the GPU of this machine, and the
    fastest are kept for all later runs.

    Args:
        model: The model to measure; not needed with --random and --tune.
        against: The dense model to compare with.
        dtype: The dtype of dense matrices and of the cache; by default bfloat16 on a GPU and
            float32 on a CPU.
        random: Measure random weights in the shapes of a model instead: llama3-8b, llama-3.2-1b,
            smollm2-135m or tiny. Each matrix has two bases and a trellis code.
        prompt: The number of tokens of the prompt.
        steps: The number of tokens to decode after it, one sequence, greedy.
        repeats: How many times each model is measured.
        one_jit: Also decode in one compiled loop, to see what the calls from the host cost. It
            takes a while to compile.
        context: Count the memory of a sequence of this many tokens instead: weights, cache, and
            what XLA says of prefill and of a step, beside --budget. No weight is read.
        budget: The memory that --context is compared with.
        tune: Search for the fastest kernel settings of this GPU and keep them.
        minutes: The time limit of --tune in minutes. What was left out is listed; a run with more
            minutes measures it.
    """
    from dataclasses import asdict
    from functools import partial

    import jax

    from atd.checkpoint.files import write_json
    from atd.decomposition.allocation import parse_bytes
    from atd.ir.rewrite import with_activations
    from atd.models import frontend
    from atd.models.model import load
    from atd.models.random_model import named_graph
    from atd.reports.progress import shown
    from atd.runtime.bench import check_room, measure, speed_table
    from atd.runtime.memory import count, memory_table

    mesh = mesh_of(device, tensor_parallel)
    if tune:
        if not 0 < minutes < math.inf:
            raise BadInput(f"--minutes is {minutes}; expected a number above 0")
        _tune(minutes)
        return
    if (model is None) == (random is None):
        raise BadInput("give a MODEL to measure, --random NAME or --tune, one of them")
    check_least(1, prompt=prompt, steps=steps, repeats=repeats, chunk=chunk, context=context)
    check_writable("--json", json)
    chosen = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    device = jax.devices()[0].device_kind
    if model:
        name, graph = model.name, frontend.open(model, ignore_extra=ignore_extra)
    else:
        assert random is not None
        name, graph = random, named_graph(random)
    how: dict[str, Any] = {"backend": backend, "dtype": chosen, "kv": kv}
    graph = with_activations(graph, activations)
    if context:
        several = {"tensor_parallel": tensor_parallel > 1}
        _refuse("--context", {"against": against, "one_jit": one_jit} | several)
        beside = parse_bytes(budget)
        memory = count(load(graph, **how, shapes=True), context, chunk)
        if json:
            write_json(json, {"model": name, **how, **asdict(memory), "total": memory.total})
        print(f"{name}, {context:,} tokens, {chosen}, kv {kv}, {device}, jax {jax.__version__}")
        print(memory_table(memory, chunk, beside))
        return
    check_room(name, graph, prompt, steps, one_jit)
    loaders = {name: partial(load, graph, mesh=mesh, **how)}
    if against:
        name = f"{against.name} (dense)" if against.name in loaders else against.name
        graph = frontend.open(against, ignore_extra=ignore_extra)
        check_room(name, graph, prompt, steps, one_jit)
        loaders[name] = partial(load, graph, dtype=chosen, mesh=mesh)
    sizes = {"prompt": prompt, "chunk": chunk, "steps": steps, "repeats": repeats}
    with shown(quiet=quiet) as (_, progress):
        rows = measure(loaders, **sizes, one_jit=one_jit, progress=progress)
    if json:
        write_json(json, [asdict(row) for row in rows])
    settings = {"kv": kv, "activations": activations}
    more = "".join(f", {name} {how}" for name, how in settings.items() if how != "model")
    device = f"{tensor_parallel} x {device}" if mesh else device
    print(f"prompt {prompt}, {steps} tokens, {chosen}{more}, {device}, jax {jax.__version__}")
    print(speed_table(rows, rows[1].model if against else None))


def _refuse(option: str, others: Mapping[str, object]) -> None:
    """Raises BadInput for options that were given, and do nothing beside this one."""
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value]
    if given:
        raise BadInput(f"{', '.join(given)}: not with {option}")


def _tune(minutes: float) -> None:
    from functools import partial

    from atd.kernels.tuning.search import tune

    path, left_out = tune(minutes, partial(print, flush=True))
    rest = f"; no time for (--minutes): {', '.join(left_out)}" if left_out else ""
    print(f"{path}: written; every later run on this GPU uses it{rest}")
