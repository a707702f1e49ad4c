"""The front, and a picture whose labels can be read."""

import sys

import pytest

from atd.errors import BadInput
from atd.reports import pareto


def test_front():
    points = [
        (3, 0.5),
        (2.0, 1.0),
        (2.0, 2.0),
        (4.0, 0.5),
        (1.0, float("nan")),
        (5.0, 0.1),
        (3.0, 0.5),
    ]
    assert pareto.front(points) == [1, 0, 6, 5]
    assert pareto.front([]) == []


def test_labels_of_the_picture_do_not_overlap():
    marks = [
        pareto.Mark(
            1.6 * n + g / 10, 2.0 / 8**n * (1 + g / 20) * k, f"{n}, {32 << g}", f"recipe{k}"
        )
        for n in (1, 2, 3)
        for g in (0, 1, 2)
        for k in (1, 2)
    ]
    figure = pareto.pareto_figure(
        {"a": [*marks, pareto.Mark(1.0, float("inf"), "lost", "recipe1")], "b": marks[:1]}
    )
    from matplotlib.text import Text

    figure.canvas.draw()
    for axis, count in zip(figure.axes, (len(marks), 1), strict=True):
        boxes = [
            Text.get_window_extent(label, figure.canvas.get_renderer()) for label in axis.texts
        ]
        assert len(boxes) == count  # each has found a place
        assert not [
            (i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes[:i]) if a.overlaps(b)
        ]
        at = axis.transData.transform([(mark.bits, mark.kl) for mark in marks[:count]])
        assert not [1 for box in boxes for x, y in at if box.contains(x, y)]


def test_pictures_that_cannot_be(tmp_path, monkeypatch):
    mark = pareto.Mark(3.0, 0.0, "exact")  # a KL of 0 has a place on the log axis
    pareto.pareto_picture({"a": [mark]}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match="cannot be written"):
        pareto.pareto_picture({"a": [mark]}, tmp_path / "p.nonsense")
    with pytest.raises(BadInput, match="nothing to draw"):
        pareto.pareto_picture({"a": [pareto.Mark(3.0, float("nan"), "lost")]}, tmp_path / "q.png")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(BadInput, match=r"pip install 'atd-jax\[report\]'"):
        pareto.pareto_picture({"a": [mark]}, tmp_path / "q.png")
