"""Writes a pass, which sets the smallest weights to zero, and runs it: custom_pass.py [MODEL].

MODEL is a Hugging Face folder or a .gguf file; without it, a tiny random model of the tests.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import atd
from atd.weights import Dense, DenseType

TINY = Path(__file__).parents[1] / "tests/golden/llama_gqa"


@dataclass(frozen=True, kw_only=True)
class Prune(atd.Pass):
    name = "prune"
    scope = "node"
    share: float = 0.1  # an option; written as prune{share = 0.1}

    def rewrite(self, name, node, context):
        if node.op != "linear" or not node.is_dense_matrix:
            return None  # not ours
        ref = node.weights["weight"]

        def load():  # runs when somebody needs the data
            array = ref.load().dequantize()
            return Dense(np.where(abs(array) < np.quantile(abs(array), self.share), 0, array))

        made = replace(ref, type=DenseType(ref.type.shape, "f32"), load=load)
        return replace(node, weights=node.weights | {"weight": made})


graph = atd.open(sys.argv[1] if len(sys.argv) > 1 else TINY)
graph = atd.Pipeline([Prune(share=0.5), "decompose{bases = 1}", "pack"])(graph)
print(graph.blocks[0], atd.load(graph)([[1, 2, 3]]), sep="\n")  # the logits last
