"""The experiment that started it: how many bytes a random matrix takes as a sum of ternary bases, and what it loses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress
from rich.table import Table

from atd.decomposition import least_squares
from atd.errors import BadInput
from atd.reports.tables import sizes
from atd.weights import DTYPES, Group, PackedType, TernaryType
from atd.weights.layouts import DEFAULT_LAYOUT

METHODS: tuple[
    tuple[str, Group, str], ...
] = (  # method, group, dtype of the scales (the historic format's are float32)
    ("greedy", "tensor", "f32"),
    ("als", "tensor", "f16"),
    ("als", 128, "f16"),
    ("als", 64, "f16"),
)


@dataclass(frozen=True)
class Row:
    """A matrix decomposed in one way. `nbytes` is all that is stored: packed trits, their padding, and scales."""

    method: str
    group: Group
    bases: int
    nbytes: int
    percent_of_fp16: float
    rmse: float  # relative: |w - approximation| / |w|


def gaussian(
    size: int = 4096,
    bases: Sequence[int] = (1, 2, 3, 4),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Decomposes a size x size matrix of independent normal numbers in every way of METHODS, with free scales.

    `progress(done, total)` hears of every decomposition. Raises BadInput for a size below 1.
    """
    if size < 1:
        raise BadInput(f"the matrix must have at least one row and column, not {size}")
    weight = np.random.default_rng(seed).standard_normal((size, size), dtype=np.float32)
    runs = [(method, group, dtype, n) for method, group, dtype in METHODS for n in bases]
    rows = []
    for method, group, dtype, n in runs:
        if progress:
            progress(len(rows), len(runs))
        if method == "greedy":
            trits, scales = least_squares.greedy(weight, n, DTYPES[dtype], group)
        else:
            trits, scales = least_squares.als(weight, n, group, False, DTYPES[dtype])
        nbytes = PackedType(
            TernaryType((size, size), n, group, False, dtype), DEFAULT_LAYOUT
        ).nbytes
        rmse = least_squares.decomposition_rmse(weight, trits, scales, group)
        rows.append(Row(method, group, n, nbytes, 100 * nbytes / (2 * weight.size), rmse))
    if progress:
        progress(len(runs), len(runs))
    return rows


def bar_progress(bar: Progress) -> Callable[[int, int], None]:
    """A `progress` for `gaussian` that draws on a bar of rich's."""
    task = bar.add_task("decomposing", total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    result = Table(caption="relative RMSE against float32; bytes of packed trits and scales")
    for title in ("method", "one scale a", "N", "size", "of fp16", "relative RMSE"):
        result.add_column(
            title, justify="left" if title in ("method", "one scale a") else "right", no_wrap=True
        )
    for before, row in zip((None, *rows), rows, strict=False):
        if before and (before.method, before.group) != (row.method, row.group):
            result.add_section()
        figures = (
            str(row.bases),
            sizes(row.nbytes),
            f"{row.percent_of_fp16:.1f} %",
            f"{row.rmse:.4f}",
        )
        result.add_row(row.method, _group_text(row.group), *figures)
    return result


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """Draws error over bytes, a line for each method and group, to a picture file. Raises BadInput without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("the picture needs matplotlib: pip install 'atd-jax[report]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method, group in dict.fromkeys((row.method, row.group) for row in rows):
        line = [row for row in rows if (row.method, row.group) == (method, group)]
        x, y = [row.percent_of_fp16 for row in line], [row.rmse for row in line]
        axes.plot(x, y, marker="o", label=f"{method}, one scale a {_group_text(group)}")
        for row in line:
            axes.annotate(
                str(row.bases),
                (row.percent_of_fp16, row.rmse),
                xytext=(4, 4),
                textcoords="offset points",
            )
    axes.set(xlabel="bytes, % of fp16", ylabel="relative RMSE", yscale="log")
    axes.set_title("A gaussian matrix as a sum of N ternary bases (N beside the points)")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot write the picture {path}: {error}") from None


def _group_text(group: Group) -> str:
    return f"group of {group}" if isinstance(group, int) else group
