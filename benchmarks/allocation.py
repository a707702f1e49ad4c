"""How good predictions of KL are: against measured KL, by node and option and over ten budgets.

    python benchmarks/allocation.py MODEL --data TEXT [--json FILE]    stories15M: five minutes
    python benchmarks/allocation.py MODEL --data TEXT --trellis default    with trellis codes
    python benchmarks/allocation.py MODEL --data TEXT --budgets-only   whole models alone
    python benchmarks/allocation.py MODEL --data TEXT --tiny           less of all, for CI

Rank correlations are over every linear and N = 1, 2, 3, rotated, tied, one scale per row, or over N
= 1 and those of the trellis codes; every linear is a choice of its own. Models for the budgets are
made by error feedback under the dense model's moments, and measured on the calibration text: what
is judged is the prediction. «4 KL of half» is four times the KL of a model with half of each error:
the KL itself, where second order holds.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
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
from atd.calibration.sensitivity import Candidates, fisher_losses
from atd.calibration.windows import cut_windows, windows_holding
from atd.checkpoint.files import read_text, write_json
from atd.checkpoint.reader import open_tokenizer
from atd.decomposition.allocation import Choice, allocate, total_bytes, total_loss
from atd.decomposition.options import stored_bytes, ternary_types, trellis_types
from atd.decomposition.trellis_codes import BASES
from atd.ir import Graph
from atd.models import frontend
from atd.models.execute import dense_weights
from atd.pipeline import Pipeline
from atd.weights import Dense
from atd.weights.layouts import DEFAULT_LAYOUT

BUDGETS = np.linspace(2.25, 4.5, 10).tolist()  # bits per weight


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
    parser.add_argument("--budgets-only", action="store_true", help="measure no matrix by itself")
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

    console, figures = Console(), {}
    clock = time.perf_counter()
    predicted = fisher_losses(graph, windows, candidates, few).losses
    seconds = {"predicted": time.perf_counter() - clock}
    losses = {"predicted": np.array([predicted[name] for name in candidates])}  # [linears, options]
    if not options.budgets_only:
        clock = time.perf_counter()
        measured = measured_losses(graph, windows, [[name] for name in candidates], candidates, few)
        seconds["measured"] = time.perf_counter() - clock
        losses["measured"] = np.array(measured)
        figures["ranks"] = rank_correlations(losses["predicted"], losses["measured"], labels)
        table = Table("over", "Spearman", title="rank correlation")
        for title, value in figures["ranks"].items():
            table.add_row(title, f"{value:.3f}")
        console.print(table)
    console.print(", ".join(f"{title} in {found:.0f} s" for title, found in seconds.items()))
    part = windows[: windows_holding(few, options.context)]
    rows = over_budgets(graph, windows, part, candidates, losses, budgets)
    table = Table(title="KL over budgets")
    for title in rows[0]:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4f}" for value in row.values()))
    console.print(table)
    if options.json:
        write_json(options.json, figures | {"seconds": seconds, "budgets": rows})


def rank_correlations(
    predicted: np.ndarray, measured: np.ndarray, labels: Sequence[str]
) -> dict[str, float]:
    """Spearman's over all losses [linears, options], by option, and of the steps between them."""

    def rank(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.asarray(spearmanr(a.ravel(), b.ravel()))[0])

    ranks = {"all nodes and options": rank(predicted, measured)}
    ranks |= {f"N = {n}": rank(predicted[:, i], measured[:, i]) for i, n in enumerate(labels)}
    return ranks | {
        f"N = {n} less N = {m}": rank(-np.diff(predicted)[:, i], -np.diff(measured)[:, i])
        for i, (n, m) in enumerate(pairwise(labels))
    }


def over_budgets(
    graph: Graph,
    windows: np.ndarray,
    part: np.ndarray,
    candidates: Candidates,
    losses: Mapping[str, np.ndarray],
    budgets: Sequence[float],
) -> list[dict[str, float]]:
    """A row for each budget: bits, predicted and measured KL of models allocated by these losses.

    Args:
        part: the windows that the KL is measured on.
        losses: by their names, [linears, options].
        budgets: bits per weight.
    """
    count = sum(math.prod(types[0].shape) for types in candidates.values())
    sizes = [tuple(stored_bytes(t, DEFAULT_LAYOUT) for t in ts) for ts in candidates.values()]
    choices = {
        by: [
            Choice((name,), size, tuple(map(float, loss)))
            for name, size, loss in zip(candidates, sizes, found, strict=True)
        ]
        for by, found in losses.items()
    }
    taken = {
        (bits, by): allocate(found, int(bits * count / 8))
        for bits in budgets
        for by, found in choices.items()
    }
    used = {
        name: sorted({chosen[i] for chosen in taken.values()}) for i, name in enumerate(candidates)
    }
    types = {name: [candidates[name][option] for option in used[name]] for name in candidates}
    quantized = quantized_candidates(graph, windows, types)
    dense = [dense_weights(unit.nodes) for unit in graph.units]
    matrices = {
        unit.full_name(node): weights[node.name]["weight"].dequantize()
        for unit, weights in zip(graph.units, dense, strict=True)
        for node in unit.nodes
        if unit.full_name(node) in candidates
    }
    exact = [np.asarray(found) for found in logits(graph, dense, part)]

    def kl(chosen: Sequence[int], share: float) -> float:
        """KL of the model with this share of the errors of these options."""
        changed = {}
        for name, option in zip(candidates, chosen, strict=True):
            found = quantized[name][used[name].index(option)].dequantize()
            changed[name] = Dense(jnp.asarray(matrices[name] + share * (found - matrices[name])))
        found = logits(graph, with_matrices(graph, dense, changed), part)
        return kl_divergence(exact, found) / part.size

    rows = []
    for bits in budgets:
        row = {"bits": float(bits)}
        for by in losses:
            chosen = taken[bits, by]
            row[f"used, by {by}"] = 8 * total_bytes(choices[by], chosen) / count
            row[f"sum, by {by}"] = total_loss(choices[by], chosen)
            row[f"KL, by {by}"] = kl(chosen, 1.0)
            row[f"4 KL of half, by {by}"] = 4 * kl(chosen, 0.5)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
