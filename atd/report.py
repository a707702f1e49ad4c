"""What people see: tables, a picture of a conversion by layer, progress bars.

Tables go to `console` (stdout); progress goes to stderr, so that a command's output can be piped.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from atd.errors import BadInput
from atd.evaluate import Evaluation
from atd.ir import Block, Graph
from atd.weights import WeightType

console = Console()


def sizes(n: float) -> str:
    """Bytes for people, three digits, decimal units: 98_362_432 -> "98.4 MB"."""
    return f"{_three_digits(n, ' ')}B"


def _three_digits(n: float, space: str = "") -> str:
    """98_362_432 -> "98.4M", with `space` in front of the prefix."""
    prefixes = ["", "k", "M", "G", "T"]
    while n >= 999.5 and len(prefixes) > 1:
        n /= 1000
        prefixes.pop(0)
    digits = 0 if n >= 99.95 or n == int(n) else 1 if n >= 9.995 else 2
    return f"{n:.{digits}f}{space}{prefixes[0]}"


# --- tables -----------------------------------------------------------------------------------------------------------

Row = tuple[str, float, int, Evaluation, float | None]  # name, bits a weight, bytes, figures, tokens/s of generation


def evaluation_table(rows: Iterable[Row]) -> Table:
    """Models side by side: bits a weight (over all bytes of the linears), size, perplexity, distance from dense, speed.

    Figures that a model has none of (its distance from itself, a speed that nobody measured) are a dash.
    """
    rows = list(rows)
    conditions = {row[3].conditions() for row in rows}
    # Fits 80 columns, long model names folded.
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption=conditions.pop() if len(conditions) == 1 else None,
    )
    table.add_column("model", overflow="fold")
    timed = any(rate is not None for *_, rate in rows)
    titles = ("bits a\nweight", "size", "perplexity", "KL\nmean", "KL\nmedian", "KL\n99 %", "top-1", "tokens\n/s")
    for title in titles if timed else titles[:-1]:
        table.add_column(title, justify="right", no_wrap=True)
    for name, bits, size, result, rate in rows:
        kl = (_or_dash(value, ".4f") for value in (result.kl_mean, result.kl_median, result.kl_99))
        top1, speed = _or_dash(result.top1_agreement, ".1%"), [_or_dash(rate, ".1f")] if timed else []
        table.add_row(str(name), f"{bits:.2f}", sizes(size), f"{result.perplexity:.3f}", *kl, top1, *speed)
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def graph_table(graph: Graph, nodes: bool = False) -> Table:
    """Type, bits and size by unit (`nodes`: by weight), from types alone; the last row is the whole model."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("layer", "type"):
        table.add_column(title, overflow="fold")
    for title in ("weights", "bits", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for unit in graph.units:
        named = [(unit.full_name(node), ref.type) for node in unit.nodes for _, ref in sorted(node.weights.items())]
        if nodes:
            for name, type in named:
                _add(table, name, str(type), [type])
        elif named:
            _add(table, _unit_name(graph, unit), _summary([type for _, type in named]), [type for _, type in named])
    table.add_section()
    everything = [ref.type for _, ref in graph.weights()]
    _add(table, "all", _summary(everything), everything)
    return table


def _add(table: Table, name: str, type: str, types: Sequence[WeightType]) -> None:
    weights, size = sum(math.prod(t.shape) for t in types), sum(t.nbytes for t in types)
    table.add_row(name, Text(type), f"{weights:,}", f"{8 * size / weights:.2f}", sizes(size))


def _unit_name(graph: Graph, unit: Block) -> str:
    return unit.name or ("embedding" if unit is graph.prologue else "final norm and head")


def _summary(types: Sequence[WeightType]) -> str:
    """The matrices' types without shapes, most frequent first: "6 x packed n=2 g=128 ... f16, 1 x dense bf16"."""
    kinds: dict[str, int] = {}
    for type in types:
        if len(type.shape) > 1 or all(len(t.shape) == 1 for t in types):
            text = str(type).partition("[")[0]
            kinds[text] = kinds.get(text, 0) + 1
    return ", ".join(f"{count} x {text}" for text, count in sorted(kinds.items(), key=lambda item: -item[1]))


def graph_size(graph: Graph) -> tuple[float, int]:
    """(bits a weight over the linears of the blocks, bytes of the whole model)."""
    linears = [
        node.weights["weight"].type
        for block in graph.blocks
        for node in block.nodes
        if node.op == "linear" and "weight" in node.weights
    ]
    bits = 8 * sum(t.nbytes for t in linears) / sum(math.prod(t.shape) for t in linears)
    return bits, sum(ref.type.nbytes for _, ref in graph.weights())


# --- the picture ------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which stay apart for every kind of colour vision, and a marker each besides.
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


def need_matplotlib() -> None:
    """Raises BadInput where matplotlib is missing: to be called before the work whose picture is wanted."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise BadInput("drawing needs matplotlib: pip install 'atd-jax[report]'") from None


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes a matplotlib Figure. Raises BadInput where the file cannot be written."""
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: an ending that is no picture format
        raise BadInput(f"{path}: the picture cannot be written: {error}") from None


def layers_picture(report: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws bits a weight and relative error (|W' - W| / |W|, Frobenius) by block, apart for each kind of linear.

    `report`: rows of report.json, {"node", "type", "bits", "weights", "error"}; an error may be None. What lies outside
    the blocks (embedding, head) is noted in the title. Raises BadInput where matplotlib is missing, no row belongs to a
    block or the picture cannot be written.
    """
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, list[tuple[int, dict]]] = {}
    outside = []
    for row in report:
        if match := _BLOCK.fullmatch(row["node"]):
            lines.setdefault(match[2], []).append((int(match[1]), row))
        else:
            outside.append(row)
    if not lines:
        raise BadInput(
            "the report has no rows of blocks (nodes named like model.layers.0.self_attn.q_proj): nothing to draw"
        )
    rows = [row for points in lines.values() for _, row in points]
    panels = [("bits", "bits a weight")]
    if any(row["error"] is not None for row in rows):
        panels.append(("error", "relative error"))

    blocks = 1 + max(block for points in lines.values() for block, _ in points)
    figure = Figure(figsize=(min(16, 6 + 0.22 * blocks), 1.2 + 3 * len(panels)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    kinds = sorted(lines, key=lambda kind: (list(_KINDS).index(kind) if kind in _KINDS else len(_KINDS), kind))
    for axis, (key, label) in zip(axes, panels, strict=True):
        for i, kind in enumerate(kinds):
            colour, marker = _KINDS.get(kind, _OTHER_KIND)
            points = sorted((block, math.nan if row[key] is None else row[key]) for block, row in lines[kind])
            # Kinds of equal bits are the rule: they stand side by side. Errors differ, and their course is what counts.
            shift, linestyle = (0.13 * (i - (len(kinds) - 1) / 2), "none") if key == "bits" else (0, "-")
            axis.plot(
                [block + shift for block, _ in points],
                [value for _, value in points],
                color=colour,
                marker=marker,
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.3,
                linestyle=linestyle,
                linewidth=1,
                label=kind.removesuffix("_proj"),
            )
        for block in range(0, blocks, 2):
            axis.axvspan(block - 0.5, block + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
        axis.set_ylabel(label)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_xlim(-0.6, blocks - 0.4)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, 1.1 * max(row[key] for row in rows if row[key] is not None))
    weights = sum(row["weights"] for row in rows)
    mean = sum(row["bits"] * row["weights"] for row in rows) / weights
    axes[0].axhline(mean, color="#333333", linewidth=0.9, linestyle="--", label=f"mean {mean:.2f}")
    axes[-1].set_xlabel("block")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    notes = [f"{len(rows)} linears, {_three_digits(weights)} weights, {mean:.2f} bits a weight"]
    notes += [f"{row['node'].split('.')[-1]} {row['bits']:.2f} bits" for row in outside]
    axes[0].set_title("; ".join(notes), loc="left", fontsize=10)
    save_figure(figure, path)


# --- progress ---------------------------------------------------------------------------------------------------------

_QUIET_SECONDS = 30  # between two lines where there is no terminal


class _Rate(ProgressColumn):
    """Units a second, over the last moments: "850 tokens/s" for a task with the field unit="tokens"."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(
            "" if speed is None else f"{_three_digits(speed)} {unit}/s".replace(" /", "/"), style="progress.data.speed"
        )


class _Lines(Progress):
    """Progress where there is no terminal: no bar, but a line every half minute and one at each end, for logs."""

    def __init__(self, console: Console):
        super().__init__(console=console, disable=True)
        self._printed = time.monotonic()

    def update(self, task_id, **fields) -> None:
        super().update(task_id, **fields)
        self._line(task_id)

    def advance(self, task_id, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._line(task_id)

    def _line(self, task_id) -> None:
        task = self._tasks[task_id]
        now = time.monotonic()
        if task.total is None or (not task.finished and now - self._printed < _QUIET_SECONDS):
            return
        if task.finished and task.fields.get("ended"):
            return
        task.fields["ended"] = task.finished
        self._printed = now
        self.console.print(
            f"{task.description}: {task.percentage:.0f} %, {task.elapsed or 0:.0f} s", markup=False, highlight=False
        )


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Progress]:
    """The one look of progress in all commands: description, bar, percentage, rate, time left; on stderr by default.

    `bar.add_task("evaluating", total=n, unit="tokens")`, then `bar.update(task, completed=k)`. The bar vanishes at the
    end. Where there is no terminal there is no bar, but a line every 30 seconds, and one at the end of a task.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        with _Lines(console) as bar:
            yield bar
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        _Rate(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar


@contextmanager
def conversion_progress(
    console: Console | None = None,
) -> Iterator[tuple[Callable[[str], None], Callable[[Any], None]]]:
    """(say, progress) for `atd.convert`: lines above a bar that counts weights and names the unit done last."""
    with progress_bar(console) as bar:
        task = bar.add_task("reading headers", total=None, unit="weights")

        def say(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False)

        def progress(at) -> None:
            bar.update(task, completed=at.done, total=at.total, description=at.unit, unit=at.counted)

        yield say, progress
