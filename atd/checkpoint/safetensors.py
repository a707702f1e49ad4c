"""Reads the tensors of a Hugging Face folder: one safetensors file, or an index and its shards."""

import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes  # noqa: F401  safetensors finds bfloat16 in numpy once this is imported
import numpy as np
from safetensors import SafetensorError, safe_open

from atd.checkpoint.files import (
    StoredTensor,
    is_plain_name,
    json_object,
    path_exists,
    read_bytes,
    read_json,
    refuse_pointer,
)
from atd.errors import BadInput

_LONGEST_HEADER = 100_000_000  # bytes that the library safetensors reads
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def shard_name(i: int, count: int) -> str:
    """Returns the file name of shard i = 0, 1, ... of `count`."""
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Reads the headers of a folder's safetensors files: name -> tensor.

    Raises BadInput for files that are absent, damaged or contradict their index.
    """
    if path_exists(folder / SINGLE):
        return _file_tensors(folder / SINGLE)
    if not path_exists(folder / INDEX):
        others = sorted(
            file.name
            for pattern in ("*.bin", "*.gguf", "*.safetensors")
            for file in folder.glob(pattern)
        )
        hint = f"; {', '.join(others[:3])} found, but not read" if others else ""
        raise BadInput(f"{folder}: it has neither {SINGLE} nor {INDEX}{hint}")
    weight_map = _weight_map(folder / INDEX)
    tensors: dict[str, StoredTensor] = {}
    home: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if not path_exists(folder / shard):
            raise BadInput(
                f"{folder / INDEX}: names the shard {shard}, which is missing; download it again"
            )
        for name, tensor in _file_tensors(folder / shard).items():
            if name in home:
                raise BadInput(
                    f"{folder}: tensor {name} is in two shards, {home[name]} and {shard}"
                )
            tensors[name], home[name] = tensor, shard
    lacking = [name for name, shard in weight_map.items() if home.get(name) != shard]
    if lacking:
        name = lacking[0]
        more = f" (and {len(lacking) - 1} more such tensors)" if lacking[1:] else ""
        raise BadInput(
            f"{folder / INDEX}: tensor {name} is said to be in {weight_map[name]}, "
            f"but is not there{more}; download it again"
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise BadInput(
            f"{index}: malformed: expected an object 'weight_map' of tensor name to file name"
        )
    for shard in sorted(set(weight_map.values())):
        # Only the name is checked: in a hub cache the files themselves are links out of the folder.
        if not is_plain_name(shard):
            raise BadInput(
                f"{index}: the shard name {shard!r} points outside the folder; "
                "expected a plain file name"
            )
    return weight_map


def _file_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file: the length of the header in 8 bytes, the header in JSON, data."""
    start, header = _header(file)
    tensors = {}
    for name, entry in header.items():
        at = f"{name}@{start + entry['data_offsets'][0]}"
        shape, dtype = tuple(entry["shape"]), entry["dtype"].lower()
        tensors[name] = StoredTensor(name, shape, dtype, file, at, _loader(file, name))
    return tensors


def _header(file: Path):
    """(where the data starts, header without its metadata).

    The library safetensors itself validates the header.
    """
    refuse_pointer(file)
    prefix = read_bytes(file, 0, 8)
    status = file.stat()
    if len(prefix) < 8:
        raise BadInput(
            f"{file}: not a safetensors file: it has {len(prefix)} bytes; download it again"
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > _LONGEST_HEADER:
        raise BadInput(
            f"{file}: not a safetensors file: it begins with {prefix}, where a header of {length} "
            "bytes would be announced; download it again"
        )
    if 8 + length > status.st_size:
        raise BadInput(
            f"{file}: its header should have {length} bytes, but the file has {status.st_size}: "
            f"truncated, or not a safetensors file"
        )
    try:
        with safe_open(file, framework="np"):
            pass
        header = json_object(read_bytes(file, 8, length))
    except (SafetensorError, ValueError, OSError) as error:
        problem = _past_the_end(file, length, status.st_size) or f"broken safetensors file: {error}"
        raise BadInput(f"{file}: {problem}; download it again") from None
    header.pop("__metadata__", None)
    return 8 + length, header


def _past_the_end(file: Path, length: int, size: int) -> str | None:
    """Which tensor lies past the end of the file, where the header is sound enough to tell."""
    try:
        header = json_object(read_bytes(file, 8, length))
        ends = {
            name: 8 + length + entry["data_offsets"][1]
            for name, entry in header.items()
            if name != "__metadata__"
        }
        name = max(ends, key=lambda name: ends[name])
        return (
            f"tensor {name} ends at byte {ends[name]}, past the end of the file ({size} bytes)"
            if ends[name] > size
            else None
        )
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def _loader(file: Path, name: str) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        try:
            with safe_open(file, framework="np") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: tensor {name} cannot be read: {error}") from None

    return load
