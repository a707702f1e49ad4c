import contextlib
import json
import os
import struct
import time
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from atd.checkpoint.reader import checkpoint_contents, open_checkpoint
from atd.checkpoint.safetensors import INDEX, SINGLE
from atd.errors import BadInput
from tests.golden.write_gguf import GOLDEN, llama3_divisors, write_gguf

CONFIG = {"model_type": "llama"}
A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.float16)


def folder_of(path: Path, tensors: dict | None = None, config: dict | str = CONFIG) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if tensors is not None:
        save_file(tensors, path / SINGLE)
    return path


def sharded(path: Path, shards: dict[str, dict], weight_map: dict | None = None) -> Path:
    folder_of(path)
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    if weight_map is None:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def raw_safetensors(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(path: Path, *words: str) -> str:
    """The message of the BadInput that opening raises: it names the path and has all the words."""
    with pytest.raises(BadInput) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message, message
    return message


# --- what is read ---------------------------------------------------------------------------------


def test_one_file_of_every_dtype(tmp_path):
    tensors = {
        "f32": A,
        "f16": B,
        "bf16": A.astype(ml_dtypes.bfloat16),
        "f64": A.astype(np.float64),
        "i8": A.astype(np.int8),
        "u8": A.astype(np.uint8),
        "i64": A.astype(np.int64),
    }
    checkpoint = open_checkpoint(folder_of(tmp_path / "m", tensors))
    assert checkpoint.config == CONFIG
    assert set(checkpoint.tensors) == set(tensors)
    for name, array in tensors.items():
        found = checkpoint.tensors[name]
        assert (found.name, found.shape, found.dtype) == (name, array.shape, name)
        read = checkpoint.read(name)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def test_shards(tmp_path):
    checkpoint = open_checkpoint(
        sharded(tmp_path / "m", {"a.safetensors": {"a": A}, "b.safetensors": {"b": B}})
    )
    np.testing.assert_array_equal(checkpoint.read("a"), A)
    np.testing.assert_array_equal(checkpoint.read("b"), B)


def test_shards_may_be_links_out_of_the_folder_as_in_a_hub_cache(tmp_path):
    path = sharded(tmp_path / "snapshot", {"a.safetensors": {"a": A}})
    (path / "a.safetensors").rename(tmp_path / "blob")
    (path / "a.safetensors").symlink_to("../blob")
    np.testing.assert_array_equal(open_checkpoint(path).read("a"), A)


def test_source_identifies_the_bytes(tmp_path):
    path = folder_of(tmp_path / "m", {"a": A, "b": B})

    def sources() -> dict[str, str]:
        tensors = open_checkpoint(path, checkpoint_contents(path).digests).tensors
        return {name: tensor.source for name, tensor in tensors.items()}

    first = sources()
    assert first["a"] != first["b"]
    os.utime(path / SINGLE, ns=(0, 12345))
    assert sources() == first  # the same bytes, whatever their times
    folder_of(path, {"a": A + 1, "b": B})
    os.utime(path / SINGLE, ns=(0, 12345))
    assert not set(sources().values()) & set(first.values())  # of equal size and time
    assert {t.source for t in open_checkpoint(path).tensors.values()} == {""}


def test_eight_billion_weights_open_at_once(tmp_path):
    """Headers alone: 16 GB of zeros that are on no disk (a sparse file). Processor time, for the
    machine may be busy.
    """
    header, end = {}, 0
    shapes = {
        "self_attn.q_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    for layer in range(36):
        for module, shape in shapes.items():
            size = 2 * shape[0] * shape[1]
            header[f"model.layers.{layer}.{module}.weight"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [end, end + size],
            }
            end += size
    path = folder_of(tmp_path / "m")
    (path / SINGLE).write_bytes(raw_safetensors(header))
    os.truncate(path / SINGLE, (path / SINGLE).stat().st_size + end)
    start = time.process_time()
    checkpoint = open_checkpoint(path)
    assert time.process_time() - start < 0.5
    assert sum(tensor.shape[0] * tensor.shape[1] for tensor in checkpoint.tensors.values()) > 6.9e9


# --- what is refused ------------------------------------------------------------------------------


def test_absent_or_no_checkpoint(tmp_path):
    refused(tmp_path / "none", "no such file or folder")
    refused(tmp_path / "none.gguf", "cannot be read")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a checkpoint")
    refused(tmp_path, "no config.json")
    refused(folder_of(tmp_path / "m"), SINGLE, INDEX)
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path / "m", "pytorch_model.bin")


def test_a_pointer_of_git_lfs_is_called_one(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    path = folder_of(tmp_path / "m", {"a": A})
    (tmp_path / "m.gguf").write_text(pointer)
    refused(tmp_path / "m.gguf", "m.gguf", "git lfs pull")
    for name in (SINGLE, "config.json"):
        (path / name).write_text(pointer)
        refused(path, name, "git lfs pull")


def test_a_page_saved_as_weights_is_no_file_of_weights(tmp_path):
    path = folder_of(tmp_path / "m", {"a": A})
    (path / SINGLE).write_text("<!DOCTYPE html>")
    refused(path, "not a safetensors file: it begins with b'<!DOCTYP'")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "\udc80x".encode("utf-8", "surrogateescape").decode("latin1"),
        '{"a": 1, "a": 2}',
        "[" * 100_000,
    ],
)
def test_config_is_no_json_object(tmp_path, text):
    refused(folder_of(tmp_path / "m", {"a": A}, text), "config.json", "no valid JSON object")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
@pytest.mark.parametrize("locked", ["", "config.json", SINGLE])
def test_no_permission(tmp_path, locked):
    path = folder_of(tmp_path / "m", {"a": A})
    for parent in list(tmp_path.parents)[:3]:  # pytest makes its folders for their owner alone
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    tmp_path.chmod(0o755)
    (path / locked).chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        refused(path, "cannot be read: Permission denied")
    finally:
        if user == 0:
            os.seteuid(0)
        (path / locked).chmod(0o755)


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("not a safetensors file", "0 bytes")),
        (b"abc", ("not a safetensors file", "3 bytes")),
        (raw_safetensors(GOOD)[:30], ("header", "truncated")),
        (struct.pack("<Q", 1 << 62) + b"{}", ("header", str(1 << 62))),
        (raw_safetensors(GOOD, b"\0" * 5), ("tensor a ends at byte", "past the end of the file")),
        (raw_safetensors(GOOD, b"\0" * 9), ("broken safetensors file",)),
        (raw_safetensors(b"not json"), ("broken safetensors file",)),
        (raw_safetensors(b"[" * 100_000), ("broken safetensors file",)),
        (
            raw_safetensors(
                {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8
            ),
            ("broken safetensors file",),
        ),
        (
            raw_safetensors(
                json.dumps(GOOD).encode()[:-1] + b"," + json.dumps(GOOD).encode()[1:], b"\0" * 8
            ),
            ("'a'", "twice"),
        ),
    ],
)
def test_broken_safetensors(tmp_path, content, words):
    path = folder_of(tmp_path / "m")
    (path / SINGLE).write_bytes(content)
    assert SINGLE in refused(path, *words)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        '{"weight_map": {"a": "\\ud800"}}',
    ],
)
def test_malformed_index(tmp_path, text):
    path = sharded(tmp_path / "m", {"a.safetensors": {"a": A}})
    (path / INDEX).write_text(text)
    refused(path, INDEX)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/tmp/secret.safetensors",
        "sub/a.safetensors",
        "..",
        "",
        "C:\\a",
        "a\0b",
        "x" * 256,
    ],
)
def test_index_that_points_outside(tmp_path, shard):
    save_file({"a": A}, tmp_path / "secret.safetensors")
    refused(sharded(tmp_path / "m", {}, {"a": shard}), INDEX, "outside the folder")


def test_shards_and_index_disagree(tmp_path):
    a, b = "a.safetensors", "b.safetensors"
    refused(sharded(tmp_path / "1", {a: {"a": A}}, {"a": a, "b": b}), b, "missing")
    refused(sharded(tmp_path / "2", {a: {"a": A}}, {"a": a, "b": a}), "tensor b", a)
    refused(
        sharded(tmp_path / "3", {a: {"a": A}, b: {"b": B}}, {"a": b, "b": b, "c": a}),
        "more such tensors",
    )
    refused(
        sharded(tmp_path / "4", {a: {"a": A}, b: {"b": B, "a": A}}, {"a": a, "b": b}),
        "tensor a",
        "two shards",
        a,
        b,
    )


def test_file_that_vanishes_after_opening(tmp_path):
    path = folder_of(tmp_path / "m", {"a": A})
    checkpoint = open_checkpoint(path)
    (path / SINGLE).unlink()
    with pytest.raises(BadInput, match="tensor a cannot be read"):
        checkpoint.read("a")


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("golden", ["llama_gqa", "llama_bias", "qwen2"])
def test_gguf_is_the_model_it_was_made_of(tmp_path, golden, quantization):
    kind = gguf.GGMLQuantizationType[quantization]
    tensors = write_gguf(tmp_path / "m.gguf", golden, kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert set(checkpoint.tensors) == set(tensors)
    for name, array in tensors.items():
        expected = array
        if (
            array.ndim == 2 and quantization != "F32"
        ):  # rows are quantized one by one, so the order of rows does not matter
            expected = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
            expected = expected.astype(ml_dtypes.bfloat16 if quantization == "BF16" else np.float16)
        found, read = checkpoint.tensors[name], checkpoint.read(name)
        assert found.shape == read.shape
        assert (
            found.dtype == {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[read.dtype.name]
        )
        assert read.dtype == expected.dtype
        np.testing.assert_array_equal(read, expected, err_msg=name)


@pytest.mark.parametrize("golden", ["llama_gqa", "llama_bias", "qwen2"])
def test_gguf_config_says_what_the_model_was(tmp_path, golden):
    write_gguf(tmp_path / "m.gguf", golden, gguf.GGMLQuantizationType.F32)
    config = open_checkpoint(tmp_path / "m.gguf").config
    original = json.loads((GOLDEN / golden / "config.json").read_text())
    for key in (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        assert config[key] == original[key]
    assert config["rms_norm_eps"] == original.get("rms_norm_eps", 1e-6)
    assert config["rope_theta"] == original.get("rope_theta", 1e4)
    assert config["tie_word_embeddings"] == original.get("tie_word_embeddings", False)
    assert config["attention_bias"] == original.get("attention_bias", False)
    assert config["mlp_bias"] == original.get("mlp_bias", False)
    assert config["bos_token_id"] == 1
    scaling = original.get("rope_scaling")
    assert config["rope_scaling"] == (
        scaling and {"rope_type": "linear", "factor": 2.5} if golden == "llama_bias" else scaling
    )


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.expert_count": 8}, "mixture of 8 experts"),
        ({"llama.rope.scaling.type": "dynamic"}, "rope scaling 'dynamic' is not supported"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4"),
        ({"split.count": 2}, "split GGUF"),
    ],
)
def test_gguf_models_that_are_not_supported(tmp_path, metadata, words):
    write_gguf(tmp_path / "m.gguf", "llama_gqa", gguf.GGMLQuantizationType.F32, metadata)
    refused(tmp_path / "m.gguf", words)


def test_gguf_of_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "m.gguf", "'gpt2' is not supported", "llama, qwen2")


def test_gguf_with_unknown_rope_divisors(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama_gqa", gguf.GGMLQuantizationType.F32)
    data = (tmp_path / "m.gguf").read_bytes()
    divisors = llama3_divisors(
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        1e4,
        16,
    )
    assert data.count(divisors.tobytes()) == 1
    (tmp_path / "m.gguf").write_bytes(
        data.replace(
            divisors.tobytes(), (divisors * np.linspace(1, 1.1, 8, dtype=np.float32)).tobytes()
        )
    )
    refused(tmp_path / "m.gguf", "rope_freqs.weight")


def test_gguf_cut_off_anywhere(tmp_path):
    """Whatever its length, a part of a GGUF file gets one clear message."""
    write_gguf(tmp_path / "m.gguf", "llama_gqa", gguf.GGMLQuantizationType.Q8_0)
    data = (tmp_path / "m.gguf").read_bytes()
    for length in [*range(64), *range(64, len(data), 997), len(data) - 1]:
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        refused(tmp_path / "cut.gguf")


def test_gguf_with_damaged_bytes_is_read_or_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", "qwen2", gguf.GGMLQuantizationType.Q8_0)
    data = (tmp_path / "m.gguf").read_bytes()
    random = np.random.default_rng(0)
    start = data.index(b"tokenizer.ggml.bos_token_id")
    for position in [*range(4, 400, 3), *random.integers(start, start + 1500, 200)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(random.integers(8))
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with contextlib.suppress(BadInput):
            open_checkpoint(tmp_path / "damaged.gguf")
