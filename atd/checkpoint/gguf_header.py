"""Reads the header of a GGUF file: its metadata, and where each tensor lies.

    metadata, tensors = read_header(path)
    metadata["general.architecture"], tensors["token_embd.weight"].shape

`gguf.GGUFReader` makes an array of every token and merge, which takes 3 s for a vocabulary of
49152; this parser takes 0.04 s. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from atd.checkpoint.files import read_bytes, refuse_pointer
from atd.errors import BadInput

# Stored as they are.
PLAIN = {GGMLQuantizationType[name.upper()]: name for name in ("f32", "f16", "bf16", "f64")}
# Type of a metadata value -> code of struct.
_CODES: dict[int, str] = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
OWN = "atd.sha256"  # a key of the files that atd writes (`atd.checkpoint.gguf_file`)
# Types that programs other than llama.cpp have added.
_FORKS = {
    36: "; bitnet.cpp has its I2_S under this number: use the model's Hugging Face folder",
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file."""

    file: Path
    name: str
    shape: tuple[int, ...]  # numpy's, [rows, inputs] of a matrix; the file has it in reverse
    quantization: GGMLQuantizationType
    offset: int  # in the file
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Reads the header of a GGUF file: (metadata, tensors by name).

    Metadata values are int, float, bool, str, or lists of one of them or of lists. Every tensor
    lies within the file, in whole rows of blocks.

    Raises BadInput for a file that is absent, truncated or damaged.
    """
    refuse_pointer(path)
    if read_bytes(path, 0, 4) != b"GGUF":
        raise BadInput(f"{path}: not a whole GGUF file: it does not start with 'GGUF'")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(path, data)
        except (struct.error, OverflowError, IndexError):
            raise BadInput(
                f"{path}: not a whole GGUF file: its header goes past the end ({len(data)} bytes): "
                f"truncated; download it again"
            ) from None
        except (KeyError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput(
                f"{path}: not a whole GGUF file: unknown value {error} in its header; "
                "download it again"
            ) from None


def _parse(path: Path, data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    cursor = _Cursor(data, 4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise BadInput(
            f"{path}: GGUF version {version} (or a big-endian file); "
            "little-endian versions 2 and 3 are read"
        )
    tensor_count, key_count = cursor.numbers("Q", 2)
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}  # shape, type, offset among the data
    for _ in range(tensor_count):
        name = cursor.string()
        if name in found:
            raise BadInput(f"{path}: it has tensor {name} twice")
        shape = tuple(reversed(cursor.numbers("Q", cursor.number("I"))))
        found[name] = (shape, cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", 32) or 32
    if not isinstance(alignment, int):
        raise BadInput(f"{path}: general.alignment is {alignment!r}; expected an integer")
    start = -(-cursor.offset // alignment) * alignment
    return metadata, {
        name: _tensor(path, name, *info, start, len(data)) for name, info in found.items()
    }


class _Cursor:
    """Reads values one after the other; raises struct.error past the end."""

    def __init__(self, data: mmap.mmap, offset: int):
        self.data, self.offset = data, offset

    def number(self, code: str):
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> list:
        form = f"<{count}{code}"
        values = struct.unpack_from(form, self.data, self.offset)
        self.offset += struct.calcsize(form)
        return list(values)

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Strings, each behind its length in bytes; one loop, as there may be 100,000 of them."""
        length, data, size = struct.Struct("<Q").unpack_from, self.data, len(self.data)
        found, end = [], self.offset
        for _ in range(count):
            start = end + 8
            end = start + length(data, end)[0]
            if end > size:  # a slice would be cut there
                raise struct.error("string past the end")
            found.append(data[start:end].decode("utf-8"))
        self.offset = end
        return found

    def value(self, kind: int):
        """A metadata value of a GGUF value type."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_CODES[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind == _ARRAY:
            return [self.value(_ARRAY) for _ in range(count)]
        return self.strings(count) if kind == _STRING else self.numbers(_CODES[kind], count)


def _tensor(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, size: int
) -> GGUFTensor:
    """The tensor that a header describes, in a file of `size` bytes whose data begin at `start`."""
    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError:
        raise BadInput(
            f"{path}: tensor {name} has the quantization type {kind}, "
            f"which the package gguf does not know{_FORKS.get(kind, '')}"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if not shape or shape[-1] % block:
        raise BadInput(
            f"{path}: tensor {name} {list(shape)}: "
            f"its rows are no multiple of the {block} weights of a {quantization.name} block"
        )
    nbytes = math.prod(shape) // block * block_bytes
    tensor = GGUFTensor(path, name, shape, quantization, start + offset, nbytes)
    end = tensor.offset + tensor.nbytes
    if end > size:
        raise BadInput(
            f"{path}: tensor {name} ends at byte {end}, past the end of the file ({size} bytes): "
            f"truncated; download it again"
        )
    return tensor
