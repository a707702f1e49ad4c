"""The command line `atd COMMAND`. Each command is a thin function over the library.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted. `--debug` anywhere shows the
traceback of an error.
"""

import sys

import tyro

from atd.cli import convert, run, study  # noqa: F401  they enter their commands
from atd.cli.options import app
from atd.errors import AtdError, RunFailed
from atd.host import one_blas_thread
from atd.version import __version__

DESCRIPTION = """\
A JAX compiler for the weights of language models: every matrix becomes a sum of N ternary bases,
packed, and runs under jit.

Start with `atd demo` (a real model, under 5 minutes), then `atd convert MODEL OUT`, `atd eval OUT
--against MODEL --data TEXT`, `atd generate OUT`. MODEL is a Hugging Face folder (safetensors), a
.gguf file, or a folder that atd made. `atd --version` prints the version, `--debug` behind any
command shows the traceback of an error."""


def main(prefix: tuple[str, ...] = ()) -> None:
    """Runs the command that the arguments of the process name, and exits with its code.

    Args:
      prefix: words to put in front of the arguments: `python -m atd.convert_adaptive` is `atd
        convert`.
    """
    one_blas_thread()
    arguments = [*prefix, *sys.argv[1:]]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments == ["--version"]:
        print(f"atd {__version__}")
        return
    if arguments[:1] == ["sweep"]:
        arguments[0] = "study"
    try:
        app.cli(
            prog="atd",
            description=DESCRIPTION,
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except BrokenPipeError:  # the reader of our output has gone, e.g. `atd inspect M | head`
        sys.stderr.close()
    except KeyboardInterrupt:
        if debug:
            raise
        print(
            "\ninterrupted; a conversion goes on where it stopped when the same command is given "
            "again",
            file=sys.stderr,
        )
        sys.exit(130)
    except Exception as error:
        told = _for_people(error)
        if debug or told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(told.exit_code)


def _for_people(error: Exception) -> AtdError | None:
    """The error in words for people; None for a fault of atd, whose traceback is wanted."""
    if isinstance(error, AtdError):
        return error
    if isinstance(error, OSError):
        return RunFailed(f"{error.filename or 'a file'}: {error.strerror or error}")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return RunFailed(
            "out of memory: take a smaller --batch or --context, a converted model, or a machine "
            "with more memory"
        )
    return None


if __name__ == "__main__":
    main()
