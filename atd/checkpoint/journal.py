"""Keeps the journal of a folder of shards: one line for each finished unit, to go on from. A line
is the sha256 of a JSON object, a blank, and the object.

It lies beside the folder, which so holds nothing but what is to stay in it.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from atd.checkpoint.files import disk_errors
from atd.checkpoint.writer import sync_file


@dataclass(frozen=True)
class JournalEntry:
    """A finished unit."""

    unit: str
    key: str  # a hash of what it was made from
    shard: str  # file name
    sha256: str  # of the shard
    tensors: dict[str, str]  # name -> sha256
    report: list[dict]  # its rows of report.json


def journal_file(folder: Path) -> Path:
    """Returns where the journal of a folder is."""
    return folder.with_name(f"{folder.name}.journal.jsonl")


def read_journal(folder: Path) -> dict[str, JournalEntry]:
    """Reads the entries by shard, the last of each; a line that was cut off or changed is none."""
    entries: dict[str, JournalEntry] = {}
    path = journal_file(folder)
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        digest, _, text = line.partition(b" ")
        if digest == _digest(text):
            entry = JournalEntry(**json.loads(text))
            entries[entry.shard] = entry
    return entries


def append_journal(folder: Path, entry: JournalEntry) -> None:
    """Writes an entry behind the others, and has the disk keep it."""
    path, text = journal_file(folder), json.dumps(asdict(entry)).encode()
    with disk_errors(path), path.open("ab") as file:
        file.write(b"\n" if file.tell() and not _ends_with_newline(path) else b"")
        file.write(_digest(text) + b" " + text + b"\n")
        sync_file(file)


def _digest(text: bytes) -> bytes:
    """What stands in front of a line, so that damage of the disk's is noticed."""
    return hashlib.sha256(text).hexdigest().encode()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
