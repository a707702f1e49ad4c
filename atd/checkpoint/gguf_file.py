"""Writes a GGUF file whole or not at all, and knows again what it wrote.

The file is written in a partial folder as that of a checkpoint is (`atd.checkpoint.folder`), and
gets its name at the end. Its metadata have the key `atd.sha256`: the sha256 of the file with 64
zeros in the place of that text. A file whose digest is another one was changed, or is not atd's,
and is never replaced.
"""

import hashlib
import mmap
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from atd.checkpoint.files import disk_errors
from atd.checkpoint.folder import check_target, not_overwritten, partial_folder, replaced_path
from atd.checkpoint.gguf_header import OWN
from atd.checkpoint.writer import sync_file, sync_folder
from atd.errors import BadInput

_STRING, _ZEROS = 8, b"0" * 64
_KEY = struct.pack("<Q", len(OWN)) + OWN.encode() + struct.pack("<IQ", _STRING, len(_ZEROS))


def check_file(target: Path, source: Path, overwrite: bool) -> None:
    """Raises BadInput for a file that may not be written (`atd.checkpoint.folder.check_target`)."""
    check_target(target, source, overwrite, foreign_file)


def foreign_file(file: Path) -> str | None:
    """Returns why a path is not a GGUF file as atd wrote it; None where it is."""
    if file.is_symlink() or not file.is_file():
        return "it is no file"
    place = _digest_place(file)
    if place is None:
        return f"its metadata have no {OWN}"
    with file.open("rb") as stream:
        stream.seek(place)
        stated = stream.read(len(_ZEROS)).decode(errors="replace")
    return None if stated == _digest(file, place) else "it was changed since atd wrote it"


def write_gguf(file: Path, writer: GGUFWriter, tensors: Iterable[np.ndarray]) -> None:
    """Writes a GGUF file with its digest.

    Args:
        file: a path that nothing is lost at.
        writer: has all metadata and the shapes of all tensors.
        tensors: their bytes, in the order in which the writer was told of them.
    """
    writer.add_string(OWN, _ZEROS.decode())
    with disk_errors(file):
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with file.open("r+b") as stream:
            stream.seek(0, os.SEEK_END)
            _pad(stream, writer.data_alignment)
            for tensor in tensors:
                stream.write(memoryview(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)))
                _pad(stream, writer.data_alignment)
            stream.flush()
            place = _digest_place(file)
            assert place is not None
            digest = _digest(file, place)
            stream.seek(place)
            stream.write(digest.encode())
            sync_file(stream)


def finish_file(target: Path, file: Path, overwrite: bool) -> None:
    """Gives a file of the target's partial folder the target's name, and deletes that folder.

    Raises:
        BadInput: something is at the target now that may not be replaced.
    """
    replaced = replaced_path(target)
    with disk_errors(target):
        aside = overwrite and os.path.lexists(target)
        if aside:
            if os.path.lexists(replaced) and (reason := foreign_file(replaced)):
                raise not_overwritten(replaced, reason)
            os.rename(target, replaced)
            if reason := foreign_file(replaced):
                os.rename(replaced, target)
                raise not_overwritten(target, reason)
        try:
            os.link(file, target)  # which replaces nothing, as a rename would
        except FileExistsError:
            if aside and not os.path.lexists(target):
                os.rename(replaced, target)
            raise BadInput(f"{target} exists; choose another name") from None
        sync_folder(target.parent)
        if aside:
            replaced.unlink()
        shutil.rmtree(partial_folder(target))


def _pad(stream, alignment: int) -> None:
    stream.write(bytes(-stream.tell() % alignment))


def _digest_place(file: Path) -> int | None:
    """Where the digest stands in a file; None where it has none."""
    if not file.stat().st_size:
        return None
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        at = data.find(_KEY)
    return None if at < 0 else at + len(_KEY)


def _digest(file: Path, place: int) -> str:
    """The sha256 of a file, zeros in the place of its digest."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        found.update(stream.read(place))
        found.update(_ZEROS)
        stream.seek(place + len(_ZEROS))
        while piece := stream.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
