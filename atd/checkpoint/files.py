"""Tensors in files, and reading bytes and JSON with errors that name the file."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from atd.errors import BadInput


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `dtype` is f32, f16, bf16, f64, i8, u8 or another safetensors name in small letters.

    `source` identifies the bytes: file name, size, modification time, tensor name and offset. `load()` reads them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    load: Callable[[], np.ndarray] = field(compare=False, repr=False)


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises BadInput when it cannot be read, is no object, or has a key twice."""
    try:
        return json_object(read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: no valid JSON object: {error}") from None


def read_bytes(file: Path, start: int = 0, count: int = -1) -> bytes:
    """`count` bytes from `start` on (-1: all; fewer where the file ends). Raises BadInput for a file it cannot read."""
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(count)
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror}") from None


def path_exists(path: Path) -> bool:
    """Whether there is such a path. Raises BadInput when a folder on the way may not be searched."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    return True


def json_object(text: bytes) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(
                f"{next(name for name in names if names.count(name) > 1)!r} stands there twice"
            )
        return found

    value = json.loads(text, object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file. Raises BadInput if absent, unreadable, not UTF-8 or empty.

    Line ends become "\\n", as in Python's text mode and so in other tools' figures: with its carriage returns left in,
    the perplexity of stories15M on tinystories_valid_30k.txt would be 6.842 instead of 6.390.
    """
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; give one text file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} at offset {error.start} (line {line})"
        raise BadInput(
            f"{path}: not UTF-8 text: {found}; convert it with iconv, or give another file"
        ) from None
    if not text.strip():
        raise BadInput(f"{path}: is empty; a text file is expected")
    return text.replace("\r\n", "\n").replace("\r", "\n")
