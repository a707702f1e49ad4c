"""Tables, the picture and progress as people see them."""

import io
import re
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from atd.errors import BadInput
from atd.ir import Block, Graph, Node, in_memory
from atd.progress import Progress as At
from atd.reports.plots import layers_picture
from atd.reports.progress import conversion_progress, progress_bar
from atd.reports.tables import evaluation_table, graph_size, graph_table, sizes
from atd.runtime.evaluate import Evaluation
from atd.weights import Dense, Packed, PackedType, TernaryType

DENSE = Evaluation(
    30.358, None, None, None, None, None, 8, 4088, 512, False, "standard", 4096, 10.0, 400.0
)
CONVERTED = replace(
    DENSE,
    perplexity=31.5,
    against_perplexity=30.358,
    kl_mean=0.0357,
    kl_median=0.0123,
    kl_99=0.4567,
    top1_agreement=0.912,
)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def text_of(renderable, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return written(console)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (98_362_432, "98.4 MB"),
        (999_700_000, "1.00 GB"),
        (3.9e9, "3.90 GB"),
        (16_060_522_496, "16.1 GB"),
        (2e15, "2000 TB"),
    ],
)
def test_sizes(n, text):
    assert sizes(n) == text


def test_evaluation_table_has_every_figure_and_dashes_for_those_that_are_not():
    rows = [
        ("dense", 16.0, 269_000_000, DENSE, 41.25),
        ("ternary3", 5.175, 98_362_432, CONVERTED, None),
    ]
    lines = [line.strip() for line in text_of(evaluation_table(rows), width=80).splitlines()]
    dense, converted = (
        next(line.split() for line in lines if line.startswith(name))
        for name in ("dense", "ternary3")
    )
    assert dense == ["dense", "16.00", "269", "MB", "30.358", "–", "–", "–", "–", "41.2"]
    assert converted == [
        "ternary3",
        "5.17",
        "98.4",
        "MB",
        "31.500",
        "0.0357",
        "0.0123",
        "0.4567",
        "91.2%",
        "–",
    ]
    assert lines[-1].strip() == "8 windows of 512 tokens, no BOS, 4,088 positions scored"


def test_conditions_that_differ_are_under_no_common_caption():
    other = replace(CONVERTED, bos=True, convention="llama.cpp")
    assert "windows" not in text_of(
        evaluation_table([("a", 1, 1, DENSE, None), ("b", 1, 1, other, None)])
    )
    assert other.conditions().endswith(
        "BOS in front, 4,088 positions scored, llama.cpp's convention"
    )


def linear(name: str, weight) -> Node:
    return Node(name, "linear", ("x",), {"weight": in_memory(f"{name}.weight", weight)})


def graph() -> Graph:
    kind = PackedType(TernaryType((8, 10), 2, "row", True, "f16"), "interleaved")
    packed = Packed(np.zeros(kind.codes_shape, np.uint8), np.zeros((8, 1, 1), np.float16), kind)
    dense = Dense(np.zeros((10, 8), np.float16))
    return Graph(
        {},
        Block(
            "",
            (
                Node(
                    "embed",
                    "embed",
                    ("x",),
                    {"weight": in_memory("e", Dense(np.zeros((20, 10), np.float16)))},
                ),
            ),
        ),
        (Block("model.layers.0", (linear("q_proj", packed), linear("down_proj", dense))),),
        Block(
            "",
            (
                Node(
                    "norm",
                    "rms_norm",
                    ("x",),
                    {"weight": in_memory("n", Dense(np.zeros(10, np.float32)))},
                ),
            ),
        ),
    )


def test_graph_size_counts_all_bytes_of_the_linears():
    # packed: 8 rows x 2 cells x 2 bytes + 8 scales of 2 bytes; dense: 80 weights of 2 bytes
    assert graph_size(graph()) == (8 * (32 + 16 + 160) / 160, 32 + 16 + 160 + 400 + 40)


def test_graph_table_by_layer_and_by_node():
    by_layer = text_of(graph_table(graph()))
    assert "1 x packed n=2 g=row tied layout=interleaved/1 f16, 1 x dense f16" in by_layer
    rows = [line.split() for line in by_layer.splitlines() if line.rstrip().endswith(" B")]
    assert [row[-4] for row in rows] == ["200", "160", "10", "370"]
    assert rows[-1][-2] == "648"
    assert "model.layers.0.down_proj" in text_of(graph_table(graph(), nodes=True))


# --- the picture ------------------------------------------------------------------------------------------------------


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
        == "12 linears, 1.20k weights, 3.45 bits a weight; embed_tokens 16.00 bits"
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
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match=r"pip install 'atd-jax\[report\]'"):
        layers_picture(report(1), tmp_path / "a.png")


# --- progress ---------------------------------------------------------------------------------------------------------


def test_on_a_terminal_there_is_a_bar_with_a_rate():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bar(console) as bar:
        task = bar.add_task("evaluating", total=2_000_000, unit="tokens")
        bar.update(task, completed=1_000_000)
        time.sleep(0.01)
        bar.update(task, completed=2_000_000)
        bar.refresh()
    shown = written(console)
    assert "evaluating" in shown
    assert "100 %" in shown
    assert re.search(r"[\d.]+[kMG] tokens/s", shown)


def test_in_a_log_there_is_a_line_now_and_then_and_one_at_the_end(monkeypatch):
    console = Console(file=io.StringIO(), width=100)
    clock = [0.0]
    monkeypatch.setattr("atd.reports.progress.time.monotonic", lambda: clock[0])
    with progress_bar(console) as bar:
        task = bar.add_task("evaluating", total=100, unit="tokens")
        for done in range(10, 110, 10):
            clock[0] += 8
            bar.update(task, completed=done)
        bar.update(task, completed=100)
    percentages = [
        line.split(":")[1].split(",")[0].strip() for line in written(console).splitlines()
    ]
    assert percentages == ["40 %", "80 %", "100 %"]


def test_conversion_progress_says_and_counts():
    console = Console(file=io.StringIO(), width=100)
    with conversion_progress(console) as (say, progress):
        say("warning: [bold] stays as it is")
        progress(At("converting", 3, 3, "weights", "model.layers.0"))
    lines = written(console).splitlines()
    assert lines[0] == "warning: [bold] stays as it is"
    assert lines[1].startswith("converting model.layers.0: 100 %")
