"""Speed of the decomposition: weights per second of als on Llama-3-8B's shapes, or of visits.

    python benchmarks/decompose.py [--json FILE]      about two minutes
    python benchmarks/decompose.py --trellis          about three minutes
    python benchmarks/decompose.py --tiny             seconds, for CI

Free and tied scales, groups of 128 and one scale per row. Weights are random normal, float32 in
memory; trits and fp16 scales come out. Compilation is not counted: a run on a few rows comes first,
and matrices of an equal group size share it. The best of three runs, for the machine may be shared.

--trellis measures one visit of all columns under second moments, with trellis codes and where each
weight is rounded alone: the error feedback, and a sweep of coordinate descent behind it. It counts
the CPU time of all threads, so that its figures are those of one core.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from atd.checkpoint.files import write_json
from atd.decomposition import error_feedback, quantize
from atd.decomposition.least_squares import als
from atd.decomposition.options import trellis_type
from atd.decomposition.rmse import decomposition_rmse
from atd.decomposition.trellis_codes import known_code
from atd.weights import TernaryType

SHAPES = ((4096, 4096), (14336, 4096))
TINY = ((96, 160),)
VISITED, SWEEPS, REPEATS = (2048, 2048), 2, 3
CODES = ((2, "fast"), (2, "default"), (2, "best"), (3, "default"), (1.5, "default"))


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


def visits(shape: tuple[int, int], codes: Sequence[tuple[float, str]]) -> list[dict]:
    """Returns weights per CPU second of error feedback, and of each sweep behind it.

    Args:
        shape: out, in.
        codes: N and kind.
    """
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape, dtype=np.float32)
    x = rng.standard_normal((2 * shape[1], shape[1]), dtype=np.float32)
    hessian = x.T @ x / len(x)
    factor, rows = error_feedback.factor(hessian), []
    alone = [(f"N = {n}, tied", TernaryType(shape, n, "row", True, "f16")) for n in (2, 3)]
    coded = [
        (f"N = {n:g}, {kind}", trellis_type(shape, known_code(n, kind), "f16")) for n, kind in codes
    ]
    for name, type in [*alone, *coded]:
        assert type is not None
        run = partial(quantize.calibrated, weight, type, factor, hessian)
        run(sweeps=1)  # compiles
        seconds = {0: [], SWEEPS: []}
        for count in [*seconds] * REPEATS:
            started = time.process_time()
            run(sweeps=count)
            seconds[count].append(time.process_time() - started)
        feedback = min(seconds[0])
        sweep = max(min(seconds[SWEEPS]) - feedback, 1e-9) / SWEEPS
        rates = {"feedback": weight.size / feedback, "sweep": weight.size / sweep}
        rows.append({"type": name, "shape": list(shape)} | rates)
    return rows


def visits_table(rows: list[dict]) -> Table:
    """Shows the figures of `visits`."""
    table = Table(title="a visit of all columns: million weights per CPU second")
    for title in ("type", "shape", "error feedback", "a sweep"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        rates = (f"{row[name] / 1e6:.2f}" for name in ("feedback", "sweep"))
        table.add_row(row["type"], " x ".join(map(str, row["shape"])), *rates)
    return table


def all_als(tiny: bool) -> list[dict]:
    """Returns the figures of every case of als."""
    rows = []
    for shape in TINY if tiny else SHAPES:
        weight = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        for bases in (1, 2, 3):
            for group in (32 if tiny else 128, "row"):
                rows += [
                    measure(weight, bases, group, tied, 1 if tiny else 3) for tied in (False, True)
                ]
    return rows


def als_table(rows: list[dict]) -> Table:
    """Shows the figures of `measure`."""
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
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="one small matrix, one run")
    parser.add_argument("--trellis", action="store_true", help="visits, with and without a code")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    if options.trellis:
        rows = visits(*((TINY[0], CODES[:1]) if options.tiny else (VISITED, CODES)))
        Console().print(visits_table(rows))
    else:
        rows = all_als(options.tiny)
        Console().print(als_table(rows))
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
