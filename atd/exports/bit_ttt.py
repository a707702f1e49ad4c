"""Exports models of one scale per base and tensor for Bit-TTT-Engine (`atd.models.bit_ttt`)."""

import json
from pathlib import Path

import numpy as np

from atd.checkpoint.folder import CARD, check_target
from atd.checkpoint.hub import local
from atd.checkpoint.writer import Entry
from atd.errors import BadInput
from atd.exports.absorb import absorb
from atd.exports.folder import write_folder
from atd.exports.planes import (
    check_planes,
    dense_entry,
    dense_parts,
    difference,
    linear_parts,
    planes,
)
from atd.ir import Graph, WeightRef
from atd.ir.rewrite import float_inputs
from atd.models import frontend
from atd.models.bit_ttt import EPS, LAYOUT, MOST_BASES, NAMES
from atd.models.config import GRANITE, parse_config
from atd.models.llama import HEAD
from atd.pipeline.card import bit_ttt_card
from atd.pipeline.output import tokenizer_files
from atd.progress import Report, Say, unheard
from atd.weights import TernaryType, ternary_of

WAY = (
    "convert the dense model with atd convert MODEL OUT --recipe greedy3 (three bases, one scale "
    "per base and matrix; --set decompose.bases=2 for two)"
)


def export_bit_ttt(
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    ignore_extra: bool = False,
    say: Say = print,
    progress: Report = unheard,
) -> Path:
    """Writes a model as a folder of Bit-TTT-Engine and returns that folder.

    The folder has config.json, one model.safetensors with a head of its own, and the tokenizer.

    Args:
      model: a checkpoint whose decoder's linears are ternary with one scale per base and tensor.
      out: the folder to write.
      overwrite: replace `out` if atd made it.
      ignore_extra: leave out tensors of `model` that are not part of its architecture.

    Raises BadInput, before anything is written, for a model that the engine does not run.
    """
    source, target = Path(model), Path(out).absolute()
    graph = frontend.open(source, ignore_extra=ignore_extra)
    check_planes(graph, "bit-ttt", tuple(range(1, MOST_BASES + 1)), WAY)
    graph = absorb(graph)
    config = _config(graph, source)
    check_target(target, local(source), overwrite)
    tokenizer = tokenizer_files(source, say)
    if any("activations" in node.attrs for _, node in graph.nodes()):
        error = difference(graph, float_inputs)
        say(
            "note: this model rounds the inputs of its linears to 8 bits per token, which the "
            f"engine does not do: logits change by {error:.2%} (relative rms, 32 random tokens)"
        )
    card = bit_ttt_card(source, graph)
    files = {"config.json": json.dumps(config, indent=2) + "\n", CARD: card, **tokenizer}
    shards = [("model", _entries(graph))]
    write_folder(target, "bit-ttt", shards, files, overwrite=overwrite, progress=progress)
    return target


def _config(graph: Graph, source: Path) -> dict:
    """The engine's config.json. Raises BadInput for what the engine does not compute."""
    config = parse_config(graph.config, source)
    eps = {node.attrs["eps"] for _, node in graph.nodes() if node.op == "rms_norm"}
    biases = [name for name, node in graph.nodes() if "bias" in node.weights]
    heads, inputs = config.num_attention_heads, (config.hidden_size, config.intermediate_size)
    own = [name for name, _ in graph.nodes() if name.endswith(".rms_norm")]
    refused = {
        f"eps of its norms is {', '.join(map(str, sorted(eps)))}, and the engine has {EPS}": (
            eps != {EPS}
        ),
        f"{', '.join(biases[:1])} has a bias, and the engine has none": bool(biases),
        f"its rope is scaled ({config.rope_scaling}), and the engine has none": (
            config.rope_scaling != ()
        ),
        f"head_dim is {config.head_dim}, and the engine takes hidden_size / heads": (
            config.head_dim * heads != config.hidden_size
        ),
        "some of its layers have no rope, and the engine's have": not all(config.ropes),
        "its rope is of a part of each head, and the engine's of all": (
            config.rotary < config.head_dim
        ),
        "its attention has windows, and the engine's has none": any(config.windows),
        "it has norms on q and k, and the engine has none": config.qk_norm,
        f"{', '.join(own[:1])} is a norm of a linear, and the engine has none": bool(own),
        f"model_type is {config.model_type}, and the engine runs llama": (
            config.sub_norms or config.post_norms or config.model_type == GRANITE
        ),
        f"matrices have {inputs} inputs, and the layout takes multiples of 4": any(
            count % 4 for count in inputs
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise BadInput(f"{source}: bit-ttt does not hold this model: {reason}")
    named = {own: getattr(config, name) for own, name in NAMES.items()}
    most = graph.config.get("max_position_embeddings", 2048)
    return {
        "arch": "llama",
        "vocab_size": config.vocab_size,
        **named,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": most,
    }


def _entries(graph: Graph) -> list[Entry]:
    """All tensors: packed linears, everything else dense, the head too where it is tied."""
    entries = []
    for unit in graph.units:
        linears, others = linear_parts(unit), dense_parts(unit)
        if unit is graph.epilogue:  # the engine's head is dense
            others += [(name, *part) for name, part in linears.items()]
            linears = {}
        entries += [_linear(name, *part) for name, part in linears.items()]
        entries += [dense_entry(*part) for part in others]
    if graph.is_tied:
        (embed,) = (node for node in graph.prologue.nodes if node.op == "embed")
        ref = embed.weights["weight"]
        entries.append(dense_entry(HEAD, ref, 0, ref.type.shape[0]))
    return entries


def _linear(name: str, ref: WeightRef, start: int, stop: int) -> Entry:
    """Codes and scales of a linear."""

    def load() -> list[np.ndarray]:
        trits, scales = planes(ref, start, stop)
        return [LAYOUT.pack(trits), scales]

    ternary = ternary_of(ref.type)
    assert isinstance(ternary, TernaryType)
    bases = ternary.bases
    codes = LAYOUT.codes_shape(stop - start, ref.type.shape[1], bases)
    scales = f"{name.removesuffix('.weight')}.scales"
    uint8, float32 = np.dtype(np.uint8), np.dtype(np.float32)
    return Entry(((f"{name}_packed", codes, uint8), (scales, (bases,), float32)), load)
