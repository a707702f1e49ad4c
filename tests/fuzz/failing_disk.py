"""Disks that are full from some call on, and processes that are killed in front of a call."""

import errno
import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

_WRITES = ("pwrite", "fsync", "rename", "mkdir")
_DELETES = ("unlink", "rmdir", "remove", "replace", "truncate")


class Killed(BaseException):
    """Stands for SIGKILL: what catches it can change nothing on the disk any more."""


class Calls:
    """How many calls there were that would change the disk."""

    count = 0


@contextmanager
def full_disk(first: float = math.inf, last: float = math.inf) -> Iterator[Calls]:
    """Has no space for the calls of these numbers: files opened for writing, written, synced or
    renamed, and folders made. Of what is written then, half finds a place.
    """
    pwrite = os.pwrite

    def fail(function: Callable, number: int, arguments: tuple) -> None:
        if first <= number <= last:
            if function is pwrite:
                file, content, position = arguments
                pwrite(file, content[: len(content) // 2], position)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with _watched(_WRITES, fail) as calls:
        yield calls


@contextmanager
def killed(at: float = math.inf) -> Iterator[Calls]:
    """Raises Killed from the call of this number on; deletions count as well."""

    def fail(function: Callable, number: int, arguments: tuple) -> None:
        if number >= at:
            raise Killed

    with _watched((*_WRITES, *_DELETES), fail) as calls:
        yield calls


@contextmanager
def _watched(names: tuple[str, ...], fail: Callable[[Callable, int, tuple], None]):
    """Calls fail(function, number, arguments) in front of each of these calls, and counts them."""
    calls = Calls()

    def watched(function: Callable, counts: Callable[..., bool]) -> Callable:
        def call(*arguments, **options):
            if counts(*arguments):
                calls.count += 1
                fail(function, calls.count - 1, arguments)
            return function(*arguments, **options)

        return call

    def for_writing(file, mode="r", *_) -> bool:
        return not set(mode).isdisjoint("wax")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", watched(io.open, for_writing))
        for name in names:
            patch.setattr(os, name, watched(getattr(os, name), lambda *arguments: True))
        yield calls
