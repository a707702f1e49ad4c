"""Exported GGUF files in llama.cpp itself: the perplexity that we measure of the same file.

Its tool `llama-perplexity` is looked for in the folder $ATD_LLAMA_CPP, where `make llama-cpp` puts
it, and on PATH.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from atd.checkpoint.files import read_text
from atd.checkpoint.reader import open_tokenizer
from atd.exports.gguf import export_gguf
from atd.models.model import load
from atd.pipeline.convert import convert
from atd.runtime.compare import read_tokens
from atd.runtime.evaluate import evaluate

pytestmark = pytest.mark.slow
TOKENS = 2048
TIED = ["decompose.scales=tied"]


@pytest.fixture(scope="session")
def llama_perplexity() -> str:
    built = Path(__file__).parents[2] / ".llama-cpp" / "build" / "bin"
    folders = (os.environ.get("ATD_LLAMA_CPP"), str(built), os.environ["PATH"])
    tool = shutil.which("llama-perplexity", path=os.pathsep.join(filter(None, folders)))
    if tool is None:
        pytest.skip("llama-perplexity is not there: make llama-cpp")
    return tool


def theirs(tool: str, file: Path, text: Path, context: int) -> float:
    command = [tool, "-m", str(file), "-f", str(text), "-c", str(context), "-t", "2"]
    command += ["--chunks", str(TOKENS // context)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    assert found is not None, done.stderr[-2000:]
    return float(found[1])


def ours(model: Path, text: Path, context: int) -> float:
    words = open_tokenizer(model)
    tokens = read_tokens(text, words, TOKENS)
    bos = words.bos_id if words.adds_bos else None
    options = {"context": context, "bos_id": bos, "convention": "llama.cpp"}
    return evaluate(load(model), tokens, **options).perplexity


def check(tool: str, source: Path, recipe: str, options, text: Path, context: int, folder: Path):
    """Converts and exports a model, and compares the perplexities of both sides.

    llama.cpp rounds activations to 8 bits in front of each product with blocks of integers.
    """
    plain = folder / "text.txt"
    plain.write_text(read_text(text))  # line ends as we read them
    model = convert(source, folder / "out", recipe, overrides=options, say=lambda line: None)
    file = export_gguf(model, folder / "model.gguf", say=lambda line: None)
    expected = ours(file, plain, context)
    assert theirs(tool, file, plain, context) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("recipe", "options"), [("datafree2", TIED), ("rotated2", [])])
def test_stories15m(llama_perplexity, stories15m, shared_data, tmp_path, recipe, options):
    """Exact, and rounded to 8 bits."""
    text = shared_data / "text" / "tinystories_valid_30k.txt"
    check(llama_perplexity, stories15m, recipe, options, text, 256, tmp_path)


def test_smollm2(llama_perplexity, smollm2, shared_data, tmp_path):
    text = shared_data / "text" / "wikitext2_raw_test.txt"
    check(llama_perplexity, smollm2, "datafree3", TIED, text, 512, tmp_path)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_type_of_block(llama_perplexity, stories15m, shared_data, tmp_path, n):
    """TQ2_0 and Q4_0, Q4_0, Q5_0, Q8_0, with all matrices alike."""
    text = shared_data / "text" / "tinystories_valid_30k.txt"
    options = [*TIED, f"decompose.bases={n}", "decompose.group=row"]
    check(llama_perplexity, stories15m, "datafree2", options, text, 256, tmp_path)
