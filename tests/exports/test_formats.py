"""The table of formats: all can be chosen, and each takes its own options alone."""

import inspect
from pathlib import Path
from typing import get_args

import pytest

from atd.errors import BadInput
from atd.exports import formats

COMMON = {"overwrite": False, "ignore_extra": False, "say": print, "progress": print}


def test_every_format_can_be_chosen():
    assert get_args(formats.To) == tuple(formats.FORMATS)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_functions_take_what_the_table_gives_them(name):
    parameters = inspect.signature(formats.FORMATS[name].load()).parameters
    assert {"model", "out", *COMMON} <= set(parameters)


def test_options_of_other_formats_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(formats.FORMATS, "plain", formats.Format(f"{__name__}:plain", "a line"))
    with pytest.raises(BadInput, match=r"--dtype is no option of --to plain.*--to hf"):
        formats.export(Path("model"), Path("out"), "plain", {"dtype": "float16"}, **COMMON)  # pyright: ignore[reportArgumentType]
    options = {"dtype": None}
    assert formats.export(Path("m"), Path("o"), "plain", options, **COMMON) == Path("o")  # pyright: ignore[reportArgumentType]


def plain(model: Path, out: Path, overwrite: bool, ignore_extra: bool, say, progress) -> Path:
    return out
