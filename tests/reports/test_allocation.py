"""An allocation as a table and as a picture."""

import io
import re

import pytest
from rich.console import Console

from atd.errors import BadInput
from atd.reports.allocation import allocation_picture, allocation_table
from atd.weights import DenseType, PackedType, TernaryType, bits_per_weight
from atd.weights.layouts import DEFAULT_LAYOUT


def row(node: str, bases: int, group: int | str) -> dict:
    ternary = TernaryType((32, 64), bases, group, True, "f16")  # type: ignore[arg-type]
    type = PackedType(ternary, DEFAULT_LAYOUT) if bases else DenseType((32, 64), "f16")
    sizes = {"weights": 32 * 64, "bits": bits_per_weight(type), "bytes": type.nbytes}
    return {"node": node, "type": str(type), **sizes, "predicted_kl": 0.5 / 8**bases}


@pytest.fixture
def rows() -> list[dict]:
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    chosen = ((1, "row"), (2, 32), (3, "row"))
    blocks = [
        row(f"model.layers.{i}.{kind}", *chosen[(i + k) % 3])
        for i in range(2)
        for k, kind in enumerate(kinds)
    ]
    return [row("model.embed_tokens", 0, "row"), *blocks]


def test_the_table_has_a_line_per_block_and_the_whole_model(rows):
    text = io.StringIO()
    Console(file=text, width=120).print(allocation_table(rows))
    lines = {line.split()[0]: line.split() for line in text.getvalue().splitlines() if line.strip()}
    assert lines["0"][1:4] == ["1", "2/32", "3"]
    assert lines["1"][1:4] == ["2/32", "3", "1"]
    assert "model.embed_tokens: dense" in text.getvalue()
    assert lines["all"][-1] == f"{sum(r['predicted_kl'] for r in rows):.4f}"
    assert re.search(r"/64: group size", text.getvalue())


def test_the_picture(rows, tmp_path):
    allocation_picture(rows, tmp_path / "who.png")
    assert (tmp_path / "who.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match="cannot be written"):
        allocation_picture(rows, tmp_path / "who.nothing")


def test_without_an_allocation_there_is_nothing_to_show(rows):
    with pytest.raises(BadInput, match="nothing was allocated"):
        allocation_table([{**row, "predicted_kl": None} for row in rows])
