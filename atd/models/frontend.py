"""Checkpoints to graphs: a config and a table of tensors become the IR, checked without data.

`open(path)` takes a Hugging Face folder or a GGUF file of a family in `atd.models.config`, and
folders that atd wrote, whose graph is stored beside the weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from atd.checkpoint.files import read_json
from atd.checkpoint.folder import GRAPH
from atd.checkpoint.hub import local
from atd.checkpoint.reader import Checkpoint, is_gguf, open_checkpoint, read_config
from atd.errors import BadInput
from atd.ir import Graph, InvalidGraph, WeightRef, graph_from_json, verify
from atd.ir.notes import without
from atd.models.binder import Binder
from atd.models.bit_ttt import BitTtt, is_bit_ttt
from atd.models.bitnet import Bitnet, read_bitnet
from atd.models.config import check_context, parse_config
from atd.models.folds import fold_of, graph_weight
from atd.models.llama import EMBEDDING, HEAD, llama_graph
from atd.models.names import by_plain_name
from atd.models.phi3 import split_tensors
from atd.models.quantized import check_unquantized

FORMAT_VERSION = 1


def open(
    path: str | Path,
    *,
    ignore_extra: bool = False,
    digests: Mapping[Path, str] | None = None,
) -> Graph:
    """Opens a checkpoint; headers alone are read.

    Checkpoints of `bitnet` (`atd.models.bitnet`) and of Bit-TTT (`atd.models.bit_ttt`) become
    graphs of ternary weights. A `quantization_config` that dense weights have left of a former life
    is dropped.

    Args:
        path: a Hugging Face folder, a GGUF file, a folder that atd wrote, or a model of the hub,
            "user/repo" or "user/repo@revision".
        ignore_extra: leave out tensors that are not part of the model.
        digests: of the content of the files of tensors, by which weights are identified in keys of
            caches and of runs that go on; without them weights have no identity.

    Returns:
        Its graph, verified.

    Raises:
        BadInput: the architecture is not supported (this is seen before anything but the config is
            read), the checkpoint is broken, or tensors are missing, left over, or of the wrong
            shape or dtype: one message names all of them.
    """
    path = local(path)
    if is_gguf(path):
        checkpoint = open_checkpoint(path, digests)
        return _verified(_from_config(checkpoint, ignore_extra), path)
    config = read_config(path)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if isinstance(quantization, dict) and method == "atd":
        _check_version(quantization, path)
        check_context(config, path)
        return _verified(_from_stored_graph(open_checkpoint(path, digests)), path)
    if is_bit_ttt(config):
        coded = BitTtt(path)
        checkpoint = replace(open_checkpoint(path, digests), config=coded.hf_config(config))
        return _verified(_from_config(checkpoint, ignore_extra, coded), path)
    parse_config(config, path)
    coded = None
    if isinstance(quantization, dict) and method == "bitnet":
        coded = read_bitnet(quantization, config, path)
    checkpoint = open_checkpoint(path, digests)
    if coded is None:
        check_unquantized(checkpoint, method)
    checkpoint = replace(checkpoint, config=without(config, "quantization_config"))
    return _verified(_from_config(checkpoint, ignore_extra, coded), path)


def _check_version(quantization: dict, path: Path) -> None:
    """Raises BadInput for a version of atd's format that this atd does not read."""
    version = quantization.get("format_version")
    if type(version) is not int or version < 1:
        raise BadInput(
            f"{path}: config.json: quantization_config.format_version is {version!r}; "
            f"expected an integer from 1 to {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise BadInput(
            f"{path}: written in version {version} of atd's format; "
            f"this atd reads versions up to {FORMAT_VERSION}; install a newer atd"
        )


def _verified(graph: Graph, path: Path) -> Graph:
    try:
        verify(graph)
    except (InvalidGraph, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise BadInput(f"{path}: not a valid model: {error}") from None
    return graph


# --- folders that atd wrote ---------------------------------------------------------------------


def _from_stored_graph(checkpoint: Checkpoint) -> Graph:
    file = checkpoint.path / GRAPH
    data = read_json(file)
    binder = Binder(checkpoint)
    try:
        graph = graph_from_json(data, checkpoint.config, binder.reference)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{file}: malformed graph: {type(error).__name__}: {error}") from None
    binder.finish()
    return graph


# --- Hugging Face's models ----------------------------------------------------------------------


def _from_config(
    checkpoint: Checkpoint, ignore_extra: bool, coded: Bitnet | BitTtt | None = None
) -> Graph:
    """The graph of a model whose config.json is Hugging Face's.

    coded: reads the weights that are not stored dense.
    """
    config = parse_config(checkpoint.config, checkpoint.path)
    here = by_plain_name(checkpoint.tensors, checkpoint.path)
    here = split_tensors(config, here, checkpoint.types, checkpoint.path)
    checkpoint = replace(checkpoint, tensors=here)
    binder = Binder(checkpoint, kind=f" of {coded.kind}" if coded else "")
    tied = config.tie_word_embeddings and _head_is_embedding(checkpoint)
    # Tied, with the head alone in the file: it is the embedding (transformers ties either way).
    embedding = HEAD if tied and EMBEDDING not in here and HEAD in here else EMBEDDING

    def reference(tensor: str, *shape: int) -> WeightRef:
        if type := checkpoint.types.get(tensor):
            if fold_of(config, tensor):
                binder.problems.append(
                    f"{tensor} is {type}, and models of type {config.model_type} are read where it "
                    "is dense"
                )
            return binder.of_type(tensor, type, *shape)
        if coded and (weight := coded.weight(binder, tensor, shape)):
            return weight
        place = embedding if tensor == EMBEDDING else tensor
        return graph_weight(config, binder.dense(tensor, *shape, place=place))

    graph = llama_graph(checkpoint.config, replace(config, tie_word_embeddings=tied), reference)
    if tied:
        binder.used.add(HEAD)
    if isinstance(coded, Bitnet):
        graph = coded.with_rounded_inputs(graph, binder)
    binder.finish(ignore_extra)
    return graph


def _head_is_embedding(checkpoint: Checkpoint) -> bool:
    """False where a tied model has both tensors and they differ (transformers' rule)."""
    if not {EMBEDDING, HEAD} <= checkpoint.tensors.keys():
        return True
    if checkpoint.tensors[EMBEDDING].shape != checkpoint.tensors[HEAD].shape:
        return False
    return np.array_equal(checkpoint.read(EMBEDDING), checkpoint.read(HEAD))
