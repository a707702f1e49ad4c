"""How good predictions of KL are: against measured KL, by node and option and over ten budgets.

    python benchmarks/allocation.py MODEL --data TEXT [--json FILE]    stories15M: five minutes
    python benchmarks/allocation.py MODEL --data TEXT --trellis default    with trellis codes
    python benchmarks/allocation.py MODEL --data TEXT --tiny           less of all, for CI

Rank correlations are over every linear and N = 1, 2, 3, rotated, tied, one scale per row, or over N
= 1 and those of the trellis codes; every linear is a choice of its own. Models for the budgets are
made by error feedback under the dense model's moments, and measured on the calibration text: what
is judged is the prediction.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from atd.calibration.measured import (
    kl_divergence,
    logits,
    measured_losses,
    quantized_candidates,
    with_matrices,
)
from atd.calibration.sensitivity import fisher_losses
from atd.calibration.windows import cut_windows, windows_holding
from atd.checkpoint.files import read_text, write_json
from atd.checkpoint.reader import open_tokenizer
from atd.decomposition.allocation import Choice, allocate, total_bytes, total_loss
from atd.decomposition.options import stored_bytes, ternary_types, trellis_types
from atd.decomposition.trellis_codes import BASES
from atd.models import frontend
from atd.models.execute import dense_weights
from atd.pipeline import Pipeline
from atd.weights.layouts import DEFAULT_LAYOUT

BUDGETS = np.linspace(2.25, 4.5, 10)  # bits per weight


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--tokens", type=int, default=16384, help="of the text, for moments")
    parser.add_argument(
        "--measured-tokens", type=int, default=2048, help="for gradients and measurements"
    )
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--trellis", default="", help="kind of codes: fast, default or best")
    parser.add_argument("--tiny", action="store_true", help="1024 and 256 tokens, two budgets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    tokens, few, budgets = options.tokens, options.measured_tokens, BUDGETS
    if options.tiny:
        tokens, few, budgets = 1024, 256, BUDGETS[4:6]
    graph = Pipeline(["fold_norms", "rotate"])(frontend.open(options.model))
    ids = open_tokenizer(options.model).encode(read_text(options.data))
    windows = cut_windows(np.asarray(ids, np.int32), tokens, options.context, options.data)
    linears = {
        b.full_name(n): n.weights["weight"].type
        for b in graph.blocks
        for n in b.nodes
        if n.op == "linear"
    }
    rounded = (1,) if options.trellis else (1, 2, 3)
    coded = BASES if options.trellis else ()
    candidates = {
        n: [
            *ternary_types(t.shape, rounded, ("row",), ("tied",), "f16"),
            *trellis_types(t.shape, coded, options.trellis, "f16"),
        ]
        for n, t in linears.items()
    }
    labels = [f"{n:g}" for n in (*rounded, *coded)]

    clock = time.perf_counter()
    predicted, _ = fisher_losses(graph, windows, candidates, few)
    seconds = {"predicted": time.perf_counter() - clock}
    clock = time.perf_counter()
    measured = measured_losses(graph, windows, [[name] for name in candidates], candidates, few)
    seconds["measured"] = time.perf_counter() - clock
    # [linears, options] each
    proxy, truth = (
        np.array([predicted[name] for name in candidates]),
        np.array(measured),
    )

    def rank(a, b) -> float:
        return float(np.asarray(spearmanr(a.ravel(), b.ravel()))[0])

    ranks = {"all nodes and options": rank(proxy, truth)}
    ranks |= {f"N = {n}": rank(proxy[:, i], truth[:, i]) for i, n in enumerate(labels)}
    ranks |= {
        f"N = {n} less N = {m}": rank(-np.diff(proxy)[:, i], -np.diff(truth)[:, i])
        for i, (n, m) in enumerate(pairwise(labels))
    }
    console = Console()
    table = Table(
        title=f"rank correlation; {seconds['predicted']:.0f} s predicted, "
        f"{seconds['measured']:.0f} s measured"
    )
    table.add_column("over")
    table.add_column("Spearman", justify="right")
    for title, value in ranks.items():
        table.add_row(title, f"{value:.3f}")
    console.print(table)

    quantized = quantized_candidates(graph, windows, candidates)
    weights = [dense_weights(unit.nodes) for unit in graph.units]
    part = windows[: windows_holding(few, options.context)]
    exact = [np.asarray(found) for found in logits(graph, weights, part)]
    count, rows = sum(t.shape[0] * t.shape[1] for t in linears.values()), []
    for bits in budgets:
        row = {"bits": float(bits)}
        for title, losses in (("predicted", proxy), ("measured", truth)):
            choices = [
                Choice(
                    (name,),
                    tuple(stored_bytes(t, DEFAULT_LAYOUT) for t in types),
                    tuple(map(float, loss)),
                )
                for (name, types), loss in zip(candidates.items(), losses, strict=True)
            ]
            taken = allocate(choices, int(bits * count / 8))
            chosen = zip(candidates, taken, strict=True)
            matrices = {name: quantized[name][option] for name, option in chosen}
            found = logits(graph, with_matrices(graph, weights, matrices), part)
            row[f"used, by {title}"] = 8 * total_bytes(choices, taken) / count
            row[f"sum, by {title}"] = total_loss(choices, taken)
            row[f"KL, by {title}"] = kl_divergence(exact, found) / part.size
        rows.append(row)
    table = Table(title="KL over budgets: allocated by predicted losses, and by measured ones")
    for title in rows[0]:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4f}" for value in row.values()))
    console.print(table)
    if options.json:
        write_json(options.json, {"ranks": ranks, "seconds": seconds, "budgets": rows})


if __name__ == "__main__":
    main()
