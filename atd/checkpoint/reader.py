"""Reads checkpoints and their tokenizers: headers first, then the data one tensor at a time.

A checkpoint is a Hugging Face folder (config.json with model.safetensors, or with
model.safetensors.index.json and its shards), or a GGUF file (`atd.checkpoint.gguf`), which is
presented in Hugging Face's names and config.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from atd.checkpoint.files import StoredTensor, path_exists, read_bytes, read_json
from atd.checkpoint.folder_tokenizer import open_folder_tokenizer
from atd.checkpoint.gguf import open_gguf
from atd.checkpoint.gguf_tokenizer import open_gguf_tokenizer
from atd.checkpoint.hub import local
from atd.checkpoint.identity import Contents, read_contents
from atd.checkpoint.safetensors import SINGLE, folder_tensors
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput
from atd.progress import Report, unheard
from atd.weights import WeightType


@dataclass(frozen=True)
class Checkpoint:
    """A model whose headers were read. `read` reads data."""

    path: Path
    config: dict = field(repr=False)  # in the form of Hugging Face's config.json
    tensors: dict[str, StoredTensor] = field(repr=False)  # by name
    # Of the weights that are not dense, by name; their parts are among the tensors, under the names
    # of `atd.weights.stored`.
    types: Mapping[str, WeightType] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> np.ndarray:
        """Reads the data of a tensor. Raises BadInput where the file cannot be read any more."""
        return self.tensors[name].load()


def open_checkpoint(path: str | Path, digests: Mapping[Path, str] | None = None) -> Checkpoint:
    """Opens a Hugging Face folder or a .gguf file; reads headers alone.

    Args:
        path: the folder or file, or a name of the hub (`atd.checkpoint.hub`).
        digests: of the content of its files of tensors, from which `source` of a tensor is made.

    Raises BadInput, naming file and tensor, for what is absent, unreadable, malformed or
    incomplete.
    """
    path = local(path)
    if is_gguf(path):
        config, tensors, types = open_gguf(path)
    else:
        config, tensors, types = read_config(path), folder_tensors(path), {}
    known = digests or {}
    tensors = {
        name: replace(tensor, source=f"{known[tensor.file]} {tensor.place}")
        if tensor.file in known
        else tensor
        for name, tensor in tensors.items()
    }
    return Checkpoint(path, config, tensors, types)


def checkpoint_contents(path: str | Path, progress: Report = unheard) -> Contents:
    """Reads all files of tensors of a checkpoint, for their digests."""
    tensors = open_checkpoint(path).tensors.values()
    return read_contents(sorted({tensor.file for tensor in tensors}), progress)


def is_gguf(path: Path) -> bool:
    """Returns whether the path names a GGUF file: by its ending, or by how it begins."""
    if path_exists(path) and path.is_file():
        return path.suffix == ".gguf" or read_bytes(path, 0, 4) == b"GGUF"
    return path.suffix == ".gguf" and not path.is_dir()


def read_config(folder: Path) -> dict:
    """Reads config.json of a Hugging Face folder. Raises BadInput where there is none."""
    if not path_exists(folder):
        raise BadInput(
            f"{folder}: no such file or folder; expected a Hugging Face folder or a .gguf file"
        )
    if not folder.is_dir():
        raise BadInput(
            f"{folder}: not a checkpoint; expected a Hugging Face folder "
            f"(config.json and {SINGLE}) or a .gguf file"
        )
    if not path_exists(folder / "config.json"):
        raise BadInput(f"{folder}: not a checkpoint: it has no config.json")
    return read_json(folder / "config.json")


def open_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder, of a .gguf file, or of a model of the hub.

    Raises BadInput where there is none, or one of an unknown kind.
    """
    path = local(path)
    if not path_exists(path):
        raise BadInput(
            f"{path}: no such file or folder; give a Hugging Face folder or a .gguf file"
        )
    if path.is_dir():
        return open_folder_tokenizer(path)
    if not is_gguf(path):
        raise BadInput(
            f"{path}: a tokenizer is read from a Hugging Face folder or a .gguf file, "
            "and this is neither"
        )
    return open_gguf_tokenizer(path)
