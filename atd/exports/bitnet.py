"""Exports N = 1 models as Hugging Face's `bitnet`, which transformers loads and runs.

`weight_scale` is the scale itself, and transformers multiplies by it (AutoBitLinear, offline). A
model that was read from a checkpoint of BitLinear, whose weight_scale divides, is written so again.
"""

import json
from dataclasses import replace
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
from atd.ir import INT8, Block, Graph, WeightRef
from atd.ir.notes import DIVISOR, without
from atd.models import frontend
from atd.models.config import GEMMA2, GEMMA3, GRANITE, PHI3, both_dtypes
from atd.pipeline.card import bitnet_card
from atd.pipeline.output import tokenizer_files
from atd.progress import Report, Say, unheard
from atd.weights import DTYPES, DenseType
from atd.weights.layouts import LAYOUTS

LAYOUT = LAYOUTS["hf-bitnet"]
_HELD_OTHERWISE = {
    GEMMA2: "gains of Gemma 2",
    GEMMA3: "gains of Gemma 3",
    GRANITE: "multipliers of Granite",
    PHI3: "joined matrices of Phi-3",
}
WAY = (
    "convert the dense model with atd convert MODEL OUT --recipe greedy3 --set decompose.bases=1, "
    "which has one base and one scale per matrix"
)


def export_bitnet(
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    ignore_extra: bool = False,
    say: Say = print,
    progress: Report = unheard,
) -> Path:
    """Writes an N = 1 model as a Hugging Face folder of `bitnet` and returns that folder.

    Says by how much logits change where transformers rounds inputs that the model does not round.

    Args:
      model: a checkpoint whose decoder's linears are ternary, N = 1, one scale per tensor.
      out: the folder to write.
      overwrite: replace `out` if atd made it.
      ignore_extra: leave out tensors of `model` that are not part of its architecture.

    Raises BadInput, before anything is written, for a model that the format does not hold.
    """
    source, target = Path(model), Path(out).absolute()
    graph = frontend.open(source, ignore_extra=ignore_extra)
    if held := _HELD_OTHERWISE.get(graph.config.get("model_type", "")):
        raise BadInput(f"{source}: bitnet does not hold the {held}; use --to hf")
    check_planes(graph, "bitnet", (1,), WAY)
    graph = absorb(graph)
    _check_rows(graph)
    norm_eps = _norm_eps(graph)
    check_target(target, local(source), overwrite)
    tokenizer = tokenizer_files(source, say)
    rounds = all(
        "activations" in node.attrs
        for unit in graph.blocks
        for node in unit.nodes
        if node.op == "linear"
    )
    if not rounds:
        error = difference(graph, _rounding)
        say(
            "note: transformers rounds the inputs of these linears to 8 bits per token, which this "
            f"model does not do: logits change by {error:.2%} (relative rms, 32 random tokens)"
        )
    # A converted model has scales and gains of several dtypes, and transformers computes in one.
    scale_dtype, dtype = (_scale_dtype(graph), None) if rounds else ("f32", "f32")
    shards = [(unit.name or "epilogue", _entries(unit, scale_dtype, dtype)) for unit in graph.units]
    files = {
        "config.json": json.dumps(_config(graph, norm_eps, rounds), indent=2) + "\n",
        CARD: bitnet_card(source, graph),
        **tokenizer,
    }
    write_folder(target, "bitnet", shards, files, overwrite=overwrite, progress=progress)
    return target


def _rounding(unit: Block) -> Block:
    """The unit whose ternary linears round their inputs."""

    def rounding(node):
        ternary = "weight" in node.weights and not isinstance(
            node.weights["weight"].type, DenseType
        )
        if node.op != "linear" or not ternary:
            return node
        return replace(node, attrs=node.attrs | {"activations": INT8})

    return replace(unit, nodes=tuple(map(rounding, unit.nodes)))


def _check_rows(graph: Graph) -> None:
    """Raises BadInput where a matrix has a number of rows that the layout does not take."""
    for unit in graph.blocks:
        for name, (ref, start, stop) in linear_parts(unit).items():
            if reason := LAYOUT.refuses(stop - start, ref.type.shape[1], 1):
                raise BadInput(f"{name}: {reason}")


def _norm_eps(graph: Graph) -> float | None:
    """eps of the norms that linears have of their own; None where there are none."""
    found = {
        node.attrs["eps"]
        for unit in graph.blocks
        for node in unit.nodes
        if node.op == "rms_norm" and node.name.endswith(".rms_norm")
    }
    return found.pop() if found else None


def _divisors(unit: Block) -> dict[str, float]:
    """Tensor name -> the number that a BitLinear checkpoint had for the weight."""
    return {
        node.weights["weight"].tensor: node.attrs[DIVISOR]
        for node in unit.nodes
        if DIVISOR in node.attrs
    }


def _divides(graph: Graph) -> bool:
    """Whether the model was read from a checkpoint of BitLinear."""
    return all(len(_divisors(unit)) == len(linear_parts(unit)) > 0 for unit in graph.blocks)


def _scale_dtype(graph: Graph) -> str:
    """The dtype of weight_scale: that of the scales; of divisors bf16, where all fit it, or f32."""
    if not _divides(graph):
        found = {ref.type.dtype for unit in graph.blocks for ref, *_ in linear_parts(unit).values()}
        return found.pop() if len(found) == 1 else "f32"
    divisors = np.array([d for unit in graph.blocks for d in _divisors(unit).values()])
    return "bf16" if (divisors.astype(DTYPES["bf16"]).astype(float) == divisors).all() else "f32"


def _config(graph: Graph, norm_eps: float | None, rounds: bool) -> dict:
    """The model's config.json, with what transformers needs to know of the linears."""
    if _divides(graph):
        quantization = {"quant_method": "bitnet", "linear_class": "bitlinear"}
    else:
        quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    quantization |= {"quantization_mode": "offline", "modules_to_not_convert": ["lm_head"]}
    if norm_eps is not None:
        quantization |= {"use_rms_norm": True, "rms_norm_eps": norm_eps}
    config = without(graph.config, "dtype", "torch_dtype")
    own = graph.config.get("torch_dtype", graph.config.get("dtype", "float32"))
    dtype = own if rounds else "float32"
    return both_dtypes(config | {"torch_dtype": dtype, "quantization_config": quantization})


def _entries(unit: Block, scale_dtype: str, dtype: str | None) -> list[Entry]:
    """The tensors of a unit: codes and weight_scale of its linears, all others dense."""
    divisors, linears, others = _divisors(unit), linear_parts(unit), dense_parts(unit)
    if not unit.name:  # the head, which stays dense
        others += [(name, *part) for name, part in linears.items()]
        linears = {}
    coded = [
        _linear(name, *part, scale_dtype, divisors.get(part[0].tensor))
        for name, part in linears.items()
    ]
    return coded + [dense_entry(*part, dtype) for part in others]


def _linear(
    name: str, ref: WeightRef, start: int, stop: int, dtype: str, divisor: float | None
) -> Entry:
    """Codes and weight_scale of a linear."""
    shape, number = (stop - start, ref.type.shape[1]), DTYPES[dtype]

    def load() -> list[np.ndarray]:
        trits, scales = planes(ref, start, stop)
        scale = scales if divisor is None else np.array([divisor])
        return [LAYOUT.pack(trits), scale.astype(number)]

    codes = LAYOUT.codes_shape(*shape, 1)
    return Entry(((name, codes, np.dtype(np.uint8)), (f"{name}_scale", (1,), number)), load)
