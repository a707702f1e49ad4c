"""Writes tests/golden/ir: for each built-in pass the text of a small graph before and after it.

    python -m tests.golden.make_ir

The texts are those of `str(graph)`. A change of the IR, of a pass or of its options shows as a
difference of these files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atd.calibration.streams import Calibration
from atd.checkpoint.writer import digest
from atd.ir import Graph
from atd.pipeline import Context, Pipeline
from atd.weights import stored
from tests.models.tiny import tiny_graph

FOLDER = Path(__file__).parent / "ir"
TIED = "decompose{group = 'row', scales = 'tied'}"
FAST = "decompose{method = 'greedy', group = 'row', nodes = '.*o_proj'}"
ALLOCATE = "allocate{bits = 3.4, groups = [32, 'row'], scales = ['tied', 'free']}"
ENDS_TOO = (
    "allocate{budget = '20kB', bases = [2], embedding_bases = [3], embedding_groups = ['row']}"
)
SHORT = "calibrate{against = 'block', steps = 1, checks = 1, codes = false}"


def model(tied: bool = False) -> Graph:
    """Returns a llama of one decoder layer; with `tied` its head takes the embedding's matrix."""
    return tiny_graph(layers=1, hidden=64, mlp=96, tied=tied)


def shapes(graph: Graph) -> Context:
    """What passes read before a conversion begins: no data."""
    return Context(say=lambda line: None)


def calibrated(graph: Graph) -> Context:
    """A few random tokens, and the dense model."""
    tokens = np.random.default_rng(0).integers(0, 40, (8, 8)).astype(np.int32)
    return Context(calibration=Calibration(tokens), dense=model(), say=lambda line: None)


def written(graph: Graph) -> Context:
    """The digests of the graph's tensors."""
    digests = {
        name: digest(getattr(ref.load(), field))
        for _, ref in graph.weights()
        for field, (name, _, _) in stored(ref.tensor, ref.type).items()
    }
    return Context(written_digests=digests)


@dataclass(frozen=True)
class Case:
    """A pass, and how the graph came about that it is given."""

    step: str
    behind: tuple[str, ...] = ()  # passes before it
    tied: bool = False
    context: Callable[[Graph], Context] = shapes


CASES = {
    "allocate": [Case(ALLOCATE), Case(ENDS_TOO, tied=True, context=calibrated)],
    "calibrate": [Case(SHORT, (FAST, "pack"), context=calibrated)],
    "decompose": [
        Case("decompose{group = 32}"),
        Case("decompose{method = 'hessian'}", (ALLOCATE,)),
    ],
    "equalize": [Case("equalize")],
    "fold_norms": [Case("fold_norms"), Case("fold_norms{untie = true}", tied=True)],
    "fuse": [Case("fuse"), Case("fuse", (TIED, "pack"))],
    "pack": [Case("pack", (TIED,)), Case("pack{layout = 'tq2_0'}", ("decompose{bases = 1}",))],
    "rotate": [
        Case("rotate", ("fold_norms",)),
        Case("rotate", ("fold_norms",), tied=True),
        Case("rotate{embedding = true}", ("fold_norms",), tied=True),
        Case("rotate{r3 = true}", ("fold_norms",)),
        Case("rotate{r1 = false, r4 = true}", ("fold_norms",)),
    ],
    "verify": [Case("verify", context=written)],
}


def text(case: Case) -> str:
    """Returns the pass, and the graph before and after it."""
    behind, (step,) = Pipeline(case.behind), Pipeline([case.step]).passes
    before = behind(model(case.tied), shapes(model()))
    after = step(before, case.context(before))
    made = "".join(f"\n  {earlier}" for earlier in behind.passes)
    return f"pass {step}\n\nbefore:{made and f' behind{made}'}\n{before}\n\nafter:\n{after}\n"


def texts(name: str) -> str:
    """Returns what the file of a pass holds."""
    return "\n\n".join(map(text, CASES[name]))


if __name__ == "__main__":
    for name in CASES:
        (FOLDER / f"{name}.txt").write_text(texts(name))
