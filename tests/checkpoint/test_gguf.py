"""Ternary tensors of GGUF files, and files in several parts."""

import json
import shutil
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from atd.checkpoint.gguf_config import gguf_config
from atd.checkpoint.gguf_header import GGUFTensor, read_header
from atd.checkpoint.gguf_tokenizer import open_gguf_tokenizer
from atd.checkpoint.reader import checkpoint_contents
from atd.errors import BadInput
from atd.models import frontend
from atd.models.model import load
from atd.passes.fold_norms import FoldNorms
from atd.passes.rotate import Rotate
from atd.pipeline import Pipeline
from atd.pipeline.convert import convert
from tests.golden.write_gguf import (
    GOLDEN,
    TERNARY_CONFIG,
    permuted,
    ternary_model,
    write_gguf,
    write_model,
)

KINDS = gguf.GGMLQuantizationType


def refused(path: Path, *words: str) -> None:
    with pytest.raises(BadInput) as caught:
        frontend.open(path)
    for word in words:
        assert word in str(caught.value), caught.value


# --- ternary tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_ternary_tensors_stay_ternary(tmp_path, kind):
    tensors = ternary_model()
    write_model(tmp_path / "m.gguf", TERNARY_CONFIG, tensors, KINDS[kind])
    refs = {ref.tensor: ref for _, ref in frontend.open(tmp_path / "m.gguf").weights()}
    for name, array in tensors.items():
        if "_proj" in name:
            group = "row" if array.shape[1] == 256 else 256
            text = f"packed n=1 g={group} free layout=aligned/1 f16[{array.shape[0]},"
            assert str(refs[name].type).startswith(text)
            np.testing.assert_array_equal(refs[name].dense(), array, err_msg=name)


def test_a_ternary_model_runs_as_the_dense_one_does(tmp_path):
    tensors = ternary_model()
    write_model(tmp_path / "ternary.gguf", TERNARY_CONFIG, tensors, KINDS.TQ2_0)
    embedding = gguf.quants.quantize(tensors["model.embed_tokens.weight"], KINDS.TQ2_0)
    tensors["model.embed_tokens.weight"] = gguf.quants.dequantize(embedding, KINDS.TQ2_0)
    write_model(tmp_path / "dense.gguf", TERNARY_CONFIG, tensors, KINDS.F32)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    unpacked = partial(load, backend="xla-unpacked")
    ternary, dense = (unpacked(tmp_path / f"{name}.gguf")(tokens) for name in ("ternary", "dense"))
    np.testing.assert_array_equal(ternary, dense)


def changed(path: Path, tensor: str, change) -> None:
    """Changes the blocks of a tensor in place, uint8 [rows, bytes]."""
    entry = read_header(path)[1][tensor]
    data = bytearray(path.read_bytes())
    span = slice(entry.offset, entry.offset + entry.nbytes)
    blocks = np.frombuffer(bytes(data[span]), np.uint8).reshape(entry.shape[0], -1).copy()
    change(blocks)
    data[span] = blocks.tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((0, b"\xff\xff"), "2 bytes of its TQ2_0 blocks hold the code 3; expected 0, 1 or 2"),
        ((64, b"\x00\x7e"), "its scales hold NaN or Inf"),
    ],
)
def test_damaged_ternary_blocks_are_refused_by_name(tmp_path, value, words):
    path = tmp_path / "m.gguf"
    write_model(path, TERNARY_CONFIG, ternary_model(), KINDS.TQ2_0)
    at, new = value

    def change(blocks: np.ndarray) -> None:
        blocks[3, at : at + 2] = np.frombuffer(new, np.uint8)

    changed(path, "blk.0.ffn_down.weight", change)
    refs = {ref.tensor: ref for _, ref in frontend.open(path).weights()}
    with pytest.raises(BadInput) as caught:
        refs["model.layers.0.mlp.down_proj.weight"].load()
    assert f"{path}: tensor blk.0.ffn_down.weight: {words}" in str(caught.value)


def test_a_ternary_tensor_of_the_wrong_shape(tmp_path):
    tensors = ternary_model()
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((256, 256), np.float32)
    write_model(tmp_path / "m.gguf", TERNARY_CONFIG, tensors, KINDS.TQ1_0)
    refused(tmp_path / "m.gguf", "down_proj.weight has the shape [256, 256], expected [256, 512]")


def test_a_gemma3_file_with_what_gemma_2_has_is_refused(tmp_path):
    softcap = {"gemma3.final_logit_softcapping": 30.0}
    write_gguf(tmp_path / "m.gguf", "gemma3", KINDS.F32, softcap)
    refused(tmp_path / "m.gguf", "gemma3.final_logit_softcapping is not supported")


# --- files in several parts -----------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """A model in three or more parts."""
    tensors = ternary_model()
    write_model(tmp_path / "m.gguf", TERNARY_CONFIG, tensors, KINDS.TQ2_0, split_max_tensors=4)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_a_split_file_is_one_model(tmp_path, parts):
    assert len(parts) == 3
    write_model(tmp_path / "whole.gguf", TERNARY_CONFIG, ternary_model(), KINDS.TQ2_0)
    split, whole = frontend.open(parts[0]), frontend.open(tmp_path / "whole.gguf")
    assert str(split) == str(whole)
    for (_, one), (_, other) in zip(split.weights(), whole.weights(), strict=True):
        np.testing.assert_array_equal(one.dense(), other.dense())
    assert set(checkpoint_contents(parts[0]).digests) == set(parts)


def test_parts_that_are_missing_are_named(parts):
    parts[1].unlink()
    refused(parts[0], "the first of 3 parts", f"{parts[1].name} is missing", "download it again")
    parts[2].unlink()
    refused(parts[0], f"{parts[1].name}, {parts[2].name} is missing")


def test_any_part_but_the_first_names_the_first(parts):
    refused(parts[2], "split.no is 2", f"give {parts[0].name}")


def test_a_part_under_another_name(tmp_path, parts):
    parts[0].rename(tmp_path / "other.gguf")
    refused(tmp_path / "other.gguf", "one of 3 parts", "NAME-00001-of-0000N.gguf", "--merge")


def test_parts_that_disagree(tmp_path, parts):
    original = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    refused(parts[0], parts[1].name, "split.no is 2, expected 1", "not of one file")
    parts[1].write_bytes(original[:100])
    refused(parts[0], parts[1].name, "truncated")
    # of another model
    tensors = {name: array for name, array in ternary_model().items() if "gate" not in name}
    folder = tmp_path / "other"
    folder.mkdir()
    write_model(folder / "m.gguf", TERNARY_CONFIG, tensors, KINDS.TQ2_0, split_max_tensors=4)
    parts[1].write_bytes((folder / parts[1].name).read_bytes())
    refused(parts[0], parts[1].name, "split.tensors.count is 10, expected 11")


def test_a_tensor_in_two_parts(parts):
    data = parts[2].read_bytes()
    parts[2].write_bytes(data.replace(b"blk.0.ffn_down.weight", b"blk.0.ffn_norm.weight"))
    refused(parts[0], parts[2].name, f"tensor blk.0.ffn_norm.weight is in {parts[0].name} too")


def test_the_tokenizer_of_a_split_file_is_that_of_its_first_part(parts):
    with pytest.raises(BadInput, match=r"no tokenizer\.ggml\.model"):
        open_gguf_tokenizer(parts[0])


# --- architectures --------------------------------------------------------------------------------


def test_qwen3_keeps_the_order_of_rows_and_the_norms_of_q_and_k(tmp_path):
    tensors = write_gguf(tmp_path / "m.gguf", "qwen3", KINDS.F32)
    graph = frontend.open(tmp_path / "m.gguf")
    refs = {ref.tensor: ref for _, ref in graph.weights()}
    assert set(refs) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(refs[name].dense(), array, err_msg=name)
    query = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert not np.array_equal(permuted(query, 4), query)


def test_gemma3_is_the_model_of_its_folder(tmp_path):
    """To rounding: the file holds gains 1 + w, and query_pre_attn_scalar is head_dim, as llama.cpp
    has it for all sizes but 27B.
    """
    shutil.copytree(GOLDEN / "gemma3", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= {"query_pre_attn_scalar": config["head_dim"]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    write_gguf(tmp_path / "m.gguf", "gemma3", KINDS.F32)
    graph, folder = frontend.open(tmp_path / "m.gguf"), frontend.open(tmp_path / "hf")
    assert str(graph) == str(folder)
    tokens = np.load(GOLDEN / "gemma3" / "logits.npz")["tokens"]
    np.testing.assert_allclose(load(graph)(tokens), load(folder)(tokens), atol=2e-4)


BITNET_CONFIG = {
    "model_type": "bitnet",
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
}


def bitnet_folder(folder: Path, hidden_act: str) -> dict[str, np.ndarray]:
    """Writes a model of the family bitnet with random dense weights; returns its tensors."""
    random, (hidden, mlp) = np.random.default_rng(0), (32, 48)
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.attn_sub_norm": hidden, "mlp.ffn_sub_norm": mlp}
    matrices = {f"self_attn.{part}_proj": (16, hidden) for part in "kv"}
    matrices |= {f"self_attn.{part}_proj": (hidden, hidden) for part in "qo"}
    matrices |= {f"mlp.{part}_proj": (mlp, hidden) for part in ("gate", "up")}
    shapes = {"model.embed_tokens": (48, hidden), "model.norm": (hidden,)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.{name}": (width,) for name, width in norms.items()}
        shapes |= {f"{layer}.{name}": shape for name, shape in matrices.items()}
        shapes[f"{layer}.mlp.down_proj"] = (hidden, mlp)
    tensors = {
        f"{name}.weight": ((len(s) == 1) + 0.3 * random.standard_normal(s)).astype(np.float32)
        for name, s in shapes.items()
    }
    folder.mkdir()
    config = BITNET_CONFIG | {"hidden_act": hidden_act}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize(
    ("architecture", "hidden_act"), [("bitnet", "silu"), ("bitnet-b1.58", "relu2")]
)
def test_bitnet_is_the_model_of_its_folder(tmp_path, architecture, hidden_act):
    tensors = bitnet_folder(tmp_path / "hf", hidden_act)
    path = tmp_path / "m.gguf"
    prefix = f"{architecture}.rope.scaling"  # of what llama.cpp's converter writes
    scaling = {f"{prefix}.type": "linear", f"{prefix}.factor": 1.0}
    write_model(path, BITNET_CONFIG, tensors, KINDS.F32, scaling, architecture=architecture)
    graph, folder = frontend.open(path), frontend.open(tmp_path / "hf")
    assert str(graph) == str(folder)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.testing.assert_array_equal(load(graph)(tokens), load(folder)(tokens))


def test_the_activation_of_a_bitnet_file():
    embedding = GGUFTensor(Path(), "token_embd.weight", (128256, 2560), KINDS.F16, 0, 0)
    keys = {"embedding_length": 2560, "block_count": 30, "feed_forward_length": 6912}
    keys |= {"attention.head_count": 20, "attention.layer_norm_rms_epsilon": 1e-5}
    keys |= {"context_length": 4096}

    def hidden_act(**other: int) -> str:
        metadata: dict = {f"bitnet.{key}": value for key, value in (keys | other).items()}
        metadata["general.architecture"] = "bitnet"
        config = gguf_config(Path("m.gguf"), metadata, {embedding.name: embedding}, np.asarray)
        return config["hidden_act"]

    assert hidden_act() == "relu2"  # bitnet-b1.58-2B-4T
    assert hidden_act(block_count=26) == "silu"


def test_scales_beside_a_matrix_are_refused(tmp_path):
    tensors = bitnet_folder(tmp_path / "hf", "silu")
    tensors["model.layers.0.self_attn.q_proj.scale"] = np.full(1, 0.5, np.float32)
    write_model(tmp_path / "m.gguf", BITNET_CONFIG, tensors, KINDS.F32)
    refused(tmp_path / "m.gguf", "tensor blk.0.attn_q.scale is a factor of all outputs")


def test_recipes_take_a_bitnet_file_or_say_why_not(tmp_path):
    path = tmp_path / "m.gguf"
    write_model(path, BITNET_CONFIG, bitnet_folder(tmp_path / "hf", "silu"), KINDS.F32)
    out = convert(path, tmp_path / "out", "datafree2", say=lambda line: None)
    assert np.isfinite(load(out)(np.arange(6, dtype=np.int32)[None])).all()
    graph, tokens = frontend.open(path), np.arange(12, dtype=np.int32).reshape(2, 6)
    turned = Pipeline([FoldNorms(), Rotate(r2=False)])(graph)
    np.testing.assert_allclose(load(turned)(tokens), load(graph)(tokens), atol=2e-4)
    with pytest.raises(BadInput, match=r"output of .*attention must go to a linear alone; use r2"):
        convert(path, tmp_path / "ternary", "ternary2", say=lambda line: None)
