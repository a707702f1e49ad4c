"""Checkpoints to graphs: a config and a table of tensors become the IR, checked without data.

`open(path)` takes a Hugging Face folder or a GGUF file of a family in `atd.models.config`, and
folders that atd wrote, whose graph is stored beside the weights.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from atd.checkpoint.files import StoredTensor, read_json
from atd.checkpoint.folder import GRAPH
from atd.checkpoint.hub import local
from atd.checkpoint.reader import Checkpoint, is_gguf, open_checkpoint, read_config
from atd.errors import BadInput
from atd.ir import Graph, InvalidGraph, WeightRef, graph_from_json, verify
from atd.models.config import check_context, parse_config
from atd.models.llama import EMBEDDING, HEAD, llama_graph
from atd.models.names import by_plain_name
from atd.weights import DTYPE_NAMES, DTYPES, DenseType, Weight, WeightType, build, stored

FORMAT_VERSION = 1
_WEIGHT_DTYPES = ("f32", "f16", "bf16", "f64")
_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # a buffer of older transformers
_SHOWN = 20  # most problems in one message


def open(
    path: str | Path,
    *,
    ignore_extra: bool = False,
    digests: Mapping[Path, str] | None = None,
) -> Graph:
    """Opens a checkpoint; headers alone are read.

    A `quantization_config` that dense weights have left of a former life is dropped.

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
    if not isinstance(quantization, dict) or method != "atd":
        parse_config(config, path)
        checkpoint = open_checkpoint(path, digests)
        if quantization is not None:
            checkpoint = _unquantized(checkpoint, method)
        return _verified(_from_config(checkpoint, ignore_extra), path)
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
    check_context(config, path)
    return _verified(_from_stored_graph(open_checkpoint(path, digests)), path)


def _unquantized(checkpoint: Checkpoint, method: object) -> Checkpoint:
    """The checkpoint without its quantization_config. Raises BadInput where that still holds."""
    coded = [t.name for t in checkpoint.tensors.values() if t.dtype not in _WEIGHT_DTYPES]
    if coded or method == "bitnet":  # whose weights may be dense, and are rounded as they run
        raise BadInput(
            f"{checkpoint.path}: its weights are quantized already, with {method!r}; "
            f"give the original checkpoint, in f32, f16 or bf16"
        )
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    return replace(checkpoint, config=config)


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
        """The weight called `tensor`, of this shape, and the dtype that the file has at `place`;
        f32 for f64."""
        found = self._find(place, shape, _WEIGHT_DTYPES)
        type = DenseType(shape, found.dtype if found and found.dtype != "f64" else "f32")
        return self._reference(tensor, type, {"array": place}, [found])

    def of_type(self, tensor: str, type: WeightType, *shape: int) -> WeightRef:
        """The weight called `tensor`, of a type that is not dense, where this shape is expected."""
        if type.shape != shape:
            self.problems.append(
                f"{tensor} has the shape {list(type.shape)}, expected {list(shape)}"
            )
        return self.reference(tensor, type)

    def _reference(
        self, tensor: str, type: WeightType, names: dict[str, str], found: list[StoredTensor | None]
    ) -> WeightRef:
        def read(name: str) -> np.ndarray:
            array = self.checkpoint.read(name)
            if array.dtype != np.float64 or not isinstance(type, DenseType):
                return array
            with np.errstate(over="ignore"):  # Inf, which the converter refuses by name
                return array.astype(DTYPES[type.dtype])

        def load() -> Weight:
            return build(type, {slot: read(name) for slot, name in names.items()})

        sources = [part.source for part in found if part]
        return WeightRef(tensor, type, load, "; ".join(sources) if all(sources) else "")

    def _find(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
    ) -> StoredTensor | None:
        self.used.add(name)
        found = self.checkpoint.tensors.get(name)
        if found is None:
            self.problems.append(f"{name} {list(shape)} is missing")
            return None
        if found.shape != tuple(shape):
            empty = "; its data was not saved" if 0 in found.shape else ""
            self.problems.append(
                f"{name} has the shape {list(found.shape)}, expected {list(shape)}{empty}"
            )
        if found.dtype not in dtypes:
            self.problems.append(
                f"{name} has the dtype {found.dtype}, expected {' or '.join(dtypes)}"
            )
        return found

    def finish(self, ignore_extra: bool | None = None) -> None:
        """Raises BadInput with all problems, if there are any.

        `ignore_extra` leaves out tensors that are not part of the model; None: it is no choice.
        """
        extra = sorted(
            name
            for name, tensor in self.checkpoint.tensors.items()
            if name not in self.used and not _HARMLESS.fullmatch(name) and 0 not in tensor.shape
        )
        problems = list(self.problems)
        if not ignore_extra:
            problems += [f"{name} is not part of the model" for name in extra]
        if problems:
            shown = problems[:_SHOWN] + (
                [f"and {len(problems) - _SHOWN} more"] if problems[_SHOWN:] else []
            )
            if extra and not self.problems and ignore_extra is not None:
                shown.append("leave them out with --ignore-extra, if the model works without them")
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


def _from_config(checkpoint: Checkpoint, ignore_extra: bool) -> Graph:
    config = parse_config(checkpoint.config, checkpoint.path)
    here = by_plain_name(checkpoint.tensors, checkpoint.path)
    checkpoint = replace(checkpoint, tensors=here)
    binder = _Binder(checkpoint)
    tied = config.tie_word_embeddings and _head_is_embedding(checkpoint)
    # Tied, with the head alone in the file: it is the embedding (transformers ties either way).
    embedding = HEAD if tied and EMBEDDING not in here and HEAD in here else EMBEDDING

    def reference(tensor: str, *shape: int) -> WeightRef:
        if type := checkpoint.types.get(tensor):
            return binder.of_type(tensor, type, *shape)
        return binder.dense(tensor, *shape, place=embedding if tensor == EMBEDDING else tensor)

    graph = llama_graph(checkpoint.config, replace(config, tie_word_embeddings=tied), reference)
    if tied:
        binder.used.add(HEAD)
    binder.finish(ignore_extra)
    return graph


def _head_is_embedding(checkpoint: Checkpoint) -> bool:
    """False where a tied model has both tensors and they differ (transformers' rule)."""
    if not {EMBEDDING, HEAD} <= checkpoint.tensors.keys():
        return True
    if checkpoint.tensors[EMBEDDING].shape != checkpoint.tensors[HEAD].shape:
        return False
    return np.array_equal(checkpoint.read(EMBEDDING), checkpoint.read(HEAD))
