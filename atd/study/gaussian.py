"""Decomposes a random matrix into ternary bases: how many bytes it takes, and how much it loses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from atd.decomposition.greedy import greedy
from atd.decomposition.least_squares import als
from atd.decomposition.rmse import decomposition_rmse
from atd.errors import BadInput
from atd.progress import Progress, Report, unheard
from atd.reports.plots import new_figure, save_figure
from atd.reports.tables import sizes
from atd.weights import DTYPES, Group, PackedType, TernaryType
from atd.weights.layouts import DEFAULT_LAYOUT

# Method, group size, dtype of the scales.
METHODS: tuple[tuple[str, Group, str], ...] = (
    ("greedy", "tensor", "f32"),
    ("als", "tensor", "f16"),
    ("als", 128, "f16"),
    ("als", 64, "f16"),
)


@dataclass(frozen=True)
class Decomposition:
    """What one way to decompose the matrix takes and loses."""

    method: str
    group: Group
    bases: int
    nbytes: int  # packed trits, their padding, and scales
    percent_of_fp16: float
    rmse: float  # relative: |w - approximation| / |w|


def gaussian(
    size: int = 4096,
    bases: Sequence[int] = (1, 2, 3, 4),
    seed: int = 0,
    progress: Report = unheard,
) -> list[Decomposition]:
    """Decomposes a matrix of independent normal numbers in every way of METHODS, with free scales.

    Args:
      size: rows and columns.
      bases: numbers of ternary bases N to try.
      seed: of the matrix.
      progress: hears of each decomposition.

    Raises BadInput for a size below 1 and a negative seed.
    """
    if size < 1:
        raise BadInput(f"the matrix must have at least one row and column, not {size}")
    if seed < 0:
        raise BadInput(f"seed is {seed}; expected 0 or more")
    weight = np.random.default_rng(seed).standard_normal((size, size), dtype=np.float32)
    ways = [(*method, n) for method in METHODS for n in bases]
    done = []
    for way in ways:
        progress(Progress("decomposing", len(done), len(ways), "matrices"))
        done.append(_decompose(weight, *way))
    progress(Progress("decomposing", len(done), len(ways), "matrices"))
    return done


def _decompose(
    weight: np.ndarray, method: str, group: Group, dtype: str, bases: int
) -> Decomposition:
    if method == "greedy":
        trits, scales = greedy(weight, bases, DTYPES[dtype], group)
    else:
        trits, scales = als(weight, bases, group, False, DTYPES[dtype])
    ternary = TernaryType(weight.shape, bases, group, False, dtype)
    nbytes = PackedType(ternary, DEFAULT_LAYOUT).nbytes
    rmse = decomposition_rmse(weight, trits, scales, group)
    return Decomposition(method, group, bases, nbytes, 100 * nbytes / (2 * weight.size), rmse)


def gaussian_table(rows: Sequence[Decomposition]) -> Table:
    """Shows the decompositions, those of one method and group size together."""
    table = Table(caption="relative RMSE against float32; bytes of packed trits and scales")
    for title in ("method", "one scale per"):
        table.add_column(title, no_wrap=True)
    for title in ("N", "size", "of fp16", "relative RMSE"):
        table.add_column(title, justify="right", no_wrap=True)
    for previous, row in zip((None, *rows), rows, strict=False):
        if previous and (previous.method, previous.group) != (row.method, row.group):
            table.add_section()
        table.add_row(
            row.method,
            _group_text(row.group),
            str(row.bases),
            sizes(row.nbytes),
            f"{row.percent_of_fp16:.1f} %",
            f"{row.rmse:.4f}",
        )
    return table


def gaussian_picture(rows: Sequence[Decomposition], path: str | Path) -> None:
    """Draws error over bytes, a line for each method and group size.

    Raises BadInput without matplotlib, and for a file that cannot be written.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for method, group in dict.fromkeys((row.method, row.group) for row in rows):
        line = [row for row in rows if (row.method, row.group) == (method, group)]
        x, y = [row.percent_of_fp16 for row in line], [row.rmse for row in line]
        axes.plot(x, y, marker="o", label=f"{method}, one scale per {_group_text(group)}")
        for row in line:
            at = (row.percent_of_fp16, row.rmse)
            axes.annotate(str(row.bases), at, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="bytes, % of fp16", ylabel="relative RMSE", yscale="log")
    axes.set_title("A gaussian matrix as a sum of N ternary bases (N beside the points)")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _group_text(group: Group) -> str:
    return f"group of {group}" if isinstance(group, int) else group
