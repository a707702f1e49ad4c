"""Ends a process in one line where another one of the same work is lost.

JAX's coordination service notices it, and ends each process by abort(3), behind pages of C++ text
on stderr. There is no other way to hear of it: its callback cannot be given by
`jax.distributed.initialize`. So the text goes to a temporary file, and the signal's handler reads
from it who is lost.
"""

import ctypes
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_handlers: list = []  # ctypes functions that must not be collected


def end_in_one_line(names: Sequence[str], absent: str) -> None:
    """Has the process end with one line on stderr and exit code 1 where another one is lost.

    From now on only what Python prints on `sys.stderr` is seen there.

    Args:
        names: of the processes, once they are known.
        absent: what to say where not all processes come together.
    """
    text = tempfile.TemporaryFile()  # noqa: SIM115  it is open until the process ends
    stderr = os.dup(2)
    os.dup2(text.fileno(), 2)
    sys.stderr = os.fdopen(stderr, "w", buffering=1, errors="replace")

    def ended(number: int) -> None:
        said = os.pread(text.fileno(), 1 << 20, 0).decode(errors="replace")
        told = told_of(said, names, absent)
        os.write(stderr, (f"error: {told}\n" if told else said).encode(errors="replace"))
        os._exit(1 if told else 128 + number)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(ended)
    _handlers.extend((handler, text))
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, type(handler)), ctypes.c_void_p
    set_handler(signal.SIGABRT, handler)


@contextmanager
def stdout_as_stderr() -> Iterator[None]:
    """Has what libraries print on stdout go to their stderr while it is open."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def told_of(text: str, names: Sequence[str], absent: str) -> str:
    """Returns what to say of the text that the coordination service ends with; "" where it is
    not its text.
    """
    if "JAX distributed service detected fatal errors" not in text:
        return ""
    if "RegisterTask" in text:
        return absent
    lost = re.search(r"unhealthy \(stopped sending heartbeats\):\s*([\d,\s]+)", text)
    numbers = [int(n) for n in re.findall(r"\d+", lost[1])] if lost else []
    if not numbers and "Failed to send RPC to coordination service" in text:
        numbers = [0]  # it runs in process 0
    known = [names[n] if n < len(names) else f"process {n}" for n in numbers]
    return (
        f"{', '.join(known) or 'a process'} has stopped, and so does this one; the same command in "
        "all processes goes on where they stopped"
    )
