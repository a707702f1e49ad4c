"""Time and peak memory of conversions and evaluations on one core and on two, pinned apart.

    python benchmarks/devices.py --model MODEL --data TEXT

A device is a core: XLA computes on one thread, and a process keeps to the cores that it is given.
It runs on one device, on two of the same process, and in two processes with a device each. Each
command runs once to compile, into a cache that all share, and once more to be measured, by the
clock, from start to end; «tokens/s» is what `atd eval` says, without start and first batch. Peak is
the resident memory that the system counts for the largest process.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atd.checkpoint.folder import read_manifest

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
RECIPE = ("--recipe", "ternary2", "--set", "decompose.trellis=", "--set", "decompose.refits=0")
# name -> (devices of a process, the cores of each process)
PLACES = {
    "1 device": (1, ("0",)),
    "2 devices": (2, ("0,1",)),
    "2 processes": (1, ("0", "1")),
}


def run(command: list[str], devices: int, cores: tuple[str, ...], cache: Path) -> tuple[float, int]:
    """Runs `atd` in a process for each set of cores; returns seconds, and the largest peak in
    bytes.
    """
    flags = f"{ONE_THREAD} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"), "ATD_CACHE": str(cache)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started, processes = time.perf_counter(), []
    for i, core in enumerate(cores):
        there = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(len(cores))]
        there = [*there, "--process-id", str(i)] if len(cores) > 1 else []
        arguments = ["taskset", "-c", core, sys.executable, "-m", "atd", *command, *there]
        processes.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL))
    peak = 0
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)}: failed")
        peak = max(peak, usage.ru_maxrss * 1024)
    return time.perf_counter() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place, (devices, cores) in PLACES.items():
            out = folder / f"{devices}-{len(cores)}"
            text = ["--calib", str(options.data)]
            text += ["--calibration-tokens", str(options.calibration_tokens)]
            convert = ["convert", str(options.model), str(out), *RECIPE, *text, "--quiet"]
            run(convert, devices, cores, folder / "cache")
            files = read_manifest(out)
            shutil.rmtree(out)
            seconds, peak = run(convert, devices, cores, folder / "cache")
            same = not rows or files == rows[0]["files"]
            rows.append({"what": "convert", "place": place, "seconds": seconds, "peak": peak})
            rows[-1] |= {"files": files, "same": same}
        figures = folder / "figures.json"
        for place, (devices, cores) in PLACES.items():
            evaluate = ["eval", str(folder / "1-1"), "--against", str(options.model), "--quiet"]
            evaluate += ["--data", str(options.data), "--tokens", str(options.tokens)]
            evaluate += ["--context", "256", "--json", str(figures)]
            run(evaluate, devices, cores, folder / "cache")
            seconds, peak = run(evaluate, devices, cores, folder / "cache")
            found = json.loads(figures.read_text())
            rate = found["tokens_per_second"]
            kl, last = found["kl_mean"], [row for row in rows if row["what"] == "eval"]
            row = {"what": "eval", "place": place, "seconds": seconds, "peak": peak, "rate": rate}
            rows.append(row | {"kl": kl, "same": not last or last[0]["kl"] == kl})
    table = Table("command", "on", "seconds", "tokens/s", "peak of a process", "result")
    for row in rows:
        rate = f"{row['rate']:.0f}" if "rate" in row else ""
        result = "the same" if row["same"] else "another"
        peak = f"{row['peak'] / 1e9:.2f} GB"
        table.add_row(row["what"], row["place"], f"{row['seconds']:.1f}", rate, peak, result)
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps([{**row, "files": None} for row in rows], indent=1))


if __name__ == "__main__":
    main()
