"""Compares pipelines on one model, in memory: study.py [MODEL TEXT].

MODEL is a Hugging Face folder or a .gguf file, TEXT is UTF-8; without them, a tiny random model of
the tests and random tokens. The command `atd study` does the same with recipes, files and a
picture."""

import sys
from pathlib import Path

import numpy as np

import atd
from atd.checkpoint.reader import open_tokenizer
from atd.runtime.compare import graph_size, read_tokens

TINY = Path(__file__).parents[1] / "tests/golden/llama_gqa"
path, *texts = sys.argv[1:] or [TINY]
source = atd.open(path)
dense = atd.load(source)
tokens = np.random.default_rng(0).integers(dense.vocabulary, size=1024)
if texts:
    tokens = read_tokens(Path(texts[0]), open_tokenizer(path), 4096)

print("bits   KL      top-1   pipeline")
for bases in 1, 2, 3:
    for group in 32, "row":
        options = f"bases = {bases}, group = {group!r}"
        graph = atd.Pipeline([f"decompose{{{options}}}", "pack"])(source)
        result = atd.evaluate(atd.load(graph), tokens, context=128, against=dense)
        bits, _ = graph_size(graph)
        print(f"{bits:.2f}   {result.kl_mean:.4f}  {result.top1_agreement:.1%}   {options}")
