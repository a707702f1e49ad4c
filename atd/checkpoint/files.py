"""Reads and writes small files with errors that name the file; describes tensors in files."""

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from atd.errors import BadInput, RunFailed


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, known from its header; `load()` reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # f32, f16, bf16, f64, i8, u8 or another name of safetensors in small letters
    file: Path
    place: str  # in the file: name and offset
    load: Callable[[], np.ndarray] = field(compare=False, repr=False)
    source: str = ""  # identifies the bytes: digest of the file, and place; empty: not known


def refuse_pointer(file: Path) -> None:
    """Raises BadInput for what git-lfs leaves in the place of a file that it did not fetch."""
    if read_bytes(file, 0, 24) == b"version https://git-lfs.":
        raise BadInput(
            f"{file}: a pointer of git-lfs instead of the file; fetch it with git lfs pull"
        )


def read_json(file: Path) -> dict:
    """Reads the object in a JSON file.

    Raises BadInput where it cannot be read, is no object, or has a key twice.
    """
    refuse_pointer(file)
    try:
        return json_object(read_bytes(file))
    except ValueError as error:
        raise BadInput(f"{file}: no valid JSON object: {error}") from None


def read_bytes(file: Path, start: int = 0, count: int = -1) -> bytes:
    """Reads `count` bytes from `start` on; -1 is all, and fewer come where the file ends.

    Raises BadInput for a file that cannot be read.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(count)
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror}") from None


def path_exists(path: Path) -> bool:
    """Returns whether there is such a path.

    Raises BadInput where a folder on it may not be searched.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    return True


def is_plain_name(name: str) -> bool:
    """Returns whether a text can be the name of a file in a folder, on any system."""
    try:
        fits = 0 < len(name.encode()) < 256
    except UnicodeEncodeError:
        return False
    return fits and name not in (".", "..") and not any(char in name for char in "/\\\0:")


def json_object(text: bytes) -> dict:
    """Parses a JSON object.

    Raises ValueError for anything else, where a key is given twice, and where a string is not
    Unicode (half of a surrogate pair): nothing could be written or printed that has it.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"it has {twice!r} twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def read_text(path: str | os.PathLike) -> str:
    """Reads a UTF-8 text, or the texts of a JSON Lines file, one after the other.

    A byte-order mark is no text. Raises BadInput where the file is absent, unreadable, not UTF-8,
    empty, or holds something else than text.

    Line ends become "\\n", as in Python's text mode and so in other tools' figures: with carriage
    returns left in, a text of TinyStories has a perplexity of 6.842 instead of 6.390 (stories15M).
    """
    text = _decoded(Path(path))
    return _texts_of_json(Path(path), text) if text.lstrip()[0] in "{[" else text


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Reads the prompts of a JSON Lines file: the field `prompt` of each line, or `text`.

    Raises BadInput where the file cannot be read, a line is no object, or has neither as a string.
    """
    path = Path(path)
    lines = [(i, line) for i, line in enumerate(_decoded(path).split("\n"), 1) if line.strip()]
    return [_field(path, i, _json_or_none(line), ("prompt", "text")) for i, line in lines]


def _decoded(path: Path) -> str:
    """What a UTF-8 file says, with line ends as they are in Python; refused as `read_text` says."""
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; give one text file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    if data[:4] == b"PAR1":
        raise BadInput(f"{path}: is a parquet file; write its texts to a .txt or .jsonl file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} at offset {error.start} (line {line})"
        raise BadInput(
            f"{path}: not UTF-8 text: {found}; convert it with iconv, or give another file"
        ) from None
    if not text.strip():
        raise BadInput(f"{path}: is empty; a text file is expected")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _texts_of_json(path: Path, text: str) -> str:
    """The field `text` of each line of JSON Lines; a text that is no JSON as it is."""
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = {i: _json_or_none(line) for i, line in lines}
    if not isinstance(rows[lines[0][0]], dict):
        if None in rows.values() and _json_or_none(text) is None:
            return text
        raise BadInput(f"{path}: is JSON, not text; write its texts to a .txt or .jsonl file")
    return "\n".join(_field(path, i, row, ("text",)) for i, row in rows.items())


def _field(path: Path, line: int, row: object, names: Sequence[str]) -> str:
    """The first of these fields that a line of JSON Lines has; refused where it is no string."""
    name = next((n for n in names if isinstance(row, dict) and n in row), None)
    if isinstance(row, dict) and name and isinstance(row[name], str):
        return row[name]
    found = f"the fields {', '.join(row)}" if isinstance(row, dict) else "no object"
    expected = " or ".join(repr(name) for name in names)
    raise BadInput(
        f"{path}: line {line} of JSON Lines has {found}; expected a string in a field {expected}"
    )


def _json_or_none(text: str) -> Any:
    """What the text is in JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def write_json(path: Path, value: object) -> None:
    """Writes figures for other programs. Raises RunFailed where the file cannot be written."""
    with disk_errors(path):
        path.write_text(json.dumps(value, indent=1) + "\n")


def write_json_lines(path: Path, rows: Iterable[object]) -> None:
    """Writes a line of JSON for each row. Raises RunFailed where the file cannot be written."""
    with disk_errors(path):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into RunFailed with the path and the way out; BadInput for a long name."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(
                f"{path}: the disk is full. What is finished is kept: "
                "free some space and run the same command again"
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            raise BadInput(f"{path}: the name is too long; choose a shorter one") from None
        raise RunFailed(f"{path}: cannot be written: {error.strerror}") from error
