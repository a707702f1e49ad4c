"""What rounding activations costs a converted model: its KL divergence from the dense one.

    python benchmarks/activations.py CONVERTED --against DENSE --data TEXT [--tokens 2048]

Activations are exact, in 16 bits, or in the fixed point of the GPU kernels
(`atd.kernels.prefixes`), whose default is the row "fixed point, 18 to 22 bits". Runs on a CPU: the
rounding alone is the GPU's, one token at a time as there; products are float32.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from atd.checkpoint.files import read_text, write_json
from atd.checkpoint.reader import open_tokenizer
from atd.kernels import matmul, prefixes, xla
from atd.models.frontend import open as open_model
from atd.models.model import Model, load
from atd.reports.progress import shown
from atd.runtime.evaluate import evaluate
from atd.weights import Packed, TernaryType, Weight, ternary_of


@dataclass(frozen=True)
class Rounded:
    """A backend of `atd.kernels.matmul`: XLA's product of activations that were rounded before."""

    round: Callable[[jax.Array, Weight], jax.Array]

    def supports(self, x: jax.Array, weight: Weight) -> str | None:
        return None if isinstance(weight, Packed) else "weights have to be packed"

    def matmul(self, x: jax.Array, weight: Weight) -> jax.Array:
        return xla.matmul(self.round(x, weight), weight)


def fixed_point(x: jax.Array, limit: int) -> jax.Array:
    """x [M, in] as `prefixes.fold` takes it: integers up to limit in units of each token's largest
    / limit."""
    rounded, largest = prefixes.integers(x, limit)
    return rounded * (largest / limit)[:, None]


def limit_of(weight: Weight) -> int:
    ternary = ternary_of(weight.type)
    assert isinstance(ternary, TernaryType)
    return prefixes.plan(ternary.bases, ternary.tied).limit


ROUNDINGS = {
    "float32": Rounded(lambda x, weight: x),
    "fixed point, 18 to 22 bits": Rounded(lambda x, weight: fixed_point(x, limit_of(weight))),
    "float16": Rounded(lambda x, weight: x.astype(jnp.float16).astype(jnp.float32)),
    "bfloat16": Rounded(lambda x, weight: x.astype(jnp.bfloat16).astype(jnp.float32)),
    "fixed point, 14 bits": Rounded(lambda x, weight: fixed_point(x, 2**13 - 1)),
    "int8": Rounded(lambda x, weight: fixed_point(x, 127)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("converted", type=Path)
    parser.add_argument("--against", type=Path, required=True, help="the dense model")
    parser.add_argument("--data", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    dense, graph = load(arguments.against), open_model(arguments.converted)
    ids = open_tokenizer(arguments.converted).encode(read_text(arguments.data))[: arguments.tokens]
    matmul.BACKENDS.update(ROUNDINGS)
    rows = []
    with shown(console) as (_, progress):
        for name in ROUNDINGS:
            model = Model(graph, "xla", name, "float32")
            result = evaluate(
                model, ids, context=arguments.context, against=dense, progress=progress
            )
            rows.append(
                {
                    "activations": name,
                    "perplexity": result.perplexity,
                    "kl_mean": result.kl_mean,
                    "top1": result.top1_agreement,
                }
            )
    table = Table("activations", "perplexity", "KL", "KL against float32", "top-1", box=SIMPLE_HEAD)
    for row in rows:
        change = f"{row['kl_mean'] / rows[0]['kl_mean'] - 1:+.4%}"
        table.add_row(
            row["activations"],
            f"{row['perplexity']:.4f}",
            f"{row['kl_mean']:.6f}",
            change,
            f"{row['top1']:.2%}",
        )
    console.print(table)
    if arguments.json:
        write_json(arguments.json, {"converted": str(arguments.converted), "rows": rows})


if __name__ == "__main__":
    main()
