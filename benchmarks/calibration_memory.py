"""Peak memory of calibrated conversions of random models, over tokens, depth and limits.

    python benchmarks/calibration_memory.py --hidden 1024 --mlp 4096 --tokens 4096 32768
    python benchmarks/calibration_memory.py --hidden 1024 --mlp 4096 --tokens 32768 --limits 1.2GB

Each conversion is a process of its own, and its peak is the resident memory that the system counts
for it, files that are mapped included. «Predicted» is what `atd convert` says before it begins, no
more than its limit. Weights are random, the text is random words in the frequencies of Zipf's law.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_checkpoint import shapes, write_checkpoint, write_text, write_words
from rich.console import Console
from rich.table import Table

from atd.calibration.memory import memory
from atd.decomposition.allocation import parse_bytes
from atd.models import frontend

VOCABULARY = 4096
HEAD = 64  # features of a head
CONTEXT = 512  # tokens of a window


def random_model(folder: Path, hidden: int, mlp: int, layers: int) -> Path:
    """Writes a Llama with random weights and a tokenizer of words."""
    heads = hidden // HEAD
    sizes = {"vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": mlp}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": heads // 4, "max_position_embeddings": CONTEXT}
    write_checkpoint(folder, shapes("llama-3.2-1b", **sizes))
    write_words(folder, VOCABULARY)
    return folder


def peak(command: list[str]) -> tuple[float, float]:
    """(peak resident bytes, seconds) of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return 1024.0 * used.ru_maxrss, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=4096)
    parser.add_argument("--layers", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--limits", nargs="+", default=[], help="like 2GB; also without one")
    parser.add_argument("--recipe", default="ternary2")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    table = Table("blocks", "tokens", "limit", "predicted", "peak", "seconds")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = write_text(folder / "text.txt", VOCABULARY, max(options.tokens))
        for layers in options.layers:
            model = random_model(folder / f"{layers}", options.hidden, options.mlp, layers)
            for tokens in options.tokens:
                needed = memory(frontend.open(model), tokens, CONTEXT)
                everything = needed.work + needed.streams + needed.inner
                for limit in ["", *options.limits]:
                    command = [sys.executable, "-m", "atd", "convert", str(model)]
                    command += [str(folder / "out"), "--overwrite", "--quiet"]
                    command += ["--recipe", options.recipe, "--calib", str(text)]
                    command += ["--calibration-tokens", str(tokens)]
                    command += [part for one in options.overrides for part in ("--set", one)]
                    command += ["--memory", limit] if limit else []
                    found, seconds = peak(command)
                    predicted = min(everything, parse_bytes(limit) if limit else everything)
                    figures = (f"{bytes / 1e9:.2f} GB" for bytes in (predicted, found))
                    table.add_row(
                        f"{layers}", f"{tokens:,}", limit or "none", *figures, f"{seconds:.0f}"
                    )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
