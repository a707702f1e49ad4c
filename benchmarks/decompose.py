"""Speed of the decomposition: weights per second of als on Llama-3-8B's shapes.

    python benchmarks/decompose.py [--json FILE]      about two minutes
    python benchmarks/decompose.py --tiny             seconds, for CI

Free and tied scales, groups of 128 and one scale per row. Weights are random normal, float32 in
memory; trits and fp16 scales come out. Compilation is not counted: a run on a few rows comes first,
and matrices of an equal group size share it. The best of three runs, for the machine may be shared.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from atd.checkpoint.files import write_json
from atd.decomposition.least_squares import als
from atd.decomposition.rmse import decomposition_rmse

SHAPES = ((4096, 4096), (14336, 4096))
TINY = ((96, 160),)


def measure(weight: np.ndarray, bases: int, group: int | str, tied: bool, repeats: int) -> dict:
    """Returns a case's figures: seconds of the fastest run, weights per second, relative RMSE."""
    als(weight[:8], bases, group, tied)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        trits, scales = als(weight, bases, group, tied)
        seconds.append(time.perf_counter() - started)
    return {
        "shape": list(weight.shape),
        "bases": bases,
        "group": group,
        "scales": "tied" if tied else "free",
        "seconds": min(seconds),
        "weights_per_second": weight.size / min(seconds),
        "relative_rmse": decomposition_rmse(weight, trits, scales, group),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="one small matrix, one run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    rows = []
    for shape in TINY if options.tiny else SHAPES:
        weight = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        for bases in (1, 2, 3):
            for group in (32 if options.tiny else 128, "row"):
                rows += [
                    measure(weight, bases, group, tied, 1 if options.tiny else 3)
                    for tied in (False, True)
                ]
    table = Table(title="als: million weights per second")
    for title in ("shape", "N", "group", "scales", "M weights/s", "relative RMSE"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        shape, rate = " x ".join(map(str, row["shape"])), f"{row['weights_per_second'] / 1e6:.1f}"
        table.add_row(
            shape,
            str(row["bases"]),
            str(row["group"]),
            row["scales"],
            rate,
            f"{row['relative_rmse']:.4f}",
        )
    Console().print(table)
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
