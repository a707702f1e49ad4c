"""Writes files whole or not at all, shards of weights one at a time, and digests them."""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  safetensors finds bfloat16 in numpy once this is imported
import numpy as np
from safetensors import safe_open

from atd.checkpoint.files import disk_errors
from atd.errors import RunFailed
from atd.ir import Block, WeightRef
from atd.weights import build, stored

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
    """Returns the sha256 of an array's bytes in row-major order."""
    return hashlib.sha256(
        memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    ).hexdigest()


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all: under a temporary name, then fsync, then rename.

    The name is this call's own, as several runs may write one file of the cache.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with disk_errors(path):
            with temporary.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                sync_file(file)
            os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(file) -> None:
    """Has the disk keep what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Has the disk keep the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Entry:
    """Tensors of a file that are made together."""

    fields: tuple[tuple[str, tuple[int, ...], np.dtype], ...]  # name, shape, dtype of each
    load: Callable[[], Sequence[Any]]  # their arrays, in this order

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all of them."""
        return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self.fields)


def entry_of(ref: WeightRef) -> Entry:
    """Returns the tensors of a weight, as `atd.weights.stored` names them."""
    fields = stored(ref.tensor, ref.type)

    def load() -> list[Any]:
        weight = ref.load()
        return [getattr(weight, field) for field in fields]

    return Entry(tuple(fields.values()), load)


def write_shard(path: Path, refs: Iterable[WeightRef | Entry]) -> dict[str, str]:
    """Writes weights as a safetensors file, one after the other; returns tensor name -> sha256.

    The header needs types alone, so only one weight is in memory at a time; the writer of the
    library safetensors holds a whole file.
    """
    entries = [ref if isinstance(ref, Entry) else entry_of(ref) for ref in refs]
    fields = [field for entry in entries for field in entry.fields]
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "producer": "atd"}}
    offset = 0
    # Wide dtypes in front keep every tensor aligned.
    for name, shape, dtype in sorted(fields, key=lambda f: (-f[2].itemsize, f[0])):
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtype.name],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests: dict[str, str] = {}
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        file = temporary.open("wb", buffering=0)
    with file:
        _write_at(file, 0, len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for (name, shape, dtype), loaded in zip(entry.fields, entry.load(), strict=True):
                # ascontiguousarray makes 1-d arrays of 0-d ones.
                array = np.ascontiguousarray(loaded).reshape(shape)
                if array.dtype != dtype:
                    raise RunFailed(f"{name}: its type says {dtype}, its data is {array.dtype}")
                digests[name] = digest(array)
                _write_at(
                    file,
                    8 + len(text) + header[name]["data_offsets"][0],
                    memoryview(array.reshape(-1).view(np.uint8)),
                )
        with disk_errors(path):
            sync_file(file)
            os.rename(temporary, path)
    return digests


def _write_at(file, position: int, content) -> None:
    view = memoryview(content)
    with disk_errors(Path(file.name)):
        while view:
            written = os.pwrite(file.fileno(), view, position)
            view, position = view[written:], position + written


def written(unit: Block, shard: Path) -> Block:
    """Returns the unit with its weights as they lie in a shard that `write_shard` wrote."""

    def from_shard(ref: WeightRef) -> WeightRef:
        def load():
            with safe_open(shard, "np") as file:
                names = stored(ref.tensor, ref.type)
                return build(
                    ref.type, {field: file.get_tensor(name) for field, (name, *_) in names.items()}
                )

        return replace(ref, load=load)

    return unit.map_weights(from_shard)


def is_intact(path: Path, sha256: str) -> bool:
    """Returns whether the file is there and has this digest."""
    return path.is_file() and file_digest(path) == sha256
