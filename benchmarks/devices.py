"""Time and peak memory of conversions and evaluations on one core and on two, pinned apart.

    python benchmarks/devices.py --model MODEL --data TEXT --blocks 1

MODEL is a folder with one file of weights; --blocks takes its first ones alone.

A device is a core: XLA computes on one thread, and a process keeps to the cores that it is given.
It runs on one device, on two of the same process, and in two processes with a device each. Each
command runs once to compile, into a cache that all share, and once more to be measured: «seconds»
are those of the whole command, start included; «work» is without start, the seconds of all units in
report.json, or the tokens per second that `atd eval` says. Peak is the resident memory that the
system counts for the largest process. --under starts what is measured by another command, such as
"chrt -r 10" on a machine that has more to do.
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

from atd.checkpoint.folder import read_manifest, read_report

# The same for all, since XLA's sums depend on them.
FLAGS = "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=2"
RECIPE = ("--recipe", "ternary2", "--set", "decompose.trellis=", "--set", "decompose.refits=0")
# name -> (devices of a process, the cores of each process)
PLACES = {
    "1 device": (1, ("0",)),
    "2 devices": (2, ("0,1",)),
    "2 processes": (1, ("0", "1")),
}


def first_blocks(model: Path, folder: Path, blocks: int | None) -> Path:
    """Makes a folder with the model's files, whose config has the first blocks alone."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.absolute())
    if blocks:
        config = json.loads((model / "config.json").read_text())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    return folder


def run(
    command: list[str], devices: int, cores: tuple[str, ...], cache: Path, under: str = ""
) -> tuple[float, int]:
    """Runs `atd` in a process for each set of cores; returns seconds, and the largest peak in
    bytes.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"), "ATD_CACHE": str(cache)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started, processes = time.perf_counter(), []
    for i, core in enumerate(cores):
        there = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(len(cores))]
        there = [*there, "--process-id", str(i)] if len(cores) > 1 else []
        arguments = [*under.split(), "taskset", "-c", core, sys.executable, "-m", "atd"]
        arguments += [*command, "--ignore-extra", "--quiet"]
        arguments += ["--devices", str(devices), *there]
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
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--under", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = first_blocks(options.model, folder / "model", options.blocks)
        for place, (devices, cores) in PLACES.items():
            out = folder / f"{devices}-{len(cores)}"
            text = ["--calib", str(options.data)]
            text += ["--calibration-tokens", str(options.calibration_tokens)]
            convert = ["convert", str(model), str(out), *RECIPE, *text]
            run(convert, devices, cores, folder / "cache")
            files = read_manifest(out)
            shutil.rmtree(out)
            seconds, peak = run(convert, devices, cores, folder / "cache", options.under)
            work = sum(row["seconds"] for row in read_report(out))
            same = not rows or files == rows[0]["files"]
            rows.append({"what": "convert", "place": place, "seconds": seconds, "peak": peak})
            rows[-1] |= {"files": files, "same": same, "work": f"{work:.1f} s"}
        figures = folder / "figures.json"
        for place, (devices, cores) in PLACES.items():
            evaluate = ["eval", str(model), "--dtype", "float32"]
            evaluate += ["--data", str(options.data), "--tokens", str(options.tokens)]
            evaluate += ["--context", "256", "--json", str(figures)]
            run(evaluate, devices, cores, folder / "cache")
            seconds, peak = run(evaluate, devices, cores, folder / "cache", options.under)
            found = json.loads(figures.read_text())
            rate, figure = f"{found['tokens_per_second']:,.0f} tokens/s", found["perplexity"]
            first = next((row["figure"] for row in rows if row["what"] == "eval"), figure)
            row = {"what": "eval", "place": place, "seconds": seconds, "peak": peak, "work": rate}
            rows.append(row | {"figure": figure, "same": figure == first})
    table = Table("command", "on", "seconds", "work", "peak of a process", "result")
    for row in rows:
        result = "the same" if row["same"] else "another"
        peak = f"{row['peak'] / 1e9:.2f} GB"
        table.add_row(row["what"], row["place"], f"{row['seconds']:.1f}", row["work"], peak, result)
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps([{**row, "files": None} for row in rows], indent=1))


if __name__ == "__main__":
    main()
