"""The public API: all names work, again and again, and have types. pyright checks this file too."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, assert_type

import numpy as np
import pytest

import atd
from atd.ir import Graph
from atd.models.model import Model
from atd.runtime.evaluate import Evaluation

ROOT = Path(__file__).parents[1]


def test_every_name_resolves():
    assert set(atd.__all__) == set(dir(atd))
    for name in atd.__all__:
        assert getattr(atd, name) is getattr(atd, name)
    with pytest.raises(AttributeError, match="no attribute 'sweep'"):
        _ = atd.sweep  # pyright: ignore[reportAttributeAccessIssue]


def test_no_public_name_is_a_module():
    inside = {path.stem for path in (ROOT / "atd").iterdir()}
    assert not inside & set(atd.__all__)
    for name in set(atd.__all__) - {"__version__"}:
        assert callable(getattr(atd, name))


def test_each_name_works_before_and_after_its_module_was_imported(stories260k, tmp_path):
    """Modules are attributes of their package once imported: one called atd.evaluate hid the
    function.
    """
    tokens = np.arange(40)
    for again in (False, True):
        if again:
            for module in ("pipeline.convert", "runtime.evaluate", "runtime.generate"):
                importlib.import_module(f"atd.{module}")
        graph = atd.open(stories260k)
        made = atd.Pipeline(["decompose{method = 'greedy', bases = 1, group = 'row'}"])(graph)
        dense, ternary = atd.load(graph), atd.load(made)
        assert atd.evaluate(ternary, tokens, context=16, against=dense).perplexity > 0
        assert len(atd.generate(ternary, [1, 2], max_new_tokens=2)) == 2
        recipe = atd.Pipeline([Nothing()])
        folder = atd.convert(stories260k, tmp_path / f"{again}", recipe, say=lambda line: None)
        assert (folder / "manifest.json").is_file()
        assert issubclass(Nothing, atd.Pass)


@dataclass(frozen=True)
class Nothing(atd.Pass):
    """A pass that leaves all as it is."""

    name = "nothing"
    scope = "graph"

    def rewrite(self, graph, context):
        return None


def test_importing_atd_imports_nothing_heavy():
    code = "import sys, atd; print([m for m in ('numpy', 'jax', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_blas_has_one_thread_where_it_is_asked_for_in_time():
    code = (
        "import atd.host as h, os; print(h.one_blas_thread(), os.environ['OPENBLAS_NUM_THREADS'])"
    )
    for before, given, printed in (
        ("", None, "True 1"),
        ("", "4", "False 4"),
        ("import numpy; ", None, "False 1"),
    ):
        environment = {name: v for name, v in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
        environment |= {"OPENBLAS_NUM_THREADS": given} if given else {}
        command = [sys.executable, "-c", before + code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.stdout.strip() == printed, done.stderr


if TYPE_CHECKING:
    assert_type(atd.__version__, str)
    assert_type(atd.open("model"), Graph)
    assert_type(atd.load("model"), Model)
    assert_type(atd.convert("model", "out"), Path)
    assert_type(atd.Pipeline(["pack"])(atd.open("model")), Graph)
    assert_type(atd.generate(atd.load("model"), [1], max_new_tokens=1), list[int])
    assert_type(atd.evaluate(atd.load("model"), np.arange(9), context=4), Evaluation)
    passes: type[atd.Pass] = Nothing
