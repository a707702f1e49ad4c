"""Shows models side by side, and a graph by layer. Tables are printed on `console`, stdout."""

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atd.ir import Block, Graph
from atd.runtime.evaluate import Evaluation
from atd.weights import WeightType

_LOG_WIDTH = 160  # columns where there is no terminal


def _width() -> int | None:
    """The columns of stdout; None: those of the terminal, or of the variable COLUMNS."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return None if terminal or "COLUMNS" in os.environ else _LOG_WIDTH


console = Console(width=_width())


def print_line(line: str, style: str | None = None) -> None:
    """Prints a line as it is: a path in it is neither cut nor taken for markup."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def sizes(n: float) -> str:
    """Writes bytes with three digits and decimal units: 98_362_432 -> "98.4 MB"."""
    return f"{three_digits(n, ' ')}B"


def three_digits(n: float, space: str = "") -> str:
    """Writes a number with three digits and `space` before its prefix: 98_362_432 -> "98.4M"."""
    prefixes = ["", "k", "M", "G", "T"]
    while n >= 999.5 and len(prefixes) > 1:
        n /= 1000
        prefixes.pop(0)
    digits = 0 if n >= 99.95 or n == int(n) else 1 if n >= 9.995 else 2
    return f"{n:.{digits}f}{space}{prefixes[0]}"


@dataclass(frozen=True)
class EvaluatedModel:
    """A line of `evaluation_table`."""

    name: str
    bits_per_weight: float
    nbytes: int
    evaluation: Evaluation
    tokens_per_second: float | None = None  # of generation; None: not measured


def evaluation_table(models: Sequence[EvaluatedModel]) -> Table:
    """Shows models side by side: bits per weight, size, perplexity, distance from dense, speed.

    A figure that a model does not have, such as its distance from itself, is a dash. The table fits
    80 columns; long names are folded.
    """
    conditions = {model.evaluation.conditions() for model in models}
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption=conditions.pop() if len(conditions) == 1 else None,
    )
    table.add_column("model", overflow="fold")
    timed = any(model.tokens_per_second is not None for model in models)
    titles = (
        "bits/\nweight",
        "size",
        "perplexity",
        "KL\nmean",
        "KL\nmedian",
        "KL\n99 %",
        "top-1",
        "tokens\n/s",
    )
    for title in titles if timed else titles[:-1]:
        table.add_column(title, justify="right", no_wrap=True)
    for model in models:
        result = model.evaluation
        table.add_row(
            Text(model.name),
            f"{model.bits_per_weight:.2f}",
            sizes(model.nbytes),
            f"{result.perplexity:.3f}",
            *(_or_dash(kl, ".4f") for kl in (result.kl_mean, result.kl_median, result.kl_99)),
            _or_dash(result.top1_agreement, ".1%"),
            *([_or_dash(model.tokens_per_second, ".1f")] if timed else []),
        )
    return table


@dataclass(frozen=True)
class TaskScores:
    """A column of `task_table`."""

    name: str
    bits_per_weight: float
    nbytes: int
    # By (task, name of the figure): the figure and its standard error.
    scores: Mapping[tuple[str, str], tuple[float, float | None]]


def task_table(models: Sequence[TaskScores]) -> Table:
    """Shows the figures of tasks, a row each, of models side by side, with standard errors."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("figure", overflow="fold")
    for model in models:
        title = f"{model.name}\n{model.bits_per_weight:.2f} bits/weight\n{sizes(model.nbytes)}"
        table.add_column(Text(title), justify="right", overflow="fold")
    above = None
    for task, figure in dict.fromkeys(key for model in models for key in model.scores):
        found = (model.scores.get((task, figure)) for model in models)
        table.add_row(Text("" if task == above else task), Text(figure), *map(_with_error, found))
        above = task
    return table


def _with_error(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return "–"
    value, error = score
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def graph_table(graph: Graph, nodes: bool = False) -> Table:
    """Shows type, bits and size of each unit (`nodes`: each weight), and of the whole model last.

    It needs the types alone and reads no weight.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("layer", "type"):
        table.add_column(title, overflow="fold")
    for title in ("weights", "bits", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for unit in graph.units:
        named = [
            (unit.full_name(node), ref.type)
            for node in unit.nodes
            for _, ref in sorted(node.weights.items())
        ]
        if nodes:
            for name, type in named:
                _add(table, name, str(type), [type])
        elif named:
            _add(
                table,
                _unit_name(graph, unit),
                _summary([type for _, type in named]),
                [type for _, type in named],
            )
    table.add_section()
    everything = [ref.type for _, ref in graph.weights()]
    _add(table, "all", _summary(everything), everything)
    return table


def _add(table: Table, name: str, type: str, types: Sequence[WeightType]) -> None:
    weights, size = sum(math.prod(t.shape) for t in types), sum(t.nbytes for t in types)
    table.add_row(Text(name), Text(type), f"{weights:,}", f"{8 * size / weights:.2f}", sizes(size))


def _unit_name(graph: Graph, unit: Block) -> str:
    return unit.name or ("embedding" if unit is graph.prologue else "final norm and head")


def _summary(types: Sequence[WeightType]) -> str:
    """The types of matrices by frequency, without shapes and taps: "6 x packed n=2, 1 x dense"."""
    kinds: dict[str, int] = {}
    for type in types:
        if len(type.shape) > 1 or all(len(t.shape) == 1 for t in types):
            text = re.sub(r" segment=\S+ taps=\S+", "", str(type)).partition("[")[0]
            kinds[text] = kinds.get(text, 0) + 1
    return ", ".join(
        f"{count} x {text}" for text, count in sorted(kinds.items(), key=lambda item: -item[1])
    )
