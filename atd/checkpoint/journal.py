"""Keeps the journal of a partial folder: one line for each finished unit, to go on from."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from atd.checkpoint.files import disk_errors
from atd.checkpoint.writer import sync_file

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class JournalEntry:
    """A finished unit."""

    unit: str
    key: str  # a hash of what it was made from
    shard: str  # file name
    sha256: str  # of the shard
    tensors: dict[str, str]  # name -> sha256
    report: list[dict]  # its rows of report.json


def read_journal(folder: Path) -> dict[str, JournalEntry]:
    """Reads the entries by shard, the last of each; a line that was cut off is no entry."""
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
    """Writes an entry behind the others, and has the disk keep it."""
    with disk_errors(folder), (folder / JOURNAL).open("a") as file:
        file.write("\n" if file.tell() and not _ends_with_newline(folder / JOURNAL) else "")
        file.write(json.dumps(asdict(entry)) + "\n")
        sync_file(file)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
