"""Writing a checkpoint so that nothing is lost: a partial folder beside the target, a journal, and one rename at the
end.

    .OUT.atd-partial/   shards, each written to a temporary name, fsynced and renamed; `journal.jsonl` with one line a
                        finished unit; a lock
    OUT                 appears whole, by rename; an existing OUT is moved aside first (`--overwrite`) and deleted last

A run that is killed leaves the partial folder; the next run with the same inputs takes up the units whose journal line
and digest agree.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atd.checkpoint.files import path_exists, read_json
from atd.checkpoint.writer import disk_errors, sync_folder
from atd.errors import BadInput

MANIFEST = "manifest.json"
GRAPH = "atd_graph.json"
REPORT = "report.json"
LOCK = "lock"
NodeReport = Mapping[str, Any]  # a row of report.json: node, type, weights, bits, bytes, error, ...


def partial_folder(target: Path) -> Path:
    return target.parent / f".{target.name}.atd-partial"


def _replaced_folder(target: Path) -> Path:
    return target.parent / f".{target.name}.atd-replaced"


def check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Refuses a target that exists (or, with overwrite, is not a checkpoint that atd made), that is or holds the source, or cannot be written."""
    source, resolved = source.resolve(), target.resolve()
    if resolved == source or resolved in source.parents or source in resolved.parents:
        raise BadInput(
            f"{target}: the output must lie outside the model's folder {source}, and not hold it"
        )
    replaced = _replaced_folder(target)
    if replaced.exists() and not target.exists():
        os.rename(
            replaced, target
        )  # a run was cut off between moving the old output aside and putting the new one in its place
    if os.path.lexists(target):
        if not overwrite:
            raise BadInput(f"{target} exists; choose another name, or replace it with --overwrite")
        if target.is_symlink() or not (target / MANIFEST).is_file():
            raise BadInput(
                f"{target} is no checkpoint that atd made, so it is not overwritten; remove it yourself or choose another name"
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
    """The partial folder of the target, made where there is none and locked against a second run."""
    folder = partial_folder(target)
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        lock = (folder / LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"another run is writing {target} now; wait for it or choose another name"
            ) from None
        yield folder


def check_space(folder: Path, needed: int) -> None:
    """Refuses before the work what would fill the disk. `needed` in bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BadInput(
            f"{folder.parent}: the output needs {needed / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB free"
        )


def finish(target: Path, partial: Path, keep: Iterable[str]) -> None:
    """Leaves in the partial folder the files `keep` alone, and gives it the target's name."""
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
