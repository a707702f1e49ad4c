"""A real study of two points on two texts, and what it is made from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from atd.study.results import StudyRow
from atd.study.run import run_study

FAST = """
[[passes]]
name = "decompose"
method = "greedy"
bases = {bases}
group = "tensor"
[[passes]]
name = "pack"
"""


@pytest.fixture(scope="session")
def recipe_text() -> str:
    """A recipe that takes a moment, with a place for the number of bases."""
    return FAST


@pytest.fixture(scope="session")
def fast(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "fast.toml"
    path.write_text(FAST.format(bases=1))
    return path


@pytest.fixture(scope="session")
def texts(small, tmp_path_factory) -> list[Path]:
    words = small.sample.read_text()
    paths = [tmp_path_factory.mktemp("texts") / f"{name}.txt" for name in ("start", "end")]
    paths[0].write_text(words[:1800])
    paths[1].write_text(words[-1800:])
    return paths


@pytest.fixture(scope="session")
def study() -> Callable:
    """study(model, out, recipe, texts) -> (rows, failed)."""

    def run(model, out, recipe, texts, vary=("decompose.bases=1,2",), **options):
        options = {"data": texts, "context": 64, "tokens": 256, "say": lambda line: None} | options
        return run_study(model, out, [str(recipe)], vary, **options)

    return run


@pytest.fixture(scope="session")
def studied(stories260k, fast, texts, study, tmp_path_factory) -> tuple[Path, list[StudyRow]]:
    """(OUT, rows) of a real study with two points on two texts; not to be changed."""
    out = tmp_path_factory.mktemp("studies") / "out"
    rows, failed = study(stories260k, out, fast, texts)
    assert not failed
    return out, rows
