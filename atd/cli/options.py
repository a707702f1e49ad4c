"""Holds what the commands share: the table that they enter, and the options that several have."""

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from atd.errors import BadInput

app = tyro.extras.SubcommandApp()

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
        help="How ternary weights are held and multiplied. xla keeps them packed in memory; "
        "xla-unpacked unpacks them once while loading, which is faster on CPUs; cpu keeps them "
        "packed and generates fastest on CPUs, where a C++ compiler is; triton keeps them packed "
        "and is fast on NVIDIA GPUs; mosaic does so on Hopper GPUs. auto takes triton on a "
        "GPU that has it, and xla-unpacked on a CPU."
    ),
]
Activations = Annotated[
    Literal["model", "float"],
    tyro.conf.arg(
        help="What enters the linears. model is as the model says: one of the format bitnet rounds "
        "its activations to 8 bits per token; float leaves the rounding out."
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
        return app.command(name=name)(function)

    return entered


def check_least(least: int, **options: int | None) -> None:
    """Raises BadInput, before anything is read, for an option that is a number below `least`."""
    for name, value in options.items():
        if value is not None and value < least:
            raise BadInput(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


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
