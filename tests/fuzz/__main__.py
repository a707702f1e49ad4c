"""`make fuzz MINUTES=10`: changes inputs of all kinds at random, and prints a table of the faults.

    python -m tests.fuzz --minutes 10
    python -m tests.fuzz --kind GGUF --seed 7 --first 1234 --minutes 0    one input again

Each kind has an equal share of the time, in a process of its own: one that dies is a fault too.
"""

import argparse
import json
import subprocess
import sys
import time
from random import SystemRandom

from tests.fuzz.worker import KINDS


def fuzz(kind: str, seed: int, first: int, seconds: float) -> tuple[int, dict[str, int]]:
    """Fuzzes a kind; returns the number of inputs, and the first input of each fault."""
    end, last, found = time.monotonic() + seconds, first - 1, {}
    while True:
        left = max(0.0, end - time.monotonic())
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.worker",
            kind,
            str(seed),
            str(last + 1),
            str(left),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            match json.loads(line):
                case [i, fault]:
                    last = i
                    if fault not in found:
                        _tell(kind, seed, i, fault)
                    found.setdefault(fault, i)
                case number:
                    last = number
        if process.wait() == 0:
            return last + 1 - first, found
        fault = f"the process ends with {process.returncode}"
        found.setdefault(fault, last)
        _tell(kind, seed, last, fault)
        if time.monotonic() > end:
            return last + 1 - first, found


def _tell(kind: str, seed: int, i: int, fault: str) -> None:
    again = f"python -m tests.fuzz --minutes 0 --kind '{kind}' --seed {seed} --first {i}"
    print(f"{kind}: {fault}\n  {again}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Changes inputs of all kinds at random.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kind", action="append", choices=list(KINDS), default=[])
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(10**6))
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    given = parser.parse_args()
    names = given.kind or list(KINDS)
    print(f"seed {given.seed}")
    rows = []
    for name in names:
        inputs, found = fuzz(name, given.seed, given.first, 60 * given.minutes / len(names))
        rows.append((name, inputs, len(found)))
        print(f"{name}: {inputs} inputs, {len(found)} faults", flush=True)
    width = max(map(len, KINDS))
    print(f"\n{'kind':{width}}  {'inputs':>8}  faults")
    for name, inputs, count in rows:
        print(f"{name:{width}}  {inputs:8,}  {count}")
    return any(count for _, _, count in rows)


if __name__ == "__main__":
    sys.exit(main())
