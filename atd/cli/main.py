"""The command line `atd COMMAND`. Each command is a thin function over the library.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted. `--debug` anywhere shows the
traceback of an error.
"""

import errno
import io
import os
import sys

import tyro

from atd.cli import chat, convert, generate, run, study  # noqa: F401  they enter their commands
from atd.cli.options import app, check_once
from atd.errors import AtdError, BadInput, RunFailed
from atd.host import keep_compiled, one_blas_thread
from atd.version import __version__

DESCRIPTION = """\
A JAX compiler for the weights of language models: every matrix becomes a sum of N ternary bases,
packed, and runs under jit.

Start with `atd demo` (a real model, under 5 minutes), then `atd convert MODEL OUT`, `atd eval OUT
--against MODEL --data TEXT`, `atd generate OUT`, `atd chat OUT`. MODEL is a Hugging Face folder
(safetensors), a .gguf file, a folder that atd made, or a model of the Hugging Face hub,
user/repo[@revision]. `atd --version` prints the version, `--debug` behind any command shows the
traceback of an error."""


def main(prefix: tuple[str, ...] = ()) -> None:
    """Runs the command that the arguments of the process name, and exits with its code.

    Args:
      prefix: words to put in front of the arguments: `python -m atd.convert_adaptive` is `atd
        convert`.
    """
    one_blas_thread()
    _print_anything()
    arguments = [*prefix, *sys.argv[1:]]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        _run(arguments)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `atd inspect M | head`
        _print_no_more()
    except KeyboardInterrupt:
        if debug:
            raise
        print(
            "\ninterrupted; a conversion goes on where it stopped when the same command is given "
            "again",
            file=sys.stderr,
        )
        _leave(130)
    except Exception as error:
        if debug:
            raise
        told = _for_people(error)
        print(f"error: {told}", file=sys.stderr)
        _print_no_more()
        _leave(told.exit_code)


def _leave(exit_code: int) -> None:
    """Exits, without waiting for other processes that work on the same."""
    if "atd.parallel.hosts" in sys.modules:
        sys.modules["atd.parallel.hosts"].leave(exit_code)
    sys.exit(exit_code)


def _run(arguments: list[str]) -> None:
    """Runs a command to its end: until all that it printed is out."""
    if arguments == ["--version"]:
        print(f"atd {__version__}")
        return
    if arguments[:1] == ["sweep"]:
        arguments[0] = "study"
    check_once(arguments)
    _check_working_directory()
    keep_compiled()
    app.cli(
        prog="atd",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    if sys.stdout:
        sys.stdout.flush()


# --- errors in words for people -------------------------------------------------------------------

# What is wrong with a path that a user gave.
_OF_PATHS = ("ENOENT", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "ENAMETOOLONG", "ELOOP")
# What jax and numpy say of it.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "array is too big", "Maximum allowed dimension exceeded")


def _for_people(error: Exception) -> AtdError:
    """The error in words for people."""
    text = str(error)
    if isinstance(error, AtdError):
        return error
    if isinstance(error, OSError) and error.errno:
        kind = BadInput if errno.errorcode.get(error.errno) in _OF_PATHS else RunFailed
        return kind(f"{error.filename or 'the output'}: {error.strerror or error}")
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return RunFailed(
            "out of memory: take a smaller --batch, --context or --size, a converted model, or a "
            "machine with more memory"
        )
    if "Symlink loop" in text:  # of pathlib
        return BadInput(f"{text}; give the path of a file or folder")
    first = text.strip().splitlines()[:1]
    if _no_device():
        return BadInput(
            f"jax finds no device of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} here; "
            f"unset it, or install jax for that device{''.join(f' ({line})' for line in first)}"
        )
    return RunFailed(
        f"{': '.join([type(error).__name__, *first])}. This is a fault of atd: the same command "
        "with --debug shows the traceback, for a report"
    )


def _no_device() -> bool:
    """Whether jax is in use, and has no device to run on."""
    if "jax" not in sys.modules:
        return False
    try:
        return not sys.modules["jax"].devices()
    except Exception:  # of many kinds, bare assertions too
        return True


def _check_working_directory() -> None:
    """Raises BadInput where the working directory was deleted: no path can be made absolute."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise BadInput(
            "the working directory does not exist any more; change to another one"
        ) from None


# --- the output -----------------------------------------------------------------------------------


def _print_anything() -> None:
    """Has characters that the terminal's encoding lacks printed as "?", rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _print_no_more() -> None:
    """Drops what stdout could not take, so that leaving does not fail on it once more."""
    try:
        sys.stdout.flush()
    except (OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
