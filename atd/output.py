"""Writing a checkpoint so that nothing is lost: a partial folder beside the target, a journal, and one rename at the
end.

    .OUT.atd-partial/   shards, each written to a temporary name, fsynced and renamed; `journal.jsonl` with one line a
                        finished unit; a lock
    OUT                 appears whole, by rename; an existing OUT is moved aside first (`--overwrite`) and deleted last

A run that is killed leaves the partial folder; the next run with the same inputs takes up the units whose journal line
and digest agree.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  safetensors finds bfloat16 in numpy once this is imported
import numpy as np
from safetensors import safe_open

from atd.errors import BadInput, RunFailed
from atd.ir import Block, WeightRef
from atd.weights import build, stored

MANIFEST = "manifest.json"
GRAPH = "atd_graph.json"
REPORT = "report.json"
JOURNAL = "journal.jsonl"
LOCK = "lock"
_SAFETENSORS_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "uint8": "U8",
    "uint32": "U32",
    "int8": "I8",
}


def digest(array) -> str:
    """sha256 of the array's bytes in row-major order."""
    return hashlib.sha256(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- folders ----------------------------------------------------------------------------------------------------------


def partial_folder(target: Path) -> Path:
    return target.parent / f".{target.name}.atd-partial"


def _replaced_folder(target: Path) -> Path:
    return target.parent / f".{target.name}.atd-replaced"


def check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Refuses a target that exists (or, with overwrite, is not a checkpoint that atd made), that is or holds the source, or cannot be written."""
    source, resolved = source.resolve(), target.resolve()
    if resolved == source or resolved in source.parents or source in resolved.parents:
        raise BadInput(f"{target}: the output must lie outside the model's folder {source}, and not hold it")
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
        raise BadInput(f"{target.parent}: cannot be made: {error.strerror}") from None
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{target.parent}: no permission to write there")


@contextmanager
def open_partial(target: Path) -> Iterator[Path]:
    """The partial folder of the target, made where there is none and locked against a second run."""
    folder = partial_folder(target)
    with _disk_errors(folder):
        folder.mkdir(exist_ok=True)
        lock = (folder / LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another run is writing {target} now; wait for it or choose another name") from None
        yield folder


def check_space(folder: Path, needed: int) -> None:
    """Refuses before the work what would fill the disk. `needed` in bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BadInput(
            f"{folder.parent}: the output needs {needed / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB free"
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(
                f"{path}: the disk is full. What is finished is kept: free some space and run the same command again"
            ) from error
        raise RunFailed(f"{path}: cannot be written: {error.strerror}") from error


def finish(target: Path, partial: Path, keep: Iterable[str]) -> None:
    """Leaves in the partial folder the files `keep` alone, and gives it the target's name."""
    keep = set(keep)
    with _disk_errors(target):
        for path in partial.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        replaced = _replaced_folder(target)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(target, replaced)
        os.rename(partial, target)
        _sync_folder(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Whole or not at all: a temporary name, fsync, rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    with _disk_errors(path):
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            _sync(file)
        os.rename(temporary, path)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- shards -----------------------------------------------------------------------------------------------------------


def write_shard(path: Path, refs: Iterable[WeightRef]) -> dict[str, str]:
    """Loads the weights one after the other and writes them as a safetensors file; returns the digest of each stored
    tensor.

    The header needs types alone, so no more than one weight is in memory (safetensors' own writer holds a whole file).
    """
    refs = list(refs)
    fields = [field for ref in refs for field in stored(ref.tensor, ref.type).values()]
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "producer": "atd"}}
    offset = 0
    for name, shape, dtype in sorted(
        fields, key=lambda f: (-f[2].itemsize, f[0])
    ):  # wide dtypes in front: every tensor stays aligned
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype.name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests: dict[str, str] = {}
    temporary = path.with_name(f"{path.name}.tmp")
    with _disk_errors(path):
        file = temporary.open("wb", buffering=0)
    with file:
        _write_at(file, 0, len(text).to_bytes(8, "little") + text)
        for ref in refs:
            weight = ref.load()
            for field, (name, shape, dtype) in stored(ref.tensor, ref.type).items():
                array = np.ascontiguousarray(getattr(weight, field)).reshape(shape)  # (0-d arrays become 1-d above)
                if array.dtype != dtype:
                    raise RunFailed(f"{name}: its type says {dtype}, its data is {array.dtype}")
                digests[name] = digest(array)
                _write_at(
                    file, 8 + len(text) + header[name]["data_offsets"][0], memoryview(array.reshape(-1).view(np.uint8))
                )
        with _disk_errors(path):
            _sync(file)
            os.rename(temporary, path)
    return digests


def _write_at(file, position: int, content) -> None:
    view = memoryview(content)
    with _disk_errors(Path(file.name)):
        while view:
            written = os.pwrite(file.fileno(), view, position)
            view, position = view[written:], position + written


def written(unit: Block, shard: Path) -> Block:
    """The unit with its weights as they lie in a shard that `write_shard` wrote."""

    def from_shard(ref: WeightRef) -> WeightRef:
        def load():
            with safe_open(shard, "np") as file:
                names = stored(ref.tensor, ref.type)
                return build(ref.type, {field: file.get_tensor(name) for field, (name, *_) in names.items()})

        return replace(ref, load=load)

    return unit.map_weights(from_shard)


def is_intact(path: Path, sha256: str) -> bool:
    """The file is there and has this digest."""
    return path.is_file() and file_digest(path) == sha256


# --- journal ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JournalEntry:
    """A finished unit: what it was made from (key), the shard and its digest, the digests of its tensors, its rows of the report."""

    unit: str
    key: str
    shard: str
    sha256: str
    tensors: dict[str, str]
    report: list[dict]


def read_journal(folder: Path) -> dict[str, JournalEntry]:
    """The entries by shard, the last of each; a line that was cut off is no entry."""
    entries: dict[str, JournalEntry] = {}
    path = folder / JOURNAL
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = JournalEntry(**json.loads(line))
        except (ValueError, TypeError):
            continue
        entries[entry.shard] = entry
    return entries


def append_journal(folder: Path, entry: JournalEntry) -> None:
    with _disk_errors(folder), (folder / JOURNAL).open("a") as file:
        file.write("\n" if file.tell() and not _ends_with_newline(folder / JOURNAL) else "")
        file.write(json.dumps(asdict(entry)) + "\n")
        _sync(file)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
