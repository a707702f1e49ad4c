"""The documentation says what the code does: options, commands, the stored format, and links
between pages.
"""

import ast
import pkgutil
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from atd.models import frontend
from atd.pipeline import Pipeline, pass_class, registered, toml_value
from atd.pipeline.convert import convert
from atd.pipeline.recipe import Recipe, recipe_names
from atd.weights.layouts import LAYOUTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md"))]


def sections(page: Path) -> dict[str, str]:
    """Title -> text of the sections "## title" of a page."""
    _, *parts = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
    return {part.split("\n")[0]: part for part in parts}


def rows(text: str) -> dict[str, list[str]]:
    """First cell -> other cells, without backquotes, of the rows of tables that begin with code."""
    found = re.findall(r"^\| `([^`]+)`[^|]*\|(.*)\|$", text, flags=re.MULTILINE)
    return {name: [cell.strip().strip("`") for cell in rest.split(" | ")] for name, rest in found}


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


# --- the stored format ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> SimpleNamespace:
    """The Python of docs/reference/format.md, which asserts its own example."""
    code = re.findall(r"```python\n(.*?)```", (DOCS / "reference/format.md").read_text(), re.DOTALL)
    names = {}
    exec("\n".join(code), names)
    return SimpleNamespace(**names)


def test_bytes_of_the_example_are_those_that_pack_writes(reader):
    integers = np.array([[4, -1, 0, 2, -3, 1], [0, 0, 0, 0, 0, -4]])
    first = np.round(integers / 3)
    trits = np.stack([first, integers - 3 * first], axis=-1).astype(np.int8)
    for layout in ("interleaved", "aligned"):
        assert np.array_equal(LAYOUTS[layout].pack(trits), reader.packed)


def test_reader_of_the_page_reads_what_convert_writes(reader, tmp_path):
    rules = (
        "{match = '.*q_proj', bases = 3, group = 32}, "
        "{match = '.*gate_proj', bases = 1, scales = 'tied', group = 'row'}, "
        "{match = '.*up_proj', bases = 1.5, group = 'row', trellis = 'fast'}, "
        "{match = '.*down_proj', bases = 4, group = 'tensor'}"
    )
    pipeline = Pipeline([f"decompose{{bases = 2, group = 48, rules = [{rules}]}}", "pack"])
    out = convert(
        ROOT / "tests/golden/llama_gqa", tmp_path / "out", pipeline, say=lambda line: None
    )
    types = set()
    for _, ref in frontend.open(out).weights():
        found = reader.read(out, ref.tensor, str(ref.type))
        weights, is_exact = (
            np.asarray(ref.load().dequantize(np.float32)),
            "taps=" not in str(ref.type),
        )
        np.testing.assert_allclose(found, weights, rtol=0, atol=0 if is_exact else 1e-6)
        types.add(str(ref.type).partition(" layout")[0])
    assert {f"packed n={options}" for options in ("1 g=row tied", "2 g=48 free")} < types
    assert {f"packed n={options}" for options in ("3 g=32 free", "4 g=tensor free")} < types
    assert any(text.startswith("packed trellis n=1.5 segment=") for text in types)


def test_every_layout_has_a_row():
    named = rows(sections(DOCS / "reference/format.md")["The layouts"])
    assert named.keys() == {str(layout) for layout in LAYOUTS.values()}


# --- options and commands -------------------------------------------------------------------------


def test_every_pass_has_a_section_with_its_options_and_defaults():
    pages = sections(DOCS / "reference/passes.md")
    built_in = {name for name, place in registered().items() if place.startswith("atd.")}
    assert pages.keys() == built_in
    for name in built_in:
        options = {f.name: toml_value(f.default) for f in fields(pass_class(name))}
        options.pop("rules")
        assert {option: cells[0] for option, cells in rows(pages[name]).items()} == options, name
        assert f"Scope: {pass_class(name).scope}" in pages[name]


def test_every_recipe_and_key_has_a_row():
    page = DOCS / "reference/recipes.md"
    names = set(
        re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| `[^|]*\|", page.read_text(), re.M)))
    )
    inner = ("pipeline", "overridden")
    keys = {f.name: toml_value(f.default) for f in fields(Recipe) if f.name not in inner}
    assert set(recipe_names()) <= names
    assert {key: cells[0] for key, cells in rows(sections(page)["Keys"]).items()} == keys


def test_every_command_has_a_section_with_its_options(atd):
    pages = {
        title.removeprefix("atd "): text
        for title, text in sections(DOCS / "reference/cli.md").items()
    }
    _, out, _ = atd("--help")
    commands = set(re.findall(r"\{([\w,]+)\}", out)[0].split(","))
    assert pages.keys() == commands
    for command, text in pages.items():
        _, out, _ = atd(command, "--help")
        found = set(re.findall(r"^(?:│ |  )(--[a-z-]+)", out, flags=re.MULTILINE))
        assert rows(text).keys() == found, command


def test_citation_and_package_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"license: {project['license']}" in (ROOT / "CITATION.cff").read_text()


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(
        r"\]\((?!https?:)([^)#\s]*)(?:#[^)]*)?\)", without_code(page.read_text())
    ):
        assert not link or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_short_and_numbers_have_their_leading_zero(page):
    text = page.read_text()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    assert re.findall(r"(?:^|[\s(|])-?\.\d+", without_code(text)) == []


def test_files_that_pages_name_exist():
    folders = "atd|passes|kernels|configs|benchmarks|examples|tests|docs"
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_names_that_pages_name_exist():
    others = {"atd.passes", "atd.kernels"}  # a group of entry points, and a logger
    for page in PAGES:
        for name in re.findall(r"`(atd(?:\.\w+)+)(?:\(.*?\))?`", page.read_text()):
            assert name in others or pkgutil.resolve_name(name), f"{page}: {name}"


def test_docstrings_continue_entries_with_an_indent():
    """Else the site shows the second line of an argument's description as another argument."""
    broken = []
    for path in [
        path for folder in ("atd", "passes", "kernels") for path in (ROOT / folder).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            text = ast.get_docstring(node) or ""
            for section in re.findall(
                r"^(?:Args|Raises):\n((?:[ ]+.*\n?|\n)*)", text, re.MULTILINE
            ):
                indent = len(section) - len(section.lstrip())
                entries = [
                    line[indent:] for line in section.splitlines() if line[:indent].isspace()
                ]
                entries = [line for line in entries if line[:1].strip()]
                broken += [
                    f"{path}: {line}" for line in entries if not re.match(r"[\w*., ]+: ", line)
                ]
    assert not broken


def test_navigation_has_every_page():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
