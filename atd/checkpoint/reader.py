"""Reading checkpoints: what tensors there are, known from the headers alone, and their data one tensor at a time.

A checkpoint is a Hugging Face folder (config.json with model.safetensors, or with model.safetensors.index.json and its
shards), or one GGUF file (`atd.checkpoint.gguf`), which is presented in Hugging Face's names and config.
"""

from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes  # noqa: F401  safetensors finds bfloat16 in numpy once this is imported
import numpy as np

from atd.checkpoint.files import StoredTensor, _exists, read_json
from atd.checkpoint.safetensors import SINGLE, _folder_tensors
from atd.errors import BadInput


@dataclass(frozen=True)
class Checkpoint:
    """A model: `config` in the form of Hugging Face's config.json, `tensors` by name. `read` alone reads data."""

    path: Path
    config: dict = field(repr=False)
    tensors: dict[str, StoredTensor] = field(repr=False)

    def read(self, name: str) -> np.ndarray:
        """The tensor's data. Raises BadInput when the file cannot be read any more."""
        return self.tensors[name].load()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, a Hugging Face folder or a .gguf file; reads headers alone.

    Raises BadInput, naming file and tensor, for what is absent, unreadable, malformed or incomplete.
    """
    path = Path(path)
    if is_gguf(path):
        from atd.checkpoint.gguf import open_gguf  # here, because it needs StoredTensor

        return Checkpoint(path, *open_gguf(path))
    config = read_config(path)
    return Checkpoint(path, config, _folder_tensors(path))


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and not path.is_dir()


def read_config(folder: Path) -> dict:
    """config.json of a Hugging Face folder. Raises BadInput when there is none."""
    if not _exists(folder):
        raise BadInput(f"{folder}: no such file or folder; expected a Hugging Face folder or a .gguf file")
    if not folder.is_dir():
        raise BadInput(
            f"{folder}: not a checkpoint; expected a Hugging Face folder (config.json and {SINGLE}) or a .gguf file"
        )
    if not _exists(folder / "config.json"):
        raise BadInput(f"{folder}: not a checkpoint: it has no config.json")
    return read_json(folder / "config.json")
