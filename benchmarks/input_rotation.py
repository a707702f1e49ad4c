"""What a rotation of down's inputs gains: the loss tr(dW H dW') with and without it.

    python benchmarks/input_rotation.py MODEL --data TEXT [--blocks 2 10 20] [--json FILE]

Silu does not commute with a rotation, so that `rotate.r3` runs a Hadamard transform with the model.
Here W and the second moment H of its inputs are both rotated by a random Hadamard matrix R as wide
as they are, W R and R'H R, and W gets its default trellis code by error feedback. Beside it stands
what costs nothing at run time: columns scaled to the same size, divided out of the rows of up_proj.

Every other window is held out: the trits are found under H of one half, and judged under that of
the other as well. Figures are losses over that of W as it is.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from atd.calibration.moments import dense_moments
from atd.calibration.windows import cut_windows
from atd.checkpoint.files import read_text, write_json
from atd.checkpoint.reader import open_tokenizer
from atd.decomposition import error_feedback, quantize
from atd.decomposition.options import trellis_type
from atd.decomposition.rotations import random_rotation
from atd.decomposition.second_moments import proxy_loss
from atd.decomposition.trellis_codes import known_code
from atd.ir import Graph
from atd.models import frontend
from atd.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="calibration text")
    parser.add_argument("--tokens", type=int, default=16384, help="of the text, both halves")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--blocks", type=int, nargs="+", help="numbers of blocks; default: all")
    parser.add_argument("--bases", type=float, default=2, help="N of the code")
    parser.add_argument("--damping", type=float, default=0.3, help="of H, as `decompose` takes it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    graph = Pipeline(["fold_norms", "rotate"])(frontend.open(options.model))
    ids = open_tokenizer(options.model).encode(read_text(options.data))
    windows = cut_windows(np.asarray(ids, np.int32), options.tokens, options.context, options.data)
    blocks = range(len(graph.blocks)) if options.blocks is None else options.blocks
    names = [f"{graph.blocks[i].name}.mlp.down_proj" for i in blocks]
    found, held_out = (moments_of(graph, half, names) for half in (windows[::2], windows[1::2]))
    rows = []
    for name in names:
        weight, hessian = found[name]
        rows.append({"node": name} | gains(weight, hessian, held_out[name][1], options))
        print(rows[-1], flush=True)
    table = Table(title=f"loss over that of W as it is, N = {options.bases:g}")
    for title in rows[0]:
        table.add_column(title, justify="left" if title == "node" else "right")
    for row in rows:
        table.add_row(row["node"], *(f"{v:.3f}" for k, v in row.items() if k != "node"))
    Console().print(table)
    if options.json:
        write_json(options.json, {"rows": rows})


def moments_of(
    graph: Graph, windows: np.ndarray, names: Iterable[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(W, H) of each of these linears; blocks behind the last of them are not run."""
    found, wanted = {}, set(names)
    for unit, weights, _, moments in dense_moments(graph, windows, wanted):
        for value, hessian in moments.items():
            for node in unit.readers(value):
                if (name := unit.full_name(node)) in wanted:
                    weight = np.asarray(weights[node.name]["weight"].dequantize())
                    found[name] = weight, hessian
        if len(found) == len(wanted):
            break
    return found


def gains(weight, hessian, held_out, options) -> dict[str, float]:
    """Losses of W rotated, and of W with columns of one size, over that of W as it is."""
    rotation = random_rotation(np.random.default_rng(0), weight.shape[1])
    size = np.sqrt(np.maximum(np.mean(np.square(weight), axis=0), 1e-30))
    scale = size / np.exp(np.mean(np.log(size)))  # of the columns: W diag(1/c), c x

    def rotated(matrix):
        return rotation.apply(matrix).astype(np.float32)

    ways = {
        "as it is": (weight, hessian, held_out),
        "rotated": (rotated(weight), *(rotated(rotated(h).T) for h in (hessian, held_out))),
        "scaled": (weight / scale, *(h * scale * scale[:, None] for h in (hessian, held_out))),
    }
    type = trellis_type(weight.shape, known_code(options.bases), "f16")
    assert type is not None, "too few rows for this code"
    losses = {}
    for way, (w, h, other) in ways.items():
        factor = error_feedback.factor(h, options.damping)
        made = quantize.calibrated(w, type, factor, h, sweeps=1, refits=2)
        error = w - np.asarray(made.dequantize())
        losses[way] = [float(proxy_loss(error, moment).sum()) for moment in (h, other)]
    plain = losses.pop("as it is")
    return {
        f"{way}, {text}": loss / before
        for way, both in losses.items()
        for text, loss, before in zip(("calibration", "held out"), both, plain, strict=True)
    }


if __name__ == "__main__":
    main()
