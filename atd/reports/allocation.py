"""Shows how bits were allocated over the matrices of a model: as a table and as a picture."""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from atd.checkpoint.folder import NodeReport
from atd.errors import BadInput
from atd.reports.plots import new_figure, save_figure
from atd.reports.tables import sizes
from atd.weights import TernaryType, TrellisType, parse_type, ternary_of

_BLOCK = re.compile(r"(.*\.\d+)\..*?([^.]+)")
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def allocation_table(rows: Sequence[NodeReport]) -> Table:
    """Shows N of each matrix, blocks by kinds of linears; bits, size and predicted KL per block.

    Where the matrices differ in their scales, kind and group size of these stand behind N.
    Embedding and head follow, and the whole model last.

    Args:
      rows: of report.json; those without a predicted KL were not decided on and are left out.

    Raises BadInput where no row has a predicted KL: nothing was allocated.
    """
    rows, blocks, others, kinds = _sorted(rows)
    types = [ternary_of(parse_type(row["type"])) for row in rows]
    plain = len({_kind(type) for type in types if type is not None}) < 2
    caption = (
        None
        if plain
        else "N bases; t: trellis code; f: free scales, else tied; "
        "/64: group size, else one group per row"
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=caption)
    table.add_column("block", overflow="fold")
    for title in (*(kind.removesuffix("_proj") for kind in kinds), "bits", "size", "predicted\nKL"):
        table.add_column(title, justify="right", no_wrap=True)
    for block, nodes in blocks.items():
        cells = [_option(nodes[kind], plain) if kind in nodes else "" for kind in kinds]
        table.add_row(Text(block.rpartition(".")[2]), *cells, *_figures(list(nodes.values())))
    table.add_section()
    for row in others:
        title = Text(f"{row['node']}: {_option(row, plain)}")
        table.add_row(title, *[""] * len(kinds), *_figures([row]))
    table.add_row("all", *[""] * len(kinds), *_figures(rows))
    return table


def allocation_picture(rows: Sequence[NodeReport], path: str | Path) -> None:
    """Draws N of each matrix, blocks by kinds of linears, darker with more bits.

    Beside it stands the predicted KL of each block. `rows` are as in `allocation_table`. Raises
    BadInput where matplotlib is missing, nothing was allocated or the picture cannot be written.
    """
    rows, blocks, others, kinds = _sorted(rows)
    bits = [
        [nodes[kind]["bits"] if kind in nodes else float("nan") for kind in kinds]
        for nodes in blocks.values()
    ]
    known = [value for line in bits for value in line if value == value]
    figure = new_figure(8, 1.6 + 0.26 * max(4, len(blocks)))
    cells, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    image = cells.imshow(bits, aspect="auto", cmap="Blues", vmin=0, vmax=1.15 * max(known))
    for y, nodes in enumerate(blocks.values()):
        for x, kind in enumerate(kinds):
            if kind in nodes:
                dark = nodes[kind]["bits"] > 0.65 * max(known)
                text, colour = _option(nodes[kind], plain=True), "white" if dark else "black"
                cells.text(x, y, text, ha="center", va="center", color=colour, fontsize=8)
    cells.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds])
    cells.set_yticks(range(len(blocks)), [block.rpartition(".")[2] for block in blocks], fontsize=8)
    cells.set_ylabel("block")
    figure.colorbar(image, ax=bars, label="bits per weight")
    bars.barh(
        range(len(blocks)), [_kl(nodes.values()) for nodes in blocks.values()], color="#E69F00"
    )
    bars.set_xlabel("predicted KL")
    bars.spines[["top", "right"]].set_visible(False)
    total, weights = sum(row["bytes"] for row in rows), sum(row["weights"] for row in rows)
    bits_text = f"{8 * total / weights:.2f} bits per weight"
    notes = [f"N by matrix; {sizes(total)}, {bits_text}, predicted KL {_kl(rows):.4f}"]
    notes += [f"{row['node'].split('.')[-1]} N = {_option(row, plain=True)}" for row in others]
    cells.set_title("; ".join(notes), loc="left", fontsize=9)
    save_figure(figure, path)


def _sorted(
    rows: Sequence[NodeReport],
) -> tuple[list[NodeReport], dict[str, dict[str, NodeReport]], list[NodeReport], list[str]]:
    """Sorts rows: (those decided on, block -> kind -> row, those outside blocks, kinds)."""
    rows = [row for row in rows if row.get("predicted_kl") is not None]
    blocks: dict[str, dict[str, NodeReport]] = {}
    others = []
    for row in rows:
        if match := _BLOCK.fullmatch(row["node"]):
            blocks.setdefault(match[1], {})[match[2]] = row
        else:
            others.append(row)
    if not blocks:
        raise BadInput(
            "nothing was allocated here: no row has a predicted KL; "
            "convert with a recipe that has the pass allocate"
        )
    kinds = sorted({kind for nodes in blocks.values() for kind in nodes}, key=_place)
    return rows, blocks, others, kinds


def _place(kind: str) -> tuple[int, str]:
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind)


def _option(row: NodeReport, plain: bool) -> str:
    """N or "dense"; unless `plain`, N with "f" for free scales and the group size: "2f/64"."""
    type = ternary_of(parse_type(row["type"]))
    if type is None:
        return "dense"
    if isinstance(type, TrellisType):
        return f"{type.code.bases:g}{'' if plain else 't'}"
    if plain:
        return str(type.bases)
    return (
        f"{type.bases}{'' if type.tied else 'f'}{'' if type.group == 'row' else f'/{type.group}'}"
    )


def _kind(type: TernaryType | TrellisType) -> tuple:
    """What stands behind N in a table of matrices of several kinds."""
    return ("trellis",) if isinstance(type, TrellisType) else (type.group, type.tied)


def _figures(rows: Sequence[NodeReport]) -> tuple[str, str, str]:
    total, weights = sum(row["bytes"] for row in rows), sum(row["weights"] for row in rows)
    return f"{8 * total / weights:.2f}", sizes(total), f"{_kl(rows):.4f}"


def _kl(rows) -> float:
    return sum(row["predicted_kl"] for row in rows)
