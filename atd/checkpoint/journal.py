"""Keeps the journal of a folder of shards: one line for each finished unit, to go on from.

It lies beside the folder, which so holds nothing but what is to stay in it.
"""

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
    """Reads the entries by shard, the last of each; a line that was cut off is no entry."""
    entries: dict[str, JournalEntry] = {}
    path = journal_file(folder)
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entry = JournalEntry(**json.loads(line))
            entries[entry.shard] = entry
        except (ValueError, TypeError):
            continue
    return entries


def append_journal(folder: Path, entry: JournalEntry) -> None:
    """Writes an entry behind the others, and has the disk keep it."""
    path = journal_file(folder)
    with disk_errors(path), path.open("a") as file:
        file.write("\n" if file.tell() and not _ends_with_newline(path) else "")
        file.write(json.dumps(asdict(entry)) + "\n")
        sync_file(file)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
