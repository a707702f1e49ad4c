"""Holds what the commands share: the table that they enter, and the options that several have."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_origin, get_type_hints

import tyro
from tyro.conf import Positional, UseAppendAction

from atd.errors import BadInput

if TYPE_CHECKING:
    from jax.sharding import Mesh

app = tyro.extras.SubcommandApp()
_repeatable: dict[str, set[str]] = {}  # command -> its options that may be given again

Model = Annotated[
    Positional[Path],
    tyro.conf.arg(
        metavar="MODEL",
        help="A Hugging Face folder (safetensors), a .gguf file, a folder that atd made, or a "
        "model of the Hugging Face hub: user/repo, user/repo@revision or user/repo/file.gguf.",
    ),
]
Backend = Annotated[
    Literal["auto", "xla", "xla-unpacked", "cpu", "triton", "mosaic"],
    tyro.conf.arg(
        help="How ternary weights are held and multiplied. xla keeps them packed in memory, and "
        "is slow; xla-unpacked unpacks them once while loading; cpu keeps them packed and is fast "
        "on CPUs, where a C++ compiler is; triton keeps them packed and is fast on NVIDIA GPUs; "
        "mosaic does so on Hopper GPUs. auto takes triton on a GPU that has it; on a CPU it takes "
        "cpu, or xla-unpacked where there is no compiler."
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    tyro.conf.arg(help="The dtype of dense matrices and of the cache of keys and values."),
]
Kv = Annotated[
    Literal["model", "int8"],
    tyro.conf.arg(
        help="How keys and values are cached: model, in --dtype; int8, in 8 bits with a scale per "
        "KV head and position."
    ),
]
Device = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="PLATFORM[:N]",
        help="Where to compute: cpu, gpu or tpu, or one of several by its number, such as gpu:1. "
        "By default what jax chooses.",
    ),
]
Devices = Annotated[
    int | None,
    tyro.conf.arg(
        metavar="N",
        help="The number of devices that the work is spread over: batches of text, and rows of "
        "matrices. By default all of this process. The result is the same, on devices of one kind.",
    ),
]
Coordinator = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="HOST:PORT",
        help="Work together with other processes, on other hosts as a rule, that run the same "
        "command: the address of process 0, the same for all; or auto, where a cluster's "
        "environment says it (Slurm, Open MPI and others).",
    ),
]
Processes = Annotated[
    int | None,
    tyro.conf.arg(metavar="N", help="The number of processes that work together."),
]
ProcessId = Annotated[
    int | None,
    tyro.conf.arg(metavar="I", help="Which of them this one is, from 0; process 0 writes."),
]
CoordinatorTimeout = Annotated[
    int,
    tyro.conf.arg(metavar="SECONDS", help="The time to wait until all processes are there."),
]
TensorParallel = Annotated[
    int,
    tyro.conf.arg(
        metavar="N",
        help="The number of devices that share one model: each has an equal part of the weights, "
        "of the heads and of their cache. It must divide the sizes of MODEL; an error says which "
        "numbers do.",
    ),
]
Quiet = Annotated[
    bool, tyro.conf.arg(help="Print no progress and no notes: results and errors alone.")
]
Activations = Annotated[
    Literal["model", "float", "int8"],
    tyro.conf.arg(
        help="What enters the linears. model is as the model says: one of the format bitnet rounds "
        "its activations to 8 bits per token; float leaves the rounding out; int8 rounds those of "
        "any model, which is the fastest on the backend cpu and costs a little quality."
    ),
]
Tokenizer = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="PATH",
        help="Take the tokenizer from this folder or .gguf file, where MODEL has none.",
    ),
]
IgnoreExtra = Annotated[
    bool,
    tyro.conf.arg(help="Leave out tensors of MODEL that are not part of its architecture."),
]
Context = Annotated[int, tyro.conf.arg(help="The length of a window in tokens.")]
Tokens = Annotated[
    int | None,
    tyro.conf.arg(
        metavar="INT",
        help="The number of tokens to use, from the start of each text; all by default.",
    ),
]
Calib = Annotated[
    UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(
        metavar="TEXT",
        help="A UTF-8 text to calibrate on, or self: text that the model writes. By default what "
        "the recipe says, which is self unless it names files. Give it again to mix several.",
    ),
]
MaxNewTokens = Annotated[
    int,
    tyro.conf.arg(
        help="The number of tokens to stop after; a text ends earlier at an end-of-sequence token."
    ),
]
Temperature = Annotated[
    float,
    tyro.conf.arg(help="0 takes the likeliest token each time; higher is more varied."),
]
TopK = Annotated[int, tyro.conf.arg(help="Sample among this number of likeliest tokens; 0 is all.")]
TopP = Annotated[
    float,
    tyro.conf.arg(help="Sample among the likeliest tokens that together have this probability."),
]
Seed = Annotated[
    int, tyro.conf.arg(help="The seed of the sampling; the same seed gives the same text.")
]
Chunk = Annotated[
    int,
    tyro.conf.arg(
        help="The number of tokens of a prompt that are read at a time: fewer take less memory."
    ),
]
Json = Annotated[
    Path | None, tyro.conf.arg(metavar="FILE", help="Write the figures to this file as well.")
]


def command(name: str | None = None) -> Callable[[Callable], Callable]:
    """Returns a decorator that enters a function as a command, with its docstring as the help.

    Args:
        name: the command's; the function's by default.
    """

    def entered(function: Callable) -> Callable:
        # tyro breaks lines where the docstring's Args do.
        function.__doc__ = re.sub(r"\n {8,}", " ", inspect.cleandoc(function.__doc__ or ""))
        hints = get_type_hints(function)
        again = {option for option, type in hints.items() if get_origin(type) is tuple}
        _repeatable[name or function.__name__] = again | {"set"}  # the name of `overrides`
        return app.command(name=name)(function)

    return entered


def check_once(arguments: Sequence[str]) -> None:
    """Raises BadInput where a command gets an option twice that counts only once."""
    names = [word[2:].partition("=")[0] for word in arguments[1:] if word.startswith("--")]
    names = [name.replace("-", "_") for name in names]
    once = [name for name in names if name not in _repeatable.get(arguments[0], names)]
    for name in once:
        if once.count(name) > 1:
            raise BadInput(f"--{name.replace('_', '-')} is given twice; give it once")


def check_least(least: int, **options: int | None) -> None:
    """Raises BadInput, before anything is read, for an option that is a number below `least`."""
    for name, value in options.items():
        if value is not None and value < least:
            raise BadInput(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def mesh_of(
    device: str | None, tensor_parallel: int, devices: int | None = None, spread: bool = False
) -> "Mesh | None":
    """Returns the devices that a command runs on, and has jax compute on --device; None: one.

    Args:
        device, tensor_parallel, devices: options of the command.
        spread: without --devices all are taken, rather than as many as share a model.
    """
    from atd.models.placement import use_device
    from atd.parallel.devices import make_mesh, process_devices

    check_least(1, tensor_parallel=tensor_parallel, devices=devices)
    if device:
        use_device(device)
        if ":" in device:
            if max(tensor_parallel, devices or 1) > 1:
                raise BadInput(
                    f"--device {device} is one device; give --device {device.partition(':')[0]} "
                    "to run on several"
                )
            return None
    if spread and devices is None:
        here = len(process_devices())
        devices = max(here // tensor_parallel, 1) * tensor_parallel
    return make_mesh(tensor_parallel, devices)


def joined(
    coordinator: str | None, processes: int | None, process_id: int | None, seconds: int
) -> bool:
    """Joins the processes of --coordinator, where it is given; returns whether this one prints.

    Raises BadInput for the other options without it, and as `atd.parallel.hosts.join` does.
    """
    check_least(1, processes=processes, coordinator_timeout=seconds)
    if coordinator is None:
        given = {"--processes": processes, "--process-id": process_id}
        if named := [name for name, value in given.items() if value is not None]:
            raise BadInput(f"{', '.join(named)}: give --coordinator HOST:PORT as well")
        return True
    from atd.parallel.hosts import hosts, join

    join(coordinator, processes, process_id, seconds)
    return hosts().first


def check_writable(option: str, file: Path | None) -> None:
    """Raises BadInput, before the work, where a file cannot be written after it."""
    if file is None:
        return
    folder = file.absolute().parent
    if not folder.is_dir():
        raise BadInput(f"{option} {file}: the folder {folder} does not exist; make it first")
    if file.is_dir():
        raise BadInput(f"{option} {file}: is a folder; give the name of a file")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise BadInput(f"{option} {file}: no permission to write there; choose another place")


def say_assumed(words, quiet: bool) -> None:
    """Says on stderr what the file of a tokenizer does not say."""
    if words.assumed and not quiet:
        print(f"note: {words.assumed}", file=sys.stderr)


def say_expected_bos(graph, words, quiet: bool) -> None:
    """Says on stderr that a model is evaluated on texts that it does not expect."""
    from atd.models.config import expects_bos

    if expects_bos(graph.config) and words.bos_id is not None and not quiet:
        family = graph.config["model_type"]
        note = f"models of type {family} expect BOS in front of a text: give --bos"
        print(f"note: {note}", file=sys.stderr)
