"""Draws a conversion by layer, and holds what all pictures share."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atd.checkpoint.folder import NodeReport
from atd.errors import BadInput
from atd.reports.tables import three_digits

# Okabe and Ito's colours, which differ for every kind of colour vision, each with a marker.
_KINDS = {
    "q_proj": ("#0072B2", "o"),
    "k_proj": ("#56B4E9", "s"),
    "v_proj": ("#009E73", "^"),
    "o_proj": ("#000000", "D"),
    "gate_proj": ("#E69F00", "v"),
    "up_proj": ("#D55E00", "P"),
    "down_proj": ("#CC79A7", "X"),
}
_OTHER_KIND = ("#777777", "*")
_BLOCK = re.compile(r".*\.(\d+)\..*?([^.]+)")


def check_picture(path: Path) -> None:
    """Raises BadInput, before the work whose picture is wanted, where it could not be drawn.

    So it is where matplotlib is missing, or does not know the format that the ending names.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise BadInput(
            f"{path}: the ending {path.suffix!r} is no picture format; take .png, .svg or .pdf"
        )


def new_figure(width: float, height: float) -> Any:
    """Makes an empty matplotlib Figure of `width` x `height` inches; it needs no display.

    Raises BadInput where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("drawing needs matplotlib: pip install 'atd-jax[report]'") from None
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes a matplotlib Figure. Raises BadInput where the file cannot be written."""
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: an ending that is no picture format
        raise BadInput(f"{path}: the picture cannot be written: {error}") from None


def layers_picture(report: Sequence[NodeReport], path: str | Path) -> None:
    """Draws bits per weight and relative error over the blocks, a line for each kind of linear.

    What lies outside the blocks (embedding, head) is noted in the title.

    Args:
      report: rows of report.json with node, bits, weights, and error = |W' - W| / |W| (Frobenius)
        or None.

    Raises BadInput where matplotlib is missing, no row belongs to a block or the picture cannot be
    written.
    """
    lines, outside = _by_kind(report)
    rows = [row for points in lines.values() for _, row in points]
    panels = [("bits", "bits per weight")]
    if any(row["error"] is not None for row in rows):
        panels.append(("error", "relative error"))
    blocks = 1 + max(block for points in lines.values() for block, _ in points)
    figure = new_figure(min(16, 6 + 0.22 * blocks), 1.2 + 3 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (figure_name, label) in zip(axes, panels, strict=True):
        _draw_kinds(axis, lines, figure_name)
        _style(axis, blocks, label)
        axis.set_ylim(0, 1.1 * max(row[figure_name] or 0 for row in rows))
    weights = sum(row["weights"] for row in rows)
    mean = sum(row["bits"] * row["weights"] for row in rows) / weights
    axes[0].axhline(mean, color="#333333", linewidth=0.9, linestyle="--", label=f"mean {mean:.2f}")
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    axes[-1].set_xlabel("block")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    notes = [f"{len(rows)} linears, {three_digits(weights)} weights, {mean:.2f} bits per weight"]
    notes += [f"{row['node'].split('.')[-1]} {row['bits']:.2f} bits" for row in outside]
    axes[0].set_title("; ".join(notes), loc="left", fontsize=10)
    save_figure(figure, path)


def _by_kind(
    report: Sequence[NodeReport],
) -> tuple[dict[str, list[tuple[int, NodeReport]]], list[NodeReport]]:
    """(kind of linear -> its (block, row) in order, rows outside the blocks)."""
    lines: dict[str, list[tuple[int, NodeReport]]] = {}
    outside = []
    for row in report:
        if match := _BLOCK.fullmatch(row["node"]):
            lines.setdefault(match[2], []).append((int(match[1]), row))
        else:
            outside.append(row)
    if not lines:
        raise BadInput(
            "the report has no rows of blocks (nodes named like model.layers.0.self_attn.q_proj): "
            "nothing to draw"
        )
    known = list(_KINDS)
    order = {kind: known.index(kind) if kind in known else len(known) for kind in lines}
    return {
        kind: sorted(lines[kind], key=lambda point: point[0])
        for kind in sorted(lines, key=lambda kind: (order[kind], kind))
    }, outside


def _draw_kinds(
    axis: Any, lines: Mapping[str, Sequence[tuple[int, NodeReport]]], figure_name: str
) -> None:
    """Draws a figure of each kind of linear over the blocks.

    Most kinds have equal bits, so their points stand side by side. Errors differ, and how they go
    on from block to block is what counts, so theirs are joined.
    """
    for i, (kind, points) in enumerate(lines.items()):
        colour, marker = _KINDS.get(kind, _OTHER_KIND)
        side_by_side = figure_name == "bits"
        shift = 0.13 * (i - (len(lines) - 1) / 2) if side_by_side else 0
        values = [row[figure_name] for _, row in points]
        axis.plot(
            [block + shift for block, _ in points],
            [math.nan if value is None else value for value in values],
            color=colour,
            marker=marker,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.3,
            linestyle="none" if side_by_side else "-",
            linewidth=1,
            label=kind.removesuffix("_proj"),
        )


def _style(axis: Any, blocks: int, label: str) -> None:
    for block in range(0, blocks, 2):
        axis.axvspan(block - 0.5, block + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
    axis.set_ylabel(label)
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlim(-0.6, blocks - 0.4)
    axis.spines[["top", "right"]].set_visible(False)
