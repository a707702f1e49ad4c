"""Writes a checkpoint so that nothing is lost: in a partial folder, which is renamed at the end.

    .OUT.atd-partial/   a lock; a journal with one line per finished unit; and
        result/         shards, each written to a temporary name, fsynced and renamed
    OUT                 appears whole, as result/ gets its name; with `--overwrite` an existing OUT
                        is moved aside first and deleted last

A run that is killed leaves the partial folder; the next run with the same inputs takes up the units
whose journal line and digest agree.

Only what atd wrote is ever deleted, and only where it is unchanged: a folder whose files are those
of its manifest, by name and by sha256. An OUT that is to be replaced is checked when the run begins
and again when it has been moved aside, where no other program looks for it.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from atd.checkpoint.files import disk_errors, is_plain_name, path_exists, read_json
from atd.checkpoint.writer import file_digest, sync_folder, write_file
from atd.errors import BadInput

MANIFEST = "manifest.json"
GRAPH = "atd_graph.json"
REPORT = "report.json"
CARD = "README.md"
LOCK, RESULT = "lock", "result"
NodeReport = Mapping[str, Any]  # a row of report.json: node, type, weights, bits, bytes, error, ...


def partial_folder(target: Path) -> Path:
    """Returns where a target is written until it is finished."""
    return target.parent / f".{target.name}.atd-partial"


def replaced_path(target: Path) -> Path:
    """Returns where what is at a target is kept while it is replaced."""
    return target.parent / f".{target.name}.atd-replaced"


def result_folder(target: Path) -> Path:
    """Returns the part of the partial folder that becomes the target."""
    return partial_folder(target) / RESULT


def check_target(
    target: Path,
    source: Path,
    overwrite: bool,
    reason_against: Callable[[Path], str | None] | None = None,
) -> None:
    """Raises BadInput for a target that cannot be written, and makes the folder that it lies in.

    So it is where the target exists (with `overwrite`: is not a folder of atd's, unchanged), is or
    holds the source or lies in it, or may not be written. A former output that a run moved aside
    and did not replace is put back first. `reason_against` returns why what is at the
    target is not what atd wrote, where that is no folder.
    """
    source, resolved = source.resolve(), target.resolve()
    if resolved == source or resolved in source.parents or source in resolved.parents:
        raise BadInput(
            f"{target}: the output must lie outside the model's folder {source}, and not hold it"
        )
    replaced = replaced_path(target)
    if replaced.exists() and not os.path.lexists(target):
        os.rename(replaced, target)
    _check_replaceable(target, overwrite, reason_against or foreign)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"{target.parent}: cannot be made: {error.strerror}; choose another folder"
        ) from None
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{target.parent}: no permission to write there")


def _check_replaceable(
    target: Path, overwrite: bool, reason_against: Callable[[Path], str | None]
) -> None:
    """Raises BadInput where something is at the target that this run may not delete."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        made = (target / MANIFEST).is_file() and not target.is_symlink()
        way = ", or replace it with --overwrite" if made else ""
        raise BadInput(f"{target} exists; choose another name{way}")
    if reason := reason_against(target):
        raise not_overwritten(target, reason)


def not_overwritten(path: Path, reason: str) -> BadInput:
    """Returns the error for what may not be replaced."""
    return BadInput(
        f"{path} is no checkpoint that atd made, so it is not overwritten: {reason}; "
        "remove it yourself or choose another name"
    )


def foreign(folder: Path) -> str | None:
    """Returns why a path is not a folder of atd's as atd wrote it; None where it is.

    Files of the manifest may be missing; those that are there are read, for their digests.
    """
    if reason := _foreign_names(folder):
        return reason
    for name, sha256 in read_manifest(folder).items():
        if (folder / name).exists() and file_digest(folder / name) != sha256:
            return f"its {name} was changed since atd wrote it"
    if (folder / REPORT).exists() and not report_is_intact(folder):
        return f"its {REPORT} was changed since atd wrote it"
    return None


def _foreign_names(folder: Path) -> str | None:
    """What `foreign` finds without reading more than manifest and report."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder"
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        files = read_manifest(folder)
        if not {"atd", "export"} & set(read_json(folder / MANIFEST)):
            return f"its {MANIFEST} is none of atd's"
        for path in sorted(folder.iterdir()):
            if path.name not in (*files, REPORT, MANIFEST):
                return f"atd did not write its {path.name}"
            if path.is_symlink() or not path.is_file():
                return f"its {path.name} is no file"
        if REPORT not in files and (folder / REPORT).exists():
            read_report(folder)
    except BadInput as error:
        return str(error)
    return None


def _delete(folder: Path) -> None:
    """Deletes a folder that is not `foreign`, its manifest last. What else has come into it in
    the meantime stays, and the folder with it.
    """
    names = {*read_manifest(folder), REPORT}
    for path in folder.iterdir():
        if path.name in names:
            path.unlink()
    (folder / MANIFEST).unlink()
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def open_result(target: Path) -> Iterator[Path]:
    """Yields the folder that becomes the target, in a partial folder that is locked against a
    second run: what a run that was cut off left there, or an empty one.

    A partial folder in which nothing was written is deleted again.
    """
    partial, result = partial_folder(target), result_folder(target)
    if partial.is_symlink() or (partial.exists() and not _is_partial(partial)):
        raise BadInput(f"{partial}: not a folder of an unfinished run of atd; remove it yourself")
    with disk_errors(partial):
        partial.mkdir(exist_ok=True)
        (partial / LOCK).touch()
    with locked(partial / LOCK, target):
        with disk_errors(result):
            result.mkdir(exist_ok=True)
        try:
            yield result
        finally:
            _drop_empty(partial)


def _is_partial(folder: Path) -> bool:
    """Whether a folder is one that `open_result` made, or an empty one."""
    return folder.is_dir() and ((folder / LOCK).is_file() or not any(folder.iterdir()))


def _drop_empty(partial: Path) -> None:
    """Deletes a partial folder in which nothing was written."""
    with suppress(OSError):
        (partial / RESULT).rmdir()
        if [path.name for path in partial.iterdir()] == [LOCK]:
            (partial / LOCK).unlink()
            partial.rmdir()


@contextmanager
def locked(path: Path, target: Path) -> Iterator[None]:
    """Locks a file or folder, so that no two runs write one target.

    Raises BadInput where another run has the lock, or has just finished.
    """
    busy = BadInput(f"another run is writing {target} now; wait for it or choose another name")
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except FileNotFoundError:
        raise busy from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        if not os.fstat(descriptor).st_nlink:  # deleted by a run that finished in between
            raise busy
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


def finish(target: Path, result: Path, keep: Iterable[str], overwrite: bool = False) -> None:
    """Gives the result, with nothing but the files `keep` in it, the target's name; deletes the
    rest of the partial folder.

    Raises:
        BadInput: something is at the target now that may not be replaced (see `check_target`). The
            partial folder stays, so that the same command has nothing left to do but this.
    """
    keep, replaced = set(keep), replaced_path(target)
    with disk_errors(target):
        for path in result.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            with _moved_aside(target, replaced, overwrite):
                os.rename(result, target)
        except BadInput as error:
            raise BadInput(
                f"{error}. What was to be there is kept: once {target} is gone, the same command "
                "has only its name left to give it"
            ) from None
        sync_folder(target.parent)
        if replaced.exists():
            _delete(replaced)
        shutil.rmtree(partial_folder(target))


@contextmanager
def _moved_aside(target: Path, replaced: Path, overwrite: bool) -> Iterator[None]:
    """Moves what is at the target aside, and back again where it may not be deleted, or what is
    done under this cannot be.
    """
    if not os.path.lexists(target):
        yield
        return
    if not overwrite:
        _check_replaceable(target, overwrite, foreign)
    if reason := _foreign_names(target):
        raise not_overwritten(target, reason)
    if os.path.lexists(replaced):
        if reason := foreign(replaced):
            raise not_overwritten(replaced, reason)
        _delete(replaced)
    os.rename(target, replaced)
    try:
        if reason := foreign(replaced):
            raise not_overwritten(target, reason)
        yield
    except BaseException:
        if not os.path.lexists(target):
            os.rename(replaced, target)
        raise


# --- manifest and report --------------------------------------------------------------------------

_TIMES = re.compile(rb'("seconds": )[-+.\deE]+')


def write_manifest(folder: Path, about: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Writes the manifest of a folder in which all other files are.

    It has a digest of the report without its times, which differ from run to run, and one of
    itself.

    Args:
        about: what it says of the run: versions, calibration text.
        digests: file name -> sha256, but for the report.
    """
    manifest = {**about, "files": dict(sorted(digests.items()))}
    if (folder / REPORT).exists():
        manifest["report"] = _report_digest(folder / REPORT)
    _write_signed(folder, manifest)


def renew_digest(folder: Path, name: str) -> None:
    """Writes the digest of a file that was changed on purpose into the manifest of its folder."""
    manifest = read_json(folder / MANIFEST)
    manifest["files"][name] = file_digest(folder / name)
    _write_signed(folder, manifest)


def _write_signed(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with the digest of itself."""
    manifest["sha256"] = _manifest_digest(manifest)
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The sha256 of what the manifest says."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _report_digest(path: Path) -> str:
    """The sha256 of a report without its times."""
    return hashlib.sha256(_TIMES.sub(rb"\1", path.read_bytes())).hexdigest()


def report_is_intact(folder: Path) -> bool:
    """Returns whether report.json is there and, but for its times, as it was written; True as well
    where the manifest has no digest of it.
    """
    sha256 = read_json(folder / MANIFEST).get("report")
    report = folder / REPORT
    return sha256 is None or (report.is_file() and _report_digest(report) == sha256)


def read_manifest(folder: Path) -> dict[str, str]:
    """Reads file name -> sha256 of a folder that atd made. Raises BadInput where it is none, and
    for a manifest that was changed.
    """
    files = _read_entry(folder, MANIFEST, "files", dict)
    if not all(isinstance(sha256, str) for sha256 in files.values()):
        raise BadInput(f"{folder / MANIFEST}: damaged: expected the sha256 of each file")
    if not all(map(is_plain_name, files)):
        raise BadInput(f"{folder / MANIFEST}: damaged: expected plain file names")
    manifest = read_json(folder / MANIFEST)
    has_digest = not manifest.keys().isdisjoint({"report", "sha256"})  # early ones have neither
    if has_digest and manifest.get("sha256") != _manifest_digest(manifest):
        raise BadInput(f"{folder / MANIFEST}: damaged: it was changed since atd wrote it")
    return files


def read_report(folder: Path) -> list[NodeReport]:
    """Reads the rows of report.json of a converted folder. Raises BadInput where it is none."""
    rows = _read_entry(folder, REPORT, "nodes", list)
    columns = ("node", "type", "weights", "bits", "bytes")
    if not all(isinstance(row, dict) and row.keys() >= set(columns) for row in rows):
        raise BadInput(f"{folder / REPORT}: damaged: a row lacks one of {', '.join(columns)}")
    return rows


def _read_entry[T](folder: Path, name: str, key: str, kind: type[T]) -> T:
    """The entry `key` of a JSON file that every folder of atd's has."""
    if not path_exists(folder):
        raise BadInput(f"{folder}: no such file or folder")
    if not path_exists(folder / name):
        raise BadInput(f"{folder}: not a checkpoint that atd made: it has no {name}")
    value = read_json(folder / name).get(key)
    if not isinstance(value, kind):
        raise BadInput(f"{folder / name}: damaged: it has no {key!r}; convert the model again")
    return value
