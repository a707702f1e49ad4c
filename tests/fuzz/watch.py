"""Watches a reader: what it raises, how long it takes, how much memory, and what it writes."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from atd.errors import AtdError

SECONDS, BYTES = 5, 1 << 30
_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_BESIDE = {"os.remove", "os.rmdir", "os.mkdir"}  # whose path may be one in an open folder
_watched: list[tuple[Path, ...]] = []  # the folders that may be written now, of each `_writes_in`


class Fault(BaseException):
    """A rule is broken. Not an Exception, so that no reader catches it."""


def fault(reader: Callable[[], object], *writable: Path, seconds: float = SECONDS) -> str | None:
    """Runs a reader and returns how it breaks the rules, in one line, or None.

    It may return or raise an `AtdError` with a message, take some seconds, and write into these
    folders.
    """
    try:
        with _within(seconds), _writes_in(writable):
            reader()
    except AtdError as error:
        return None if str(error).strip() else f"{type(error).__name__} without a message"
    except Fault as error:
        return str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frame = error.__traceback__
        while frame and frame.tb_next:
            frame = frame.tb_next
        place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
        return f"{type(error).__name__} at {place}: {str(error)[:200]}"
    return None


@contextmanager
def limited_memory() -> Iterator[None]:
    """Lets this process have BYTES more than it has now; asking for more raises MemoryError."""
    now = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises Fault after some seconds of processor time, as the machine may be busy."""

    def stop(*_):
        raise Fault(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _writes_in(folders: tuple[Path, ...]) -> Iterator[None]:
    """Raises Fault where something is written that does not lie in these folders."""
    if not _hooked:
        sys.addaudithook(_look)  # which stays
        _hooked.append(True)
    _watched.append(tuple(Path(os.path.realpath(folder)) for folder in folders))
    try:
        yield
    finally:
        _watched.pop()


_hooked: list[bool] = []


def _look(event: str, arguments: tuple) -> None:
    if not _watched or (event != "open" and event not in _WRITES):
        return
    path, flags = arguments[0], arguments[2] if event == "open" else os.O_WRONLY
    if isinstance(path, int) or not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    beside = event in _BESIDE and arguments[-1] >= 0
    folder = os.readlink(f"/proc/self/fd/{arguments[-1]}") if beside else ""
    real = Path(os.path.realpath(os.path.join(folder, os.fsdecode(path))))
    if real != Path("/dev/null") and not any(real.is_relative_to(f) for f in _watched[-1]):
        raise Fault(f"{event} writes {real}")
