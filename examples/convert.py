"""Converts a checkpoint and shows where its bytes and its errors are: convert.py [MODEL [RECIPE]].

MODEL is a Hugging Face folder or a .gguf file; without it, a tiny random model of the tests.
"""

import json
import sys
import tempfile
from pathlib import Path

import atd

TINY = Path(__file__).parents[1] / "tests/golden/llama_gqa"
model, recipe = (*sys.argv[1:], *(TINY, "datafree2")[len(sys.argv) - 1 :])

with tempfile.TemporaryDirectory() as folder:
    out = atd.convert(model, Path(folder) / "out", recipe)
    for row in json.loads((out / "report.json").read_text())["nodes"]:
        error = "dense" if row["error"] is None else f"relative error {row['error']:.3f}"
        print(f"{row['node']:40} {row['bits']:5.2f} bits per weight, {error}")
    tokens = atd.generate(atd.load(out), [1, 2, 3], max_new_tokens=8)
    print(f"After the tokens 1, 2, 3 it writes {tokens}.")
