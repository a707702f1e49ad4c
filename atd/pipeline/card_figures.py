"""Writes the figures of an evaluation into the model card of an output folder.

    check_card("out")
    add_figures("out", figures(result, text="wiki.txt", against="user/repo"))

They stand in a table of their own, one row per text and setting. The manifest gets the card's new
digest where it had that of the card as it was, so that the folder stays one that atd wrote; a card
that someone else changed stays changed.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from atd.checkpoint.files import read_bytes
from atd.checkpoint.folder import CARD, read_manifest, renew_digest
from atd.checkpoint.hub import hub_id
from atd.checkpoint.writer import file_digest, write_file
from atd.errors import BadInput
from atd.runtime.evaluate import Evaluation

_TITLE = "## Evaluation"
_ABOUT = """\
Measured by `atd eval`. KL is the KL divergence from the dense model in nats, mean and 99 %
quantile; top-1 is the share of positions at which both models rank the same token first.
"""
_SETTING = ("text", "tokens", "setting", "dense model")
_FIGURES = ("its perplexity", "perplexity", "KL", "KL 99 %", "top-1")
_COLUMNS = f"| {' | '.join((*_SETTING, *_FIGURES))} |"
_RULE = "|" + "---|" * len((*_SETTING, *_FIGURES))


def check_card(folder: str | Path) -> None:
    """Raises BadInput, before the work, for a model that has no card to write figures into."""
    if hub_id(folder) is not None or not Path(folder).is_dir():
        raise BadInput(f"--card: {folder} is no folder on this machine; leave out --card")
    read_manifest(Path(folder))
    _read_card(Path(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"--card: no permission to write in {folder}; leave out --card")


def figures(
    result: Evaluation, *, text: str, against: str | None = None, note: str = ""
) -> dict[str, str]:
    """Returns a row of the table: what each column says.

    Args:
        result: the evaluation.
        text: the name of the text.
        against: the name of the dense model, if there is one.
        note: what else the setting was, beyond the windows.
    """
    return {
        "text": text,
        "tokens": f"{result.tokens:,}",
        "setting": result.conditions() + (f", {note}" if note else ""),
        "dense model": against or "–",
        "its perplexity": _number(result.against_perplexity, ".3f"),
        "perplexity": _number(result.perplexity, ".3f"),
        "KL": _number(result.kl_mean, ".4f"),
        "KL 99 %": _number(result.kl_99, ".4f"),
        "top-1": _number(result.top1_agreement, ".1%"),
    }


def add_figures(folder: str | Path, row: Mapping[str, str]) -> None:
    """Writes a row of `figures` into the card of a folder that atd made.

    It takes the place of a row of the same text and setting.

    Raises:
        BadInput: atd did not make the folder, or it has no card.
    """
    folder = Path(folder)
    card = _read_card(folder)
    unchanged = read_manifest(folder).get(CARD) == file_digest(folder / CARD)
    write_file(folder / CARD, with_row(card, row))
    if unchanged:
        renew_digest(folder, CARD)


def with_row(card: str, row: Mapping[str, str]) -> str:
    """Returns a card with this row in its table, which is made in front of "## Use", or at the end,
    where there is none.
    """
    cells = [_cell(row[name]) for name in (*_SETTING, *_FIGURES)]
    line, setting = f"| {' | '.join(cells)} |", f"| {' | '.join(cells[: len(_SETTING)])} |"
    lines = card.rstrip("\n").split("\n")
    if _COLUMNS not in lines:
        if "## Use" not in lines:
            lines.append("")
        at = lines.index("## Use") if "## Use" in lines else len(lines)
        lines[at:at] = [_TITLE, "", *_ABOUT.splitlines(), "", _COLUMNS, _RULE, ""]
    first = end = lines.index(_COLUMNS) + 2
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    rows = [old for old in lines[first:end] if not old.startswith(setting)]
    lines[first:end] = [*rows, line]
    return "\n".join(lines).rstrip("\n") + "\n"


def _read_card(folder: Path) -> str:
    """The text of a folder's card."""
    file = folder / CARD
    if not file.is_file():
        raise BadInput(f"{file}: no such file, and --card adds to a model card; leave out --card")
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError:
        raise BadInput(f"{file}: not UTF-8; save it as UTF-8 or leave out --card") from None


def _cell(text: str) -> str:
    """A text as a cell of a table of Markdown."""
    return re.sub(r"([\\|`<>*_\[\]])", r"\\\1", " ".join(text.split()))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
