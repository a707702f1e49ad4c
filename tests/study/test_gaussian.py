"""The gaussian experiment: its figures, its table, its picture."""

import io
import sys

import pytest
from rich.console import Console

from atd.errors import BadInput
from atd.study.gaussian import METHODS, gaussian, gaussian_picture, gaussian_table


@pytest.fixture(scope="module")
def rows():
    return gaussian(size=320, bases=(2,))


def test_rows(rows):
    assert [(row.method, row.group, row.bases) for row in rows] == [
        (method, group, 2) for method, group, _ in METHODS
    ]
    found = {(row.method, row.group, row.bases): row for row in rows}
    for (method, group, bases), known in {
        ("greedy", "tensor", 2): 0.337,
        ("als", "tensor", 2): 0.171,
        ("als", 64, 2): 0.152,
    }.items():
        assert found[method, group, bases].rmse == pytest.approx(known, rel=0.015)
    # 320 x 320, two bases: 64 cells of 2 bytes in a row and 3 groups of 2 fp16 scales (128 + 128 +
    # 64 inputs); one pair of float32 for greedy
    assert found["als", 128, 2].nbytes == 320 * (64 * 2 + 3 * 2 * 2)
    assert found["greedy", "tensor", 2].nbytes == 320 * 64 * 2 + 8
    assert found["greedy", "tensor", 2].percent_of_fp16 == pytest.approx(20, abs=0.01)


def test_the_seed_decides(rows):
    assert gaussian(size=320, bases=(2,)) == rows
    assert gaussian(size=320, bases=(2,), seed=1)[0].rmse != rows[0].rmse


def test_progress():
    heard = []
    gaussian(size=320, bases=(2,), progress=lambda now: heard.append((now.done, now.total)))
    assert heard == [(i, len(METHODS)) for i in range(len(METHODS) + 1)]


def test_table(rows):
    text = io.StringIO()
    Console(width=100, file=text).print(gaussian_table(rows))
    for row in rows:
        line = next(line for line in text.getvalue().splitlines() if f"{row.rmse:.4f}" in line)
        assert row.method in line
        assert f"{row.percent_of_fp16:.1f} %" in line


def test_picture(rows, tmp_path):
    gaussian_picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_picture_that_cannot_be_written(rows, tmp_path):
    for path in (tmp_path / "absent" / "picture.png", tmp_path / "picture.nonsense"):
        with pytest.raises(BadInput, match=f"{path}: the picture cannot be written"):
            gaussian_picture(rows, path)


def test_without_matplotlib(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match=r"pip install 'atd-jax\[report\]'"):
        gaussian_picture(rows, tmp_path / "picture.png")


def test_no_matrix():
    with pytest.raises(BadInput, match="at least one row and column, not 0"):
        gaussian(size=0)
