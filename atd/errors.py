"""Defines the exceptions meant for people.

Their messages name the file, the tensor, what was expected and found, and the way out.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class AtdError(Exception):
    """An error for people: the command line prints its message and exits with `exit_code`."""

    exit_code = 1


class BadInput(AtdError):
    """What the user gave cannot be used: a file, an option, a recipe (exit code 2)."""

    exit_code = 2


class RunFailed(AtdError):
    """The input was fine, the run was not: disk full, verification failed (exit code 1)."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Puts what it is about, such as the name of a matrix, in front of the message of an error."""
    try:
        yield
    except AtdError as error:
        raise type(error)(f"{what}: {error}") from error


def nearest(word: str, known) -> str:
    """Returns "; did you mean 'x'?" for the closest known word, else a list of what is known."""
    import difflib

    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
