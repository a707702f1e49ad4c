"""The command line: `atd COMMAND`. Each command is a thin function over the library; `atd COMMAND --help` teaches its
options. The commands: commands_convert.py and commands_run.py.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted. `--debug` anywhere shows the traceback behind an
error.
"""

import os
import sys

import tyro

from atd.cli import convert, run  # noqa: F401 -- they enter their commands
from atd.cli.options import app
from atd.errors import AtdError

DESCRIPTION = """\
A JAX compiler for the weights of language models: every matrix becomes a sum of N ternary bases, packed, and runs
under jit.

Start with `atd demo` (a real model, under 5 minutes), then `atd convert MODEL OUT`, `atd eval OUT --against MODEL
--data TEXT`, `atd generate OUT`. MODEL is a Hugging Face folder (safetensors), a .gguf file, or a folder that atd made.
`--debug` shows the traceback of an error."""


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
            "\ninterrupted; a conversion goes on where it stopped when the same command is given again",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `atd inspect M | head`
        sys.stderr.close()


if __name__ == "__main__":
    main()
