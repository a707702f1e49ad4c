"""GGUF files as trees of JSON values and back, whatever the values are."""

import json
import struct
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from atd.checkpoint.gguf_header import read_header
from tests.fuzz.mutate import Mutator, change_bytes, change_tree

ALIGNMENT = 32


def tree_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Returns the header of a sound GGUF file as a tree (metadata, and name, sizes, type and offset
    of tensors), and its data.
    """
    metadata, tensors = read_header(path)
    start = min(tensor.offset for tensor in tensors.values())
    rows = [
        [name, list(reversed(t.shape)), int(t.quantization), t.offset - start]
        for name, t in tensors.items()
    ]
    tree = {"version": 3, "metadata": metadata, "tensors": rows}
    return tree, path.read_bytes()[start:]


def changer(tree: dict[str, Any], data: bytes) -> Mutator:
    """Returns a mutator of the file of this tree: of the bytes of its header, or of its values."""

    def change(random: Random, sound: bytes) -> bytes:
        while random.random() < 0.6:
            with suppress(
                AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error
            ):
                return bytes_of(change_tree(random, json.loads(json.dumps(tree))), data)
        return change_bytes(random, sound[: len(sound) - len(data)]) + data

    return change


def bytes_of(tree: dict[str, Any], data: bytes = b"") -> bytes:
    """Returns a GGUF file. Raises exceptions of several kinds for a tree that has another form."""
    metadata, tensors = tree["metadata"], tree["tensors"]
    parts = [b"GGUF", struct.pack("<IQQ", tree["version"], len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    for name, sizes, kind, offset in tensors:
        parts += [_string(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", kind, offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % ALIGNMENT) + data


def _string(text: str) -> bytes:
    encoded = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    kind = _kind(value)
    return struct.pack("<I", kind) + _plain(kind, value)


def _kind(value: Any) -> int:
    match value:
        case bool():
            return 7
        case int():
            return 4 if 0 <= value < 1 << 32 else 11 if value < 1 << 63 else 10
        case float():
            return 12
        case str():
            return 8
        case _:
            return 9


def _plain(kind: int, value: Any) -> bytes:
    if kind == 8:
        return _string(value)
    if kind != 9:
        return struct.pack({7: "<?", 4: "<I", 10: "<Q", 11: "<q", 12: "<d"}[kind], value)
    inner = _kind(value[0]) if value else 4
    return struct.pack("<IQ", inner, len(value)) + b"".join(_plain(inner, item) for item in value)
