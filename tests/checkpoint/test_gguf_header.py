"""The header parser against the reader of the package gguf."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from atd.checkpoint.gguf_header import read_header
from atd.errors import BadInput


def write(path: Path, alignment: int = 32) -> Path:
    """A GGUF file with every type of value, arrays, and tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    numbers = {
        "uint8": 200,
        "int8": -5,
        "uint16": 2**16 - 1,
        "int16": -(2**15),
        "uint32": 2**32 - 1,
        "int32": -(2**31),
    }
    numbers |= {
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.1,
        "float64": 0.1,
        "bool": True,
    }
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(name, value)
    writer.add_string("text", "é ▁\n")
    writer.add_string("nothing", "")
    writer.add_array("texts", [f"▁{i}" for i in range(3000)])
    writer.add_array("ints", list(range(-5, 3000)))
    writer.add_array("floats", [0.5, -1e9])
    writer.add_array("bools", [True, False])
    writer.add_tensor("vector", np.arange(5, dtype=np.float16))
    writer.add_tensor(
        "matrix", np.zeros((3, 68), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("deep", np.zeros((2, 3, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "m.gguf")


@pytest.mark.parametrize("alignment", [8, 32, 1024])
def test_metadata_and_tensors_are_those_of_the_gguf_package(tmp_path, alignment):
    file = write(tmp_path / "m.gguf", alignment)
    metadata, tensors = read_header(file)
    reader = gguf.GGUFReader(file)
    expected = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert metadata == expected
    assert len(metadata) == 18
    assert {key: type(value) for key, value in metadata.items()} == {
        key: type(v) for key, v in expected.items()
    }
    assert set(tensors) == {"vector", "matrix", "deep"}
    for tensor in reader.tensors:
        found = tensors[tensor.name]
        assert found.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (found.quantization, found.offset, found.nbytes) == (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )


def test_arrays_of_arrays(tmp_path):
    def number(value: int, size: int = 4) -> bytes:
        return value.to_bytes(size, "little")

    def file(value: bytes) -> Path:
        key = number(3, 8) + b"key"
        header = b"GGUF" + number(3) + number(0, 8) + number(1, 8) + key + number(9) + value
        (tmp_path / "m.gguf").write_bytes(header)
        return tmp_path / "m.gguf"

    numbers = number(4) + number(2, 8) + number(5) + number(6)
    words = number(8) + number(1, 8) + number(1, 8) + b"a"
    metadata, _ = read_header(file(number(9) + number(2, 8) + numbers + words))
    assert metadata == {"key": [[5, 6], ["a"]]}
    with pytest.raises(BadInput, match="not a whole GGUF file"):
        read_header(file((number(9) + number(1, 8)) * 100_000))


@pytest.mark.parametrize(
    ("position", "data", "words"),
    [
        (0, b"GGML", "does not start with 'GGUF'"),
        (4, b"\x01", "GGUF version 1"),
        (4, b"\x00\x00\x00\x03", "or a big-endian file"),
        (8, b"\xff" * 8, "goes past the end"),
        (16, b"\xff" * 8, "goes past the end"),
        (24, b"\xff" * 8, "goes past the end"),
        (32, b"\xff", "unknown value 'utf-8' codec"),
        (32 + len("general.architecture"), b"\x0d", "unknown value 13"),
    ],
)
def test_damage_is_told(file, position, data, words):
    whole = bytearray(file.read_bytes())
    whole[position : position + len(data)] = data
    file.write_bytes(whole)
    with pytest.raises(BadInput) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert words in str(caught.value)


def test_damaged_tensors_are_told(file):
    whole = file.read_bytes()
    at = whole.index(b"matrix") + len(
        "matrix"
    )  # u32 rank, u64 inputs, u64 rows, u32 type, u64 offset
    for offset, value, words in [
        (
            4,
            66,
            "tensor matrix [3, 66]: its rows are no multiple of the 32 weights of a Q8_0 block",
        ),
        (12, 10**6, "tensor matrix ends at byte"),
        (20, 250, "tensor matrix has the quantization type 250"),
    ]:
        damaged = bytearray(whole)
        damaged[at + offset : at + offset + 4] = value.to_bytes(4, "little")
        file.write_bytes(damaged)
        with pytest.raises(BadInput) as caught:
            read_header(file)
        assert words in str(caught.value)
