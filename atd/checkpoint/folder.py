"""Writes a checkpoint so that nothing is lost: in a partial folder, which is renamed at the end.

    .OUT.atd-partial/   shards, each written to a temporary name, fsynced and renamed;
                        `journal.jsonl` with one line per finished unit; a lock
    OUT                 appears whole, by rename; with `--overwrite` an existing OUT is moved aside
                        first and deleted last

A run that is killed leaves the partial folder; the next run with the same inputs takes up the units
whose journal line and digest agree.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atd.checkpoint.files import disk_errors, path_exists, read_json
from atd.checkpoint.writer import sync_folder
from atd.errors import BadInput

MANIFEST = "manifest.json"
GRAPH = "atd_graph.json"
REPORT = "report.json"
LOCK = "lock"
NodeReport = Mapping[str, Any]  # a row of report.json: node, type, weights, bits, bytes, error, ...


def partial_folder(target: Path) -> Path:
    """Returns where a target is written until it is finished."""
    return target.parent / f".{target.name}.atd-partial"


def _replaced_folder(target: Path) -> Path:
    return target.parent / f".{target.name}.atd-replaced"


def check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Raises BadInput for a target that cannot be written, and makes the folder that it lies in.

    So it is where the target exists (with `overwrite`: is not a checkpoint that atd made), is or
    holds the source or lies in it, or may not be written. A former output that a run moved aside
    and did not replace is put back first.
    """
    source, resolved = source.resolve(), target.resolve()
    if resolved == source or resolved in source.parents or source in resolved.parents:
        raise BadInput(
            f"{target}: the output must lie outside the model's folder {source}, and not hold it"
        )
    replaced = _replaced_folder(target)
    if replaced.exists() and not target.exists():
        os.rename(replaced, target)
    if os.path.lexists(target):
        if not overwrite:
            raise BadInput(f"{target} exists; choose another name, or replace it with --overwrite")
        if target.is_symlink() or not (target / MANIFEST).is_file():
            raise BadInput(
                f"{target} is no checkpoint that atd made, so it is not overwritten; "
                "remove it yourself or choose another name"
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"{target.parent}: cannot be made: {error.strerror}; choose another folder"
        ) from None
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{target.parent}: no permission to write there")


@contextmanager
def open_partial(target: Path) -> Iterator[Path]:
    """Yields the target's partial folder, made where there is none, locked against a second run."""
    folder = partial_folder(target)
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        (folder / LOCK).touch()
    with locked(folder / LOCK, target):
        yield folder


@contextmanager
def locked(path: Path, target: Path) -> Iterator[None]:
    """Locks a file or folder, so that no two runs write one target.

    Raises BadInput where another run has the lock.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"another run is writing {target} now; wait for it or choose another name"
            ) from None
        yield
    finally:
        os.close(descriptor)


def check_space(folder: Path, needed: int) -> None:
    """Raises BadInput, before the work, where the disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BadInput(
            f"{folder.parent}: the output needs {needed / 1e6:.1f} MB, the disk has "
            f"{free / 1e6:.1f} MB free; free some space or choose another folder"
        )


def finish(target: Path, partial: Path, keep: Iterable[str]) -> None:
    """Deletes all but the files `keep` from the partial folder, and gives it the target's name."""
    keep = set(keep)
    with disk_errors(target):
        for path in partial.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        replaced = _replaced_folder(target)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(target, replaced)
        os.rename(partial, target)
        sync_folder(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, str]:
    """Reads file name -> sha256 of a folder that atd made. Raises BadInput where it is none."""
    return _read_entry(folder, MANIFEST, "files", dict)


def read_report(folder: Path) -> list[NodeReport]:
    """Reads the rows of report.json of a converted folder. Raises BadInput where it is none."""
    rows = _read_entry(folder, REPORT, "nodes", list)
    columns = {"node", "type", "weights", "bits", "bytes"}
    if not all(isinstance(row, dict) and columns <= set(row) for row in rows):
        raise BadInput(f"{folder / REPORT}: damaged: a row lacks one of {', '.join(columns)}")
    return rows


def _read_entry[T](folder: Path, name: str, key: str, kind: type[T]) -> T:
    """The entry `key` of a JSON file that every folder of atd's has."""
    if not path_exists(folder / name):
        raise BadInput(f"{folder}: not a checkpoint that atd made: it has no {name}")
    value = read_json(folder / name).get(key)
    if not isinstance(value, kind):
        raise BadInput(f"{folder / name}: damaged: it has no {key!r}; convert the model again")
    return value
