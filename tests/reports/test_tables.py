"""Tables as people see them."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from atd.decomposition.trellis_codes import known_code
from atd.ir import Block, Graph, Node, in_memory
from atd.pipeline import Pipeline
from atd.reports.tables import EvaluatedModel, evaluation_table, graph_table, print_line, sizes
from atd.runtime.compare import graph_size
from atd.runtime.evaluate import Evaluation
from atd.weights import Dense, Packed, PackedType, TernaryType
from tests.calibration.converted import coded
from tests.models.tiny import tiny_graph

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


def text_of(renderable, width: int = 200) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(renderable)
    return text.getvalue()


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


def test_names_are_no_markup():
    model = EvaluatedModel("[red]m[/red]", 16.0, 1, DENSE)
    assert "[red]m[/red]" in text_of(evaluation_table([model]))


def test_a_line_is_printed_as_it_is(capsys):
    line = f"[bold]{'long/' * 60}[/]"
    print_line(line)
    assert capsys.readouterr().out == line + "\n"


def test_evaluation_table_has_every_figure_and_dashes_for_those_that_are_not():
    rows = [
        EvaluatedModel("dense", 16.0, 269_000_000, DENSE, 41.25),
        EvaluatedModel("ternary3", 5.175, 98_362_432, CONVERTED),
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
    rows = [EvaluatedModel("a", 1, 1, DENSE), EvaluatedModel("b", 1, 1, other)]
    assert "windows" not in text_of(evaluation_table(rows))
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


def test_the_taps_of_a_code_are_left_out_of_sums():
    converted = Pipeline(["pack"])(coded(tiny_graph(layers=1), known_code(2)))
    table = text_of(graph_table(converted))
    assert "7 x packed trellis n=2 layout=aligned/1 f16" in table
    assert "taps=" not in table
