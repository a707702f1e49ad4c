"""Loads checkpoints and compares them on texts, as `atd eval`, `atd study` and the demo do.

    dense, converted = load_checkpoint("model"), load_checkpoint("out")
    texts = {"wiki": read_tokens("wiki.txt", open_tokenizer("model"))}
    compare(converted, texts, context=512, against=dense)["wiki"].kl_mean

The figures and their conditions are those of `atd.evaluate`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from atd.checkpoint.files import read_text
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput, about
from atd.ir import Graph
from atd.ir.rewrite import with_activations
from atd.models import frontend
from atd.models.model import Model, load
from atd.progress import Report, unheard
from atd.runtime.evaluate import Evaluation, evaluate


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that is ready to run, and what it takes on the disk."""

    name: str
    model: Model
    bits_per_weight: float  # of the decoder's linears, see `graph_size`
    nbytes: int  # of all weights


def load_checkpoint(
    path: Path,
    *,
    backend: str = "auto",
    dtype: str = "float32",
    kv: Literal["model", "int8"] = "model",
    activations: Literal["model", "float", "int8"] = "model",
    ignore_extra: bool = False,
    mesh: Mesh | None = None,
    progress: Report = unheard,
) -> LoadedCheckpoint:
    """Loads the model of a Hugging Face folder, a GGUF file or a converted folder, on one device or
    on those of a mesh.

    Linears take their inputs as the model says; as they are, with float activations; or rounded to
    8 bits per token, with int8. Backend, dtype and kv are as in `atd.load`.
    """
    graph = frontend.open(path, ignore_extra=ignore_extra)
    graph = with_activations(graph, activations)
    model = load(graph, backend=backend, dtype=dtype, kv=kv, mesh=mesh, progress=progress)
    return LoadedCheckpoint(path.name, model, *graph_size(graph))


def read_tokens(path: str | Path, tokenizer: Tokenizer, limit: int | None = None) -> np.ndarray:
    """Returns the first `limit` token ids (None: all) of a UTF-8 text, int32 [n], without BOS.

    Raises BadInput for a limit below 1 and a file that is no text.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"--tokens must be at least 1, not {limit}")
    return tokenizer.encode(read_text(path))[:limit]


def compare(
    checkpoint: LoadedCheckpoint,
    texts: Mapping[str, np.ndarray],
    *,
    against: LoadedCheckpoint | None = None,
    progress: Report = unheard,
    **options,
) -> dict[str, Evaluation]:
    """Evaluates a checkpoint on each text, with `against` its distance from that one too.

    Args:
      texts: name -> token ids int [n].
      options: of `atd.evaluate`: context, bos_id, batch, chunk, convention.

    Returns the evaluations by the names of the texts.
    """

    def evaluated(name: str) -> Evaluation:
        pair = f"{checkpoint.name} against {against.name}" if against else checkpoint.name
        with about(f"{pair} on {name}"):
            return evaluate(
                checkpoint.model,
                texts[name],
                against=against and against.model,
                progress=lambda now: progress(replace(now, at=f"on {name}")),
                **options,
            )

    return {name: evaluated(name) for name in texts}


def graph_size(graph: Graph) -> tuple[float, int]:
    """Returns (bits per weight of the decoder's linears, bytes of the model), from types alone.

    The bits count all stored bytes of the linears: codes, padding and scales.
    """
    linears = [
        node.weights["weight"].type
        for block in graph.blocks
        for node in block.nodes
        if node.op == "linear" and "weight" in node.weights
    ]
    bits = 8 * sum(t.nbytes for t in linears) / sum(math.prod(t.shape) for t in linears)
    return bits, sum(ref.type.nbytes for _, ref in graph.weights())
