"""What a GGUF file says of a model besides its weights and its vocabulary.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType

from atd.errors import BadInput
from atd.ir import Block, Graph, WeightRef
from atd.ir.rewrite import joined_parts
from atd.models.config import ModelConfig, parse_config
from atd.models.llama import llama_graph
from atd.models.rope import rope_frequencies
from atd.progress import Say
from atd.weights import DenseType, Weight

# Of Hugging Face's model_type, where llama.cpp computes the same.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "TQ2_0": LlamaFileType.MOSTLY_TQ2_0,
}


def architecture_of(graph: Graph) -> tuple[str, ModelConfig]:
    """Returns llama.cpp's name for the architecture of a graph, and its config.

    Raises:
        BadInput: llama.cpp has no architecture that computes this graph.
    """
    family = graph.config.get("model_type")
    if family not in ARCHITECTURES:
        raise BadInput(
            f"a model of type {family!r} cannot be exported as GGUF; those that can: "
            f"{', '.join(ARCHITECTURES)}"
        )
    config = parse_config(graph.config, "the model")

    def reference(tensor: str, *shape: int) -> WeightRef:
        return WeightRef(tensor, DenseType(shape, "f32"), _no_data)

    expected = llama_graph(graph.config, config, reference)
    for found, plain in zip(graph.units, expected.units, strict=True):
        differing = _nodes(found).items() ^ _nodes(plain).items()
        if differing:
            name = f"{found.name}.{min(differing)[0]}".strip(".")
            raise BadInput(
                f"{name} is not what llama.cpp's architecture {ARCHITECTURES[family]} computes "
                "there; export with --to hf"
            )
    return ARCHITECTURES[family], config


def _no_data() -> Weight:
    raise AssertionError("a graph that is compared has no data")


def _nodes(block: Block) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> (op, inputs), joined linears apart."""
    found = {}
    for node in block.nodes:
        slices = joined_parts(block, node)
        for part in slices or [node]:
            if slices or node.op != "slice":
                found[part.name] = (node.op, node.inputs)
    return found


def add_metadata(
    writer: GGUFWriter, graph: Graph, config: ModelConfig, name: str, say: Say
) -> np.ndarray | None:
    """Adds the hyperparameters of a graph to a writer.

    Returns:
        The divisors of the rope frequencies, float32 [head_dim / 2], which are a tensor of the
        file; None where there are none.

    Raises:
        BadInput: layers differ in what a GGUF file has one value for.
    """
    writer.add_name(name)
    writer.add_context_length(_context(graph, say))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(graph.blocks))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(graph.vocabulary)
    writer.add_layer_norm_rms_eps(_one(graph, "rms_norm", "eps"))
    theta, scaling = _one(graph, "rope", "theta"), _one(graph, "rope", "scaling")
    writer.add_rope_freq_base(theta)
    match scaling:
        case ():
            return None
        case ("linear", factor):
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(factor)
            return None
        case ("llama3", _, _, _, original) if writer.arch == "llama":
            writer.add_rope_scaling_orig_ctx_len(original)
            plain = rope_frequencies(config.head_dim, theta, ())
            return plain / rope_frequencies(config.head_dim, theta, tuple(scaling))
    raise BadInput(
        f"rope scaling {scaling[0]!r} has no form in GGUF files of architecture {writer.arch}"
    )


def _one(graph: Graph, op: str, attr: str) -> Any:
    """The value of an attr that all nodes of an op share."""
    values = {node.attrs[attr] for _, node in graph.nodes() if node.op == op}
    if len(values) != 1:
        raise BadInput(
            f"{attr} of {op} differs between layers ({sorted(values, key=str)}), and a GGUF file "
            "has one value for all"
        )
    return values.pop()


def _context(graph: Graph, say: Say) -> int:
    """The context length; no longer than a window of attention, which llama.cpp does not have."""
    context = graph.config.get("max_position_embeddings") or 2048
    windows = [node.attrs["window"] for _, node in graph.nodes() if node.op == "attention"]
    window = min((w for w in windows if w), default=0)
    if 0 < window < context:
        say(
            f"note: llama.cpp attends to all of the past in models of this kind, which have a "
            f"window of {window} tokens: the context length is cut to that"
        )
        return window
    return context


def add_file_type(writer: GGUFWriter, kinds: Sequence[tuple[GGMLQuantizationType, int]]) -> None:
    """Adds the type that most weights have, of (type, number of weights)."""
    count: Counter[str] = Counter()
    for kind, weights in kinds:
        count[kind.name] += weights
    writer.add_file_type(_FILE_TYPES[count.most_common(1)[0][0]])
    writer.add_quantization_version(2)
