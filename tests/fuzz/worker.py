"""Fuzzes one kind in this process: `python -m tests.fuzz.worker KIND SEED FIRST SECONDS`.

Prints a line of JSON for each fault, (input, fault), and at the end how many inputs there were.
"""

import faulthandler
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random

from tests.fuzz import interruptions, kinds, outputs
from tests.fuzz.kinds import Kind
from tests.fuzz.watch import fault, limited_memory

KINDS = {kind.name: kind for kind in (*kinds.KINDS, *outputs.KINDS, *interruptions.KINDS)}
HANGS = 6  # times as long as allowed: a reader that heeds no signal then ends the process


def faults(kind: Kind, folder: Path, seed: int, first: int = 0) -> Iterator[str | None]:
    """Yields for each input, from the one of number `first` on, how it breaks the rules, or None.

    Equal seeds and numbers make equal inputs. `folder` is empty, and holds the last of them.
    """
    changed = kind.make(folder)
    sound = {name: (folder / name).read_bytes() for name in changed}
    writable = (folder,) if kind.writes else ()
    for i in count(first):
        random = Random(f"{seed} {i}")
        name = random.choice(list(changed))
        (folder / name).write_bytes(changed[name](random, sound[name]))
        yield fault(lambda: kind.read(folder), *writable, seconds=kind.seconds)
        (folder / name).write_bytes(sound[name])


def main(kind: str, seed: str, first: str, seconds: str) -> None:
    """Prints what is found within some seconds."""
    end, i = time.monotonic() + float(seconds), int(first) - 1
    memory = Path("/dev/shm")  # in which files cost nothing
    folder = Path(tempfile.mkdtemp(prefix="atd-fuzz-", dir=memory if memory.is_dir() else None))
    try:
        with limited_memory():
            for i, found in enumerate(
                faults(KINDS[kind], folder, int(seed), int(first)), int(first)
            ):
                if found:
                    print(json.dumps([i, found]), flush=True)
                if time.monotonic() > end:
                    break
                print(i + 1, flush=True)  # the input that is now being read
                faulthandler.dump_traceback_later(HANGS * KINDS[kind].seconds, exit=True)
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
