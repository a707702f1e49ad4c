"""Checkpoints of Hugging Face's `bitnet`: logits of transformers, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from atd.errors import BadInput
from atd.ir.rewrite import with_activations
from atd.models import frontend
from atd.models.bitnet import is_converted
from atd.models.model import load

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = ("bitnet_llama", "bitnet_norms", "bitnet_falcon3", "bitnet_2b4t", "bitnet_online")
# Of the largest logit. Without the 8-bit inputs the difference is a hundred times this.
TOLERANCE = 2e-5


def distance(graph, kind: str, **options) -> float:
    """The largest difference from transformers, over the largest logit."""
    golden = np.load(GOLDEN / kind / "logits.npz")
    found = np.asarray(load(graph, **options)(golden["tokens"]))
    return float(np.abs(found - golden["logits"]).max() / np.abs(golden["logits"]).max())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind):
    graph = frontend.open(GOLDEN / kind)
    assert distance(graph, kind) < TOLERANCE
    assert distance(with_activations(graph, "float"), kind) > 50 * TOLERANCE


def test_packed_codes_give_the_same():
    graph = frontend.open(GOLDEN / "bitnet_falcon3")
    assert distance(graph, "bitnet_falcon3", backend="xla") < TOLERANCE


def test_types_and_attrs():
    graph = frontend.open(GOLDEN / "bitnet_norms")
    block = graph.blocks[0]
    linear, norm = block.node("self_attn.q_proj"), block.node("self_attn.q_proj.rms_norm")
    assert str(linear.weights["weight"].type) == (
        "packed n=1 g=tensor free layout=hf-bitnet/1 f32[32,32]"
    )
    assert linear.attrs["activations"] == "int8"
    assert linear.inputs == (norm.name,)
    assert norm.attrs == {"eps": 1e-6}
    assert "activations" not in graph.epilogue.node("lm_head").attrs
    assert "quantization_config" not in graph.config


def test_modules_that_stay_dense():
    assert not is_converted("lm_head", ("lm_head",))
    assert not is_converted("model.layers.1.mlp.up_proj", ("model.layers.1",))
    assert not is_converted("model.layers.1.mlp.up_proj", ("up_proj",))
    assert not is_converted("model.layers.11.mlp.up_proj", ("model.layers.*",))
    assert is_converted("model.layers.11.mlp.up_proj", ("model.layers.1", "lm_head", "gate"))


# --- bad input ------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def changed(tmp_path, kind="bitnet_llama", quantization=None, **tensors) -> Path:
    """A copy of a golden checkpoint with other tensors; of q_proj, by the last part of the name."""
    folder = tmp_path / kind
    shutil.copytree(GOLDEN / kind, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization or {}
    (folder / "config.json").write_text(json.dumps(config))
    found = load_file(folder / "model.safetensors")
    found |= {f"{Q}.{name}": array for name, array in tensors.items()}
    save_file(found, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (np.zeros(1, np.float32), rf"{Q}\.weight_scale is 0\.0; expected a number above 0"),
        (np.full(1, np.nan, np.float32), rf"{Q}\.weight_scale is nan; expected"),
        (np.ones(3, np.float32), rf"{Q}\.weight_scale has the shape \[3\], expected \[1\]"),
    ],
)
def test_scales_that_cannot_be(tmp_path, scale, message):
    folder = changed(tmp_path, weight_scale=scale)
    with pytest.raises(BadInput, match=message):
        frontend.open(folder)


def test_the_code_3_is_refused_with_file_and_tensor(tmp_path):
    codes = np.full((8, 32), 0b11, np.uint8)
    graph = frontend.open(changed(tmp_path, weight=codes))
    with pytest.raises(BadInput, match=rf"model\.safetensors: tensor {Q}\.weight: 256 bytes hold"):
        load(graph)


def test_codes_of_another_shape(tmp_path):
    folder = changed(tmp_path, weight=np.zeros((32, 8), np.uint8))
    expected = rf"{Q}\.weight has the shape \[32, 8\], expected \[8, 32\]"
    with pytest.raises(BadInput, match=expected):
        frontend.open(folder)


@pytest.mark.parametrize(
    "key",
    [
        {"linear_class": "bytelinear"},
        {"quantization_mode": "later"},
        {"use_rms_norm": "yes"},
        {"rms_norm_eps": -1},
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": ["(a+)+$"]},
    ],
)
def test_keys_that_transformers_does_not_know(tmp_path, key):
    with pytest.raises(BadInput, match=rf"quantization_config\.{next(iter(key))} is .*; expected"):
        frontend.open(changed(tmp_path, quantization=key))


def test_a_tied_head_cannot_be_ternary(tmp_path):
    with pytest.raises(BadInput, match="expected lm_head in it"):
        frontend.open(changed(tmp_path, "bitnet_2b4t", {"modules_to_not_convert": []}))
