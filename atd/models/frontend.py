"""Checkpoints to graphs: a config and a table of tensors become the IR, checked without data.

`open(path)` takes a Hugging Face folder or a GGUF file of a family in `atd.models.config`, and
folders that atd wrote, whose graph is stored beside the weights.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from atd.checkpoint.files import StoredTensor, read_json
from atd.checkpoint.folder import GRAPH
from atd.checkpoint.reader import Checkpoint, is_gguf, open_checkpoint, read_config
from atd.errors import BadInput
from atd.ir import Graph, InvalidGraph, WeightRef, graph_from_json, verify
from atd.models.config import ModelConfig, check_architecture, parse_config
from atd.models.llama import EMBEDDING, HEAD, llama_graph
from atd.weights import DTYPE_NAMES, DenseType, Weight, WeightType, build, stored

FORMAT_VERSION = 1
_WEIGHT_DTYPES = ("f32", "f16", "bf16")
_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # a buffer of older transformers
_SHOWN = 20  # most problems in one message


def open(path: str | Path) -> Graph:
    """Opens a checkpoint; headers alone are read.

    Returns:
        Its graph, verified.

    Raises:
        BadInput: the architecture is not supported (this is seen before anything but the config is
            read), the checkpoint is broken, or tensors are missing, left over, or of the wrong
            shape or dtype: one message names all of them.
    """
    path = Path(path)
    if is_gguf(path):
        checkpoint = open_checkpoint(path)
        return _verified(_from_config(checkpoint, parse_config(checkpoint.config, path)), path)
    config = read_config(path)
    quantization = config.get("quantization_config")
    if quantization is None:
        parsed = parse_config(config, path)
        return _verified(_from_config(open_checkpoint(path), parsed), path)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "atd":
        check_architecture(config, path)
        raise BadInput(
            f"{path}: its weights are quantized already, with {method!r}; "
            f"give the original checkpoint, in f32, f16 or bf16"
        )
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
    return _verified(_from_stored_graph(open_checkpoint(path)), path)


def _verified(graph: Graph, path: Path) -> Graph:
    try:
        verify(graph)
    except (InvalidGraph, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise BadInput(f"{path}: not a valid model: {error}") from None
    return graph


@dataclass
class _Binder:
    """Gives out references to a checkpoint's tensors; notes which were used, and what is wrong."""

    checkpoint: Checkpoint
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def reference(self, tensor: str, type: WeightType) -> WeightRef:
        """The weight of this type called `tensor`, wherever `atd.weights.stored` puts its parts."""
        parts = stored(tensor, type)
        found = [self._find(name, shape, (_NAMES[dtype],)) for name, shape, dtype in parts.values()]
        names = {slot: name for slot, (name, _, _) in parts.items()}
        return self._reference(tensor, type, names, found)

    def dense(self, tensor: str, *shape: int, place: str) -> WeightRef:
        """The weight called `tensor`, of this shape, and the dtype that the file has at `place`."""
        found = self._find(place, shape, _WEIGHT_DTYPES)
        type = DenseType(shape, found.dtype if found else "f32")
        return self._reference(tensor, type, {"array": place}, [found])

    def _reference(
        self, tensor: str, type: WeightType, names: dict[str, str], found: list[StoredTensor | None]
    ) -> WeightRef:
        def load() -> Weight:
            return build(type, {slot: self.checkpoint.read(name) for slot, name in names.items()})

        return WeightRef(tensor, type, load, "; ".join(part.source for part in found if part))

    def _find(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
    ) -> StoredTensor | None:
        self.used.add(name)
        found = self.checkpoint.tensors.get(name)
        if found is None:
            self.problems.append(f"{name} {list(shape)} is missing")
            return None
        if found.shape != tuple(shape):
            self.problems.append(
                f"{name} has the shape {list(found.shape)}, expected {list(shape)}"
            )
        if found.dtype not in dtypes:
            self.problems.append(
                f"{name} has the dtype {found.dtype}, expected {' or '.join(dtypes)}"
            )
        return found

    def finish(self) -> None:
        """Raises BadInput with all problems, if there are any."""
        extra = sorted(
            name
            for name in self.checkpoint.tensors
            if name not in self.used and not _HARMLESS.fullmatch(name)
        )
        problems = self.problems + [f"{name} is not part of the model" for name in extra]
        if problems:
            shown = problems[:_SHOWN] + (
                [f"and {len(problems) - _SHOWN} more"] if problems[_SHOWN:] else []
            )
            raise BadInput(
                f"{self.checkpoint.path}: the tensors do not fit the model:\n  "
                + "\n  ".join(shown)
            )


_NAMES = {**DTYPE_NAMES, np.dtype(np.int8): "i8", np.dtype(np.uint8): "u8"}


# --- folders that atd wrote ---------------------------------------------------------------------


def _from_stored_graph(checkpoint: Checkpoint) -> Graph:
    file = checkpoint.path / GRAPH
    data = read_json(file)
    binder = _Binder(checkpoint)
    try:
        graph = graph_from_json(data, checkpoint.config, binder.reference)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{file}: malformed graph: {type(error).__name__}: {error}") from None
    binder.finish()
    return graph


# --- Hugging Face's models ----------------------------------------------------------------------


def _from_config(checkpoint: Checkpoint, config: ModelConfig) -> Graph:
    binder, here = _Binder(checkpoint), checkpoint.tensors
    tied = config.tie_word_embeddings and _head_is_embedding(checkpoint)
    # Tied, with the head alone in the file: it is the embedding (transformers ties either way).
    embedding = HEAD if tied and EMBEDDING not in here and HEAD in here else EMBEDDING

    def reference(tensor: str, *shape: int) -> WeightRef:
        return binder.dense(tensor, *shape, place=embedding if tensor == EMBEDDING else tensor)

    graph = llama_graph(checkpoint.config, replace(config, tie_word_embeddings=tied), reference)
    if tied:
        binder.used.add(HEAD)
    binder.finish()
    return graph


def _head_is_embedding(checkpoint: Checkpoint) -> bool:
    """False where a tied model has both tensors and they differ (transformers' rule)."""
    if not {EMBEDDING, HEAD} <= checkpoint.tensors.keys():
        return True
    if checkpoint.tensors[EMBEDDING].shape != checkpoint.tensors[HEAD].shape:
        return False
    return np.array_equal(checkpoint.read(EMBEDDING), checkpoint.read(HEAD))
