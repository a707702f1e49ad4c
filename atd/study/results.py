"""Keeps what a study found: the file results.csv, a table, a picture.

A row maps columns to texts. The columns of an evaluation text are called "figure:text", such as
kl_mean:wikitext2_raw_test, those of a varied option "pass.option", such as decompose.bases, and all
others are single words.
"""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from atd.checkpoint.writer import write_file
from atd.errors import BadInput
from atd.reports import pareto
from atd.reports.tables import sizes

RESULTS = "results.csv"
PICTURE = "pareto.png"

StudyRow = dict[str, str]


def read_results(path: Path) -> list[StudyRow]:
    """Reads the rows of a study's results.csv. Raises BadInput where it is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [
                {column: value or "" for column, value in row.items() if column} for row in reader
            ]
            columns = set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    if missing := {"key", "setting", "recipe", "error", "folder"} - columns:
        raise BadInput(
            f"{path}: not the results of a study: it has no column {min(missing)}; "
            "choose another folder"
        )
    return rows


def write_results(path: Path, rows: Sequence[StudyRow]) -> None:
    """Writes all rows, whole or not at all, with their columns in a fixed order."""
    given = dict.fromkeys(
        ["recipe", "error", "folder", *(column for row in rows for column in row)]
    )
    groups = {"recipe": 0, "error": 5, "folder": 6, "key": 8, "setting": 8}

    def place(column: str) -> int:  # what was done, what came out, what it was done with
        results = (
            column in ("bits_per_weight", "bytes", "convert_seconds", "evaluate_seconds")
            or ":" in column
        )
        return groups.get(column, 1 if is_option(column) else 3 if results else 7)

    text = io.StringIO(newline="")
    columns = sorted([*given, *({"key", "setting"} - set(given))], key=place)
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def number(row: StudyRow, column: str) -> float:
    """Returns a figure of a row; NaN where it has none."""
    try:
        return float(row.get(column, ""))
    except ValueError:
        return math.nan


def short_options(options: Iterable[str]) -> dict[str, str]:
    """Maps pass.option to a short name: the option alone, unless two passes have one so called."""
    options = list(options)
    last = [option.partition(".")[2] for option in options]
    return {
        o: short if last.count(short) == 1 else o for o, short in zip(options, last, strict=True)
    }


def is_option(column: str) -> bool:
    """Returns whether the column is a varied pass.option."""
    return "." in column and ":" not in column


def _options(rows: Sequence[StudyRow]) -> list[str]:
    """The options that are varied."""
    return list(
        dict.fromkeys(c for row in rows for c, value in row.items() if is_option(c) and value)
    )


def _texts(rows: Sequence[StudyRow]) -> list[str]:
    """The names of the evaluation texts."""
    names = (
        c.partition(":")[2]
        for row in rows
        for c, value in row.items()
        if c.startswith("kl_mean:") and value
    )
    return list(dict.fromkeys(names))


def _front(rows: Sequence[StudyRow], text: str) -> set[int]:
    """The indices of the rows that no other beats in bits and mean KL on this text."""
    return set(
        pareto.front(
            [(number(row, "bits_per_weight"), number(row, f"kl_mean:{text}")) for row in rows]
        )
    )


def study_table(rows: Sequence[StudyRow]) -> Table:
    """Shows finished rows of one setting by rising bits, with a "●" for those on the Pareto front.

    With one text it has all figures, with several perplexity and mean KL on each; results.csv has
    the rest. With two short options it fits 80 columns.
    """
    rows = sorted(rows, key=lambda row: (number(row, "bits_per_weight"), row["folder"]))
    options, texts = short_options(_options(rows)), _texts(rows)
    single = len(texts) == 1
    conditions = [_conditions(row, text) for text in texts for row in rows[:1]]
    if not single:
        conditions = [f"({n}) {line}" for n, line in enumerate(conditions, 1)]
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption=Text("\n".join([*conditions, "● Pareto front"])),
    )
    table.add_column("recipe", overflow="fold", min_width=_room(row["recipe"] for row in rows))
    for option, title in options.items():
        room = _room([title, *(row.get(option, "") for row in rows)])
        table.add_column(Text(title), justify="right", overflow="fold", min_width=room)
    calibrated = len({row.get("calib_sha256", "") for row in rows}) > 1
    if calibrated:
        table.add_column("calib", justify="right", overflow="fold")
    for title in _figure_titles(len(texts)):
        table.add_column(title, justify="right", no_wrap=True)
    fronts = {text: _front(rows, text) for text in texts}
    for i, row in enumerate(rows):
        cells = [row["recipe"], *(row.get(option) or "–" for option in options)]
        cells += [Path(row.get("calib", "")).stem or "–"] if calibrated else []
        cells.append(f"{number(row, 'bits_per_weight'):.2f}")
        cells += [sizes(number(row, "bytes"))] if single else []
        for text in texts:
            cells += _figure_cells(row, text, on_front=i in fronts[text])[: 4 if single else 2]
        table.add_row(*map(Text, cells))
    return table


def _figure_titles(texts: int) -> list[str]:
    if texts == 1:
        return ["bits/\nweight", "size", "perplexity", "KL\nmean", "KL\n99 %", "top-1"]
    of_texts = [(f"perplexity\n({n})", f"KL\n({n})") for n in range(1, texts + 1)]
    return ["bits/\nweight", *itertools.chain(*of_texts)]


def _figure_cells(row: StudyRow, text: str, on_front: bool) -> list[str]:
    """Perplexity, mean and 99 % quantile of KL, and top-1 agreement on a text."""
    perplexity, kl = number(row, f"perplexity:{text}"), number(row, f"kl_mean:{text}")
    return [
        f"{perplexity:.3f}" if perplexity < 1000 else f"{perplexity:,.0f}",
        f"{kl:#.3g}{' ●' if on_front else '  '}",
        f"{number(row, f'kl_99:{text}'):#.3g}",
        f"{number(row, f'top1:{text}'):.1%}",
    ]


def _room(cells: Iterable[str]) -> int:
    """The width that keeps short words whole and lets long ones fold."""
    return min(12, max(map(len, cells), default=0))


def _conditions(row: StudyRow, text: str) -> str:
    """The conditions under which the figures on a text hold."""
    windows, positions = number(row, f"windows:{text}"), number(row, f"positions:{text}")
    dense = number(row, f"dense_perplexity:{text}")
    return (
        f"{row['model']} on {text}: dense perplexity {dense:.3f}; {windows:.0f} windows of "
        f"{row['context']} tokens, no BOS, {positions:,.0f} positions scored"
    )


def study_picture(rows: Sequence[StudyRow], path: str | Path) -> None:
    """Draws mean KL over bits per weight, a panel for each text.

    Raises BadInput as `atd.reports.pareto.pareto_picture` does.
    """
    options = _options(rows)
    calibrations = {row["calib_sha256"] for row in rows if row.get("calib_sha256")}

    def name(row: StudyRow) -> str:
        calib = Path(row.get("calib", "")).stem
        return f"{row['recipe']} on {calib}" if calib and len(calibrations) > 1 else row["recipe"]

    panels = {}
    for text in _texts(rows):
        title = _conditions(rows[0], text).replace("; ", "\n", 1)
        panels[title] = [
            pareto.Mark(
                number(row, "bits_per_weight"),
                number(row, f"kl_mean:{text}"),
                ", ".join(row.get(option) or "–" for option in options) or name(row),
                name(row) if options else "",
            )
            for row in rows
        ]
    note = f"labels: {', '.join(short_options(options).values())}" if options else ""
    pareto.pareto_picture(panels, path, note)
