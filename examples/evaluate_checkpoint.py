"""Evaluates a converted checkpoint against its source: evaluate_checkpoint.py [OUT SOURCE TEXT].

OUT is a folder that atd made, SOURCE the model it was made from, TEXT is UTF-8. Without them, it
converts a tiny random model of the tests and evaluates it on random tokens.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import atd
from atd.checkpoint.reader import open_tokenizer
from atd.runtime.compare import read_tokens

TINY = Path(__file__).parents[1] / "tests/golden/llama_gqa"


def evaluate(out: Path, source: Path, tokens: np.ndarray, context: int) -> None:
    result = atd.evaluate(atd.load(out), tokens, context=context, against=atd.load(source))
    print(f"perplexity {result.perplexity:.3f}, dense {result.against_perplexity:.3f}")
    print(f"KL(dense || converted) {result.kl_mean:.4f} nats, 99 % quantile {result.kl_99:.4f}")
    print(f"top-1 agreement {result.top1_agreement:.1%} ({result.conditions()})")


if len(sys.argv) > 1:
    out, source, text = map(Path, sys.argv[1:])
    evaluate(out, source, read_tokens(text, open_tokenizer(source)), context=512)
else:
    with tempfile.TemporaryDirectory() as folder:
        out = atd.convert(TINY, Path(folder) / "out", "datafree3")
        evaluate(out, TINY, np.random.default_rng(0).integers(64, size=1024), context=128)
