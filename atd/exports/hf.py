"""Exports the dequantized weights of a model as a dense Hugging Face folder for other tools."""

import json
from pathlib import Path

import numpy as np

from atd.checkpoint.folder import CARD, check_target
from atd.checkpoint.hub import local
from atd.errors import BadInput, RunFailed
from atd.exports.absorb import absorb
from atd.exports.folder import write_folder
from atd.exports.parts import check_inputs, parts
from atd.ir import Block, Graph, Node, WeightRef
from atd.ir.notes import without
from atd.models import frontend
from atd.models.config import ModelConfig, parse_config
from atd.models.folds import stored_array
from atd.models.phi3 import join_weights
from atd.pipeline.card import dense_card
from atd.pipeline.output import tokenizer_files
from atd.progress import Report, Say, unheard
from atd.weights import DTYPES, Dense, DenseType

TORCH_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def export_hf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    ignore_extra: bool = False,
    say: Say = print,
    progress: Report = unheard,
) -> Path:
    """Writes a model as a dense Hugging Face folder and returns that folder.

    The folder has config.json, safetensors under their Hugging Face names, the tokenizer and a
    model card.

    Args:
      model: a folder that atd made, or any other checkpoint.
      out: the folder to write.
      dtype: float32, which holds every ternary sum exactly, float16 or bfloat16.
      overwrite: replace `out` if atd made it.
      ignore_extra: leave out tensors of `model` that are not part of its architecture.

    Raises RunFailed where a value does not fit the dtype, BadInput for a graph whose function no
    dense checkpoint has.
    """
    if dtype not in TORCH_DTYPES:
        raise BadInput(f"--dtype {dtype} is none of --to hf: {', '.join(TORCH_DTYPES)}")
    source, target = Path(model), Path(out).absolute()
    graph = absorb(frontend.open(source, ignore_extra=ignore_extra))
    check_inputs(graph, say)
    check_target(target, local(source), overwrite)
    config = parse_config(graph.config, source)
    tokenizer = tokenizer_files(source, say)
    shards = [
        (
            unit.name or "epilogue",
            join_weights(
                config, (ref for node in unit.nodes for ref in _dense(config, unit, node, dtype))
            ),
        )
        for unit in graph.units
    ]
    files = {
        "config.json": json.dumps(_config(graph, dtype), indent=2) + "\n",
        CARD: dense_card(source, graph, dtype),
        **tokenizer,
    }
    write_folder(target, "hf", shards, files, overwrite=overwrite, progress=progress)
    return target


def _config(graph: Graph, dtype: str) -> dict:
    """The model's config.json as that of dense weights."""
    return without(graph.config, "quantization_config") | {"torch_dtype": dtype, "dtype": dtype}


def _dense(model: ModelConfig, unit: Block, node: Node, dtype: str) -> list[WeightRef]:
    """The node's weights, dense, with the names and values that transformers has."""
    return [_dense_rows(model, *part, TORCH_DTYPES[dtype]) for part in parts(unit, node)]


def _dense_rows(
    model: ModelConfig, tensor: str, ref: WeightRef, start: int, stop: int, dtype: str
) -> WeightRef:
    """Rows start..stop of a weight as a dense one."""
    type = DenseType((stop - start, *ref.type.shape[1:]), dtype)

    def load() -> Dense:
        array = stored_array(model, tensor, ref.dense()[start:stop])
        with np.errstate(over="ignore"):
            narrow = array.astype(DTYPES[dtype])
        if not np.isfinite(narrow).all():
            raise RunFailed(f"{tensor}: its values do not fit {dtype}; export with --dtype float32")
        return Dense(narrow)

    return WeightRef(tensor, type, load, ref.source)
