"""The text of a graph before and after each pass is that of tests/golden/ir.

After a change that is wanted: `python -m tests.golden.make_ir`, and a look at the difference.
"""

import difflib

import pytest

from atd.pipeline.registry import BUILTIN
from tests.golden import make_ir


def test_every_pass_has_a_file():
    assert {path.stem for path in make_ir.FOLDER.iterdir()} == set(BUILTIN) == set(make_ir.CASES)


@pytest.mark.parametrize("name", make_ir.CASES)
def test_text_before_and_after(name):
    golden, found = (make_ir.FOLDER / f"{name}.txt").read_text(), make_ir.texts(name)
    lines = difflib.unified_diff(
        golden.splitlines(), found.splitlines(), f"{name}.txt", "found", lineterm="", n=1
    )
    if difference := "\n".join(lines):
        pytest.fail(difference, pytrace=False)
