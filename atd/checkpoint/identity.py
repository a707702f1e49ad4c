"""Identifies files by their content: a digest of all of it, read anew in each run.

Name, size and times do not stand for the bytes: archives and images set times, tools copy them, and
one model replaces another of equal size. So nothing is taken over from an earlier run. A file is
read once, in pieces, one on each core. SHA-256 takes 0.4 to 2 GB/s on a core, so 16 GB take 10 s or
less on eight, or as long as the disk does. Inode and times only tell whether a file was changed
after it was read.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from atd.errors import BadInput, RunFailed
from atd.progress import Progress, Report, unheard

PIECE = 64 << 20  # bytes whose digest is taken by itself
_READ = 1 << 20


@dataclass(frozen=True)
class Contents:
    """Files as they were read."""

    digests: Mapping[Path, str]  # of their content
    states: Mapping[Path, tuple[int, ...]]  # device, inode, size, times


def read_contents(files: Iterable[Path], progress: Report = unheard) -> Contents:
    """Reads files and returns their digests: sha256 of the sha256 of each PIECE, in order.

    Args:
        files: paths.
        progress: hears of the bytes that were read.

    Raises BadInput for a file that cannot be read.
    """
    files = list(dict.fromkeys(files))
    states = {file: _state(file) for file in files}
    pieces = [(file, start) for file in files for start in range(0, _size(states[file]), PIECE)]
    total, done = sum(map(_size, states.values())), 0
    found = {file: hashlib.sha256() for file in files}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digests = threads.map(_piece_digest, *zip(*pieces, strict=True)) if pieces else ()
        for (file, start), digest in zip(pieces, digests, strict=True):
            found[file].update(digest)
            done += min(PIECE, _size(states[file]) - start)
            progress(Progress("reading the model", done, total, "bytes", file.name))
    contents = Contents({file: digest.hexdigest() for file, digest in found.items()}, states)
    check_unchanged(contents)
    return contents


def check_unchanged(contents: Contents) -> None:
    """Raises RunFailed, naming it, for a file that is no longer what was read."""
    for file, state in contents.states.items():
        if _state(file) != state:
            raise RunFailed(
                f"{file} was changed while it was read; run the same command again when it stays"
            )


def _state(file: Path) -> tuple[int, ...]:
    """What changes with a file: (size, device, inode, times)."""
    try:
        status = file.stat()
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror}") from None
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_size, status.st_dev, status.st_ino, *times


def _size(state: tuple[int, ...]) -> int:
    return state[0]


def _piece_digest(file: Path, start: int) -> bytes:
    """sha256 of the PIECE of a file from `start` on."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            for _ in range(PIECE // _READ):
                digest.update(stream.read(_READ))
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror}") from None
    return digest.digest()
