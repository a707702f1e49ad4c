"""Tables for people: models side by side, a graph by layer.

Tables go to `console` (stdout); progress goes to stderr, so that a command's output can be piped.
"""

import math
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atd.ir import Block, Graph
from atd.runtime.evaluate import Evaluation
from atd.weights import WeightType

console = Console()


def sizes(n: float) -> str:
    """Bytes for people, three digits, decimal units: 98_362_432 -> "98.4 MB"."""
    return f"{three_digits(n, ' ')}B"


def three_digits(n: float, space: str = "") -> str:
    """98_362_432 -> "98.4M", with `space` in front of the prefix."""
    prefixes = ["", "k", "M", "G", "T"]
    while n >= 999.5 and len(prefixes) > 1:
        n /= 1000
        prefixes.pop(0)
    digits = 0 if n >= 99.95 or n == int(n) else 1 if n >= 9.995 else 2
    return f"{n:.{digits}f}{space}{prefixes[0]}"


Row = tuple[
    str, float, int, Evaluation, float | None
]  # name, bits a weight, bytes, figures, tokens/s of generation


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
    titles = (
        "bits a\nweight",
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
    for name, bits, size, result, rate in rows:
        kl = (_or_dash(value, ".4f") for value in (result.kl_mean, result.kl_median, result.kl_99))
        top1, speed = (
            _or_dash(result.top1_agreement, ".1%"),
            [_or_dash(rate, ".1f")] if timed else [],
        )
        table.add_row(
            str(name), f"{bits:.2f}", sizes(size), f"{result.perplexity:.3f}", *kl, top1, *speed
        )
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
    return ", ".join(
        f"{count} x {text}" for text, count in sorted(kinds.items(), key=lambda item: -item[1])
    )


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
