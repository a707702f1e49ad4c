"""Writes checkpoints with random weights in the shapes of real models, and text for them.

Shards are written one unit at a time, so that a model of any size takes the memory of one matrix.
"""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from atd.checkpoint.writer import write_shard
from atd.ir import WeightRef
from atd.models import random_model
from atd.models.config import parse_config
from atd.models.llama import llama_graph
from atd.weights import Dense, DenseType

SHAPES = random_model.SHAPES | {
    "llama3-70b": random_model.SHAPES["llama3-8b"]
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
}
DECAY = 0.5  # singular values of a spectrum fall as 1 / rank^DECAY
LARGE, LARGE_FEATURES = 30.0, 4  # the size of some features of the embedding, and their number


def shapes(name: str, **changed: int) -> dict:
    """Returns config.json of these shapes, in the form that Hugging Face's folders have."""
    named = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    return SHAPES[name] | named | changed


def write_checkpoint(folder: Path, config: dict, *, spectrum: bool = False) -> int:
    """Writes a random checkpoint in bf16; returns the number of weights of its blocks' linears.

    Args:
        folder: is made.
        config: as in config.json.
        spectrum: give the embedding's features sizes that fall like a power law, LARGE_FEATURES
            large ones among them, and the outputs of each linear likewise: second moments of all
            inputs then have eigenvalues that fall. Without, entries are independent, with a
            deviation of 0.02.
    """
    rng = np.random.default_rng(0)

    def matrix(tensor: str, out: int, inputs: int) -> np.ndarray:
        values = rng.standard_normal((out, inputs), np.float32)
        if not spectrum:
            return np.float32(0.02) * values
        count = inputs if "embed" in tensor else out
        sizes = rng.permutation((1 + np.arange(count, dtype=np.float32)) ** -DECAY)
        sizes /= np.sqrt(np.mean(np.square(sizes)))
        if "embed" in tensor:
            sizes[:LARGE_FEATURES] = LARGE
            return values * sizes
        return values * sizes[:, None] / np.float32(math.sqrt(inputs))

    def reference(tensor: str, *shape: int) -> WeightRef:
        def load() -> Dense:
            values = matrix(tensor, *shape) if len(shape) == 2 else np.ones(shape, np.float32)
            return Dense(values.astype(ml_dtypes.bfloat16))

        return WeightRef(tensor, DenseType(shape, "bf16"), load)

    graph = llama_graph(config, parse_config(config, folder), reference)
    folder.mkdir(parents=True)
    weight_map = {}
    for i, unit in enumerate(graph.units):
        shard = f"model-{i:05d}.safetensors"
        refs = [ref for node in unit.nodes for ref in node.weights.values()]
        weight_map |= dict.fromkeys(write_shard(folder / shard, refs), shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    linears = [n for block in graph.blocks for n in block.nodes if n.op == "linear"]
    return sum(math.prod(node.weights["weight"].type.shape) for node in linears)


def write_words(folder: Path, vocabulary: int) -> None:
    """Writes a tokenizer whose tokens are the words w0, w1, ..."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, "w0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))


def write_text(file: Path, vocabulary: int, tokens: int) -> Path:
    """Writes random words in the frequencies of Zipf's law; returns the file."""
    odds = 1 / np.arange(1, vocabulary + 1)
    ids = np.random.default_rng(1).choice(vocabulary, tokens, p=odds / odds.sum())
    file.write_text(" ".join(f"w{i}" for i in ids))
    return file
