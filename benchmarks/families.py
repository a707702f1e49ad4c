"""Model families: logits against those of transformers, and what a conversion at 3.3 bits loses.

    python benchmarks/families.py

The models are the tiny random ones of tests/golden, with the logits of transformers beside them.
The largest difference is over the largest logit. The conversion is `adaptive` without trellis codes
(matrices have too few rows for them), on 2,048 tokens that the model writes itself; its KL
divergence is the mean over the golden tokens. Random models say whether a family is converted as
well as the others, and nothing of what real ones lose.
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from atd.models.model import load
from atd.pipeline.convert import convert
from atd.pipeline.recipe import read_recipe

GOLDEN = Path(__file__).parents[1] / "tests/golden"
FAMILIES = ("llama32", "llama_yarn", "mistral", "qwen2", "qwen3", "smollm3", "phi3")
FAMILIES += ("granite", "olmo2", "gemma2", "gemma3")
QUICK = ["allocate.bases=[1, 2, 3]", "allocate.embedding_bases=[1, 2, 3]", "allocate.trellis=''"]


def converted(name: str, bits: float, folder: Path) -> Path:
    """The converted model of a golden folder, which gets a tokenizer of words."""
    source = folder / name
    shutil.copytree(GOLDEN / name, source)
    words = {f"w{i}": i for i in range(64)}
    Tokenizer(WordLevel(words, "w0")).save(str(source / "tokenizer.json"))
    recipe = read_recipe("adaptive", [f"allocate.bits={bits}", "calibrate.steps=0", *QUICK])
    recipe = replace(recipe, calibration_tokens=2048)
    quiet = {"say": lambda line: None, "cache": folder / "cache"}
    return convert(source, folder / f"{name}-out", recipe, **quiet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", default=FAMILIES, help="folders of tests/golden")
    parser.add_argument("--bits", type=float, default=3.3)
    options = parser.parse_args()
    table = Table("family", "largest difference", f"KL at {options.bits:g} bits", "top-1")
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.families:
            golden = np.load(GOLDEN / name / "logits.npz")
            tokens, wanted = golden["tokens"], golden["logits"]
            dense = np.asarray(load(GOLDEN / name, dtype="float32")(tokens))
            error = np.abs(dense - wanted).max() / np.abs(wanted).max()
            model = load(converted(name, options.bits, Path(temporary)), dtype="float32")
            logp, logq = (jax.nn.log_softmax(x) for x in (dense, model(tokens)))
            kl = float((np.exp(logp) * (logp - logq)).sum(-1).mean())
            agree = float((logp.argmax(-1) == logq.argmax(-1)).mean())
            table.add_row(name, f"{error:.1e}", f"{kl:.4f}", f"{agree:.1%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
