"""The picture of a conversion by layer, and what is refused."""

import sys

import numpy as np
import pytest

from atd.errors import BadInput
from atd.reports.plots import check_picture, layers_picture


def report(blocks: int, error: float | None = 0.1) -> list[dict]:
    rows = [
        {
            "node": "model.embed_tokens",
            "type": "dense f16[4,4]",
            "bits": 16.0,
            "weights": 16,
            "error": None,
        }
    ]
    for block in range(blocks):
        for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            name = f"model.layers.{block}.{kind}"
            rows.append(
                {"node": name, "type": "packed ...", "bits": 3.45, "weights": 100, "error": error}
            )
    return rows


def test_the_picture_shows_every_linear_and_notes_what_is_outside_the_blocks(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path))
    )
    layers_picture(report(4), tmp_path / "a.png")
    bits, error = drawn[0].axes
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (
        bits.get_title(loc="left")
        == "12 linears, 1.20k weights, 3.45 bits per weight; embed_tokens 16.00 bits"
    )
    assert [entry.get_text() for entry in bits.get_legend().get_texts()] == [
        "q",
        "v",
        "down",
        "mean 3.45",
    ]
    for axis, value in ((bits, 3.45), (error, 0.1)):
        for line in axis.lines[:3]:
            np.testing.assert_array_equal(line.get_ydata(), [value] * 4)
            np.testing.assert_array_equal(np.round(line.get_xdata()), range(4))


def test_without_errors_there_is_one_panel_and_a_missing_one_leaves_a_gap(tmp_path):
    layers_picture(report(2, error=None), tmp_path / "a.svg")
    some = report(2)
    some[1]["error"] = None
    layers_picture(some, tmp_path / "b.svg")
    one, two = ((tmp_path / name).read_text().count('id="axes_') for name in ("a.svg", "b.svg"))
    assert (one, two) == (1, 2)


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="no rows of blocks"):
        layers_picture(report(0), tmp_path / "a.png")
    with pytest.raises(BadInput, match=r"cannot be written.*"):
        layers_picture(report(1), tmp_path / "no" / "a.png")
    with pytest.raises(BadInput, match=r"cannot be written.*"):
        layers_picture(report(1), tmp_path / "a.xyz")
    with pytest.raises(BadInput, match="is no picture format"):
        check_picture(tmp_path / "a.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match=r"pip install 'atd-jax\[report\]'"):
        layers_picture(report(1), tmp_path / "a.png")
    with pytest.raises(BadInput, match=r"pip install 'atd-jax\[report\]'"):
        check_picture(tmp_path / "a.png")
