"""Models with random weights in the shapes of real ones, made on the device as they are loaded: for
measuring speed.

q, k and v are one matrix, and gate and up, in dense and in packed models alike, as `fuse` leaves
them.
"""

import numpy as np

from atd.decomposition.options import trellis_type
from atd.decomposition.trellis_codes import known_code
from atd.errors import BadInput, nearest
from atd.ir import Graph, WeightRef, in_memory
from atd.kernels.tuning.samples import random_weight
from atd.models.config import parse_config
from atd.models.llama import llama_graph
from atd.weights import Code, Dense, DenseType, PackedType, TernaryType

LAYOUT = "tiles"  # which the GPU kernels read as it lies
SHAPES: dict[str, dict] = {  # what config.json says of each
    "llama3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}


def named_graph(name: str) -> Graph:
    """Returns a model in the shapes of SHAPES[name], two bases and a trellis code in each matrix.

    Raises BadInput for an unknown name.
    """
    if name not in SHAPES:
        raise BadInput(f"there are no shapes of {name!r}{nearest(name, SHAPES)}")
    return random_graph(SHAPES[name], code=known_code(2))


def random_graph(
    config: dict, bases: int | None = None, *, code: Code | None = None, layout: str = LAYOUT
) -> Graph:
    """Builds a model with random matrices and gains of ones.

    Args:
        config: as in config.json; SHAPES has some.
        bases: N of all matrices, embedding and head included: ternary with tied scales, one per
            row, packed. None: dense, in bf16.
        code: a trellis code of all matrices, instead of bases.
        layout: of packed matrices; by default the one that the GPU kernels read.
    """
    seeds = iter(range(1 << 30))

    def reference(tensor: str, *shape: int) -> WeightRef:
        if len(shape) == 1:
            return in_memory(tensor, Dense(np.ones(shape, np.float32)))
        (out, inputs), seed = shape, next(seeds)
        if code is not None:
            ternary = trellis_type(shape, code, "f16")
            assert ternary is not None, "a matrix has fewer rows than a trit of the code counts in"
        elif bases is not None:
            ternary = TernaryType((out, inputs), bases, "row", True, "f16")
        else:
            dense = DenseType(shape, "bf16")
            return WeightRef(tensor, dense, lambda: random_weight(dense, seed))
        packed = PackedType(ternary, layout)
        return WeightRef(tensor, packed, lambda: random_weight(ternary, seed, layout))

    model = parse_config(config, "a random model")
    return llama_graph(config, model, reference, fused=True)
