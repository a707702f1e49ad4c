"""The command generate: texts that go on from prompts.

Heavy imports stay inside, so that `atd --help` answers at once.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from atd.cli.options import (
    Activations,
    Backend,
    Chunk,
    Device,
    Dtype,
    IgnoreExtra,
    Kv,
    MaxNewTokens,
    Model,
    Quiet,
    Seed,
    Temperature,
    TensorParallel,
    Tokenizer,
    TopK,
    TopP,
    check_least,
    check_writable,
    command,
    mesh_of,
    say_assumed,
)
from atd.errors import BadInput, about

if TYPE_CHECKING:
    import numpy as np

    from atd.checkpoint.tokenizer import Tokenizer as Words


@command()
def generate(
    model: Model,
    *,
    prompt: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None,
    file: Annotated[Path | None, tyro.conf.arg(metavar="PROMPTS")] = None,
    chat: bool = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch: int = 8,
    chunk: Chunk = 512,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    kv: Kv = "model",
    device: Device = None,
    tensor_parallel: TensorParallel = 1,
    activations: Activations = "model",
    tokenizer: Tokenizer = None,
    ignore_extra: IgnoreExtra = False,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    quiet: Quiet = False,
) -> None:
    """Generate text with a model, from one prompt or from many.

    Args:
        prompt: The text to go on from; with --chat, what the user says. By default "Once upon a
            time".
        file: Go on from each prompt of a JSON Lines file, the field prompt of its lines, or text.
            Prompts of like length run together.
        chat: Put each prompt into the chat template of the tokenizer.
        batch: With --file, the number of prompts that run together.
        json: Write the texts to this file as well, as JSON Lines with the fields prompt, text,
            tokens (how many) and finish (stop or length).
    """
    from atd.checkpoint.files import read_prompts, write_json_lines
    from atd.checkpoint.reader import open_tokenizer
    from atd.ir.rewrite import with_activations
    from atd.models import frontend
    from atd.models.model import load
    from atd.reports.progress import shown
    from atd.runtime.generate import generate as run
    from atd.runtime.generate import room
    from atd.runtime.sampling import Sampling

    check_least(1, max_new_tokens=max_new_tokens, batch=batch, chunk=chunk)
    check_writable("--json", json)
    if file and prompt is not None:
        raise BadInput("give --prompt or --file, not both")
    if file and json and file.resolve() == json.resolve():
        raise BadInput(f"--json {json}: is the file of the prompts; give another name")
    mesh = mesh_of(device, tensor_parallel)
    Sampling(temperature, top_k, top_p, seed)
    prompts = read_prompts(file) if file else ["Once upon a time" if prompt is None else prompt]
    words = open_tokenizer(tokenizer or model)
    say_assumed(words, quiet)
    graph = frontend.open(model, ignore_extra=ignore_extra)
    ids = []
    for number, text in enumerate(prompts, 1):
        with about(f"{file}: prompt {number}") if file else nullcontext():
            ids.append(_prompt_ids(words, text, chat))
            room(graph, ids[-1], max_new_tokens)
    graph = with_activations(graph, activations)
    loaded = load(graph, backend=backend, dtype=dtype, kv=kv, mesh=mesh)
    made = partial(
        run,
        loaded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=words.eos_ids,
        chunk=chunk,
    )
    before = [() if chat else prompt for prompt in ids]  # what the text stands behind
    if file:
        with shown(quiet=quiet) as (_, progress):
            new = made([prompt.tolist() for prompt in ids], batch=batch, progress=progress)
    else:
        print("" if chat else prompts[0], end="", flush=True)
        new = [_streamed(made, words, ids[0].tolist(), before[0], quiet)]
    rows = [_row(words, *texts) for texts in zip(prompts, before, new, strict=True)]
    if json:
        write_json_lines(json, rows)
    if file:
        for number, row in enumerate(rows, 1):
            print(f"[{number}] {'' if chat else row['prompt']}{row['text']}\n")


def _streamed(
    run: Callable[..., list[int]],
    words: "Words",
    ids: list[int],
    before: Sequence[int],
    quiet: bool,
) -> list[int]:
    """Prints the text that goes on from the ids as it comes, and on stderr how fast that was."""
    from atd.checkpoint.text_stream import TextStream

    stream, times = TextStream(words, before), [time.perf_counter()]

    def show(token: int) -> None:
        times.append(time.perf_counter())
        if token not in words.eos_ids:
            print(stream.add(token), end="", flush=True)

    new = run(ids, on_token=show)
    print(stream.end(), flush=True)
    rate = (len(new) - 2) / max(times[-1] - times[2], 1e-9) if len(new) > 2 else 0.0
    if not quiet:
        print(
            f"[{len(new)} tokens; the first after {times[1] - times[0]:.1f} s, compilation "
            f"included, then {rate:.1f} tokens/s]",
            file=sys.stderr,
        )
    return new


def _prompt_ids(words: "Words", text: str, chat: bool) -> "np.ndarray":
    """Returns the ids int32 [n] of a prompt, or with `chat` of what a user says."""
    if chat:
        return words.encode(words.apply_chat([{"role": "user", "content": text}]))
    return words.encode(text, bos=words.adds_bos)


def _row(words: "Words", prompt: str, before: Sequence[int], tokens: Sequence[int]) -> dict:
    """What --json says of a text: the tokens behind those before."""
    from atd.checkpoint.text_stream import TextStream

    stream = TextStream(words, before)
    parts = [stream.add(token) for token in tokens if token not in words.eos_ids]
    return {
        "prompt": prompt,
        "text": "".join(parts) + stream.end(),
        "tokens": len(tokens),
        "finish": "stop" if tokens[-1] in words.eos_ids else "length",
    }
