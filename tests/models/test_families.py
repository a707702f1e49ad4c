"""Every family: cached decoding, conversion, dense export, and what formats refuse.

Logits are compared with those of transformers in `tests.models.test_golden`.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from atd.errors import BadInput
from atd.exports.bitnet import export_bitnet
from atd.exports.gguf import export_gguf
from atd.exports.hf import export_hf
from atd.models import frontend
from atd.models.config import parse_config
from atd.models.model import load
from atd.models.structure import difference
from atd.passes.fold_norms import FoldNorms
from atd.passes.fuse import Fuse
from atd.passes.rotate import Rotate
from atd.pipeline import Pipeline
from atd.pipeline.convert import convert
from atd.pipeline.recipe import read_recipe
from tests.golden.write_gguf import GOLDEN, write_gguf

FAMILIES = ("smollm3", "phi3", "granite", "olmo2", "gemma2")
ROTATED = Pipeline([FoldNorms(), Rotate(r3=True), Fuse()])
UNROTATED = ("olmo2", "gemma2", "gemma3")  # whose residual stream stays as it is


def quiet(line: str) -> None:
    pass


def tokens_of(name: str) -> np.ndarray:
    return np.load(GOLDEN / name / "logits.npz")["tokens"]


def parsed(name: str, **changes):
    return parse_config(json.loads((GOLDEN / name / "config.json").read_text()) | changes, "m")


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_decode_are_the_forward_pass(name):
    model, tokens = load(GOLDEN / name), tokens_of(name)
    logits = np.asarray(model(tokens))
    last, cache = model.prefill(tokens[:, :8], model.new_cache(2, 24))
    for position in range(8, 24):
        np.testing.assert_allclose(last, logits[:, position - 1], atol=2e-4)
        last, cache = model.decode(tokens[:, position], cache)


@pytest.mark.parametrize("name", sorted({*FAMILIES, *UNROTATED}))
def test_rotated_models_are_the_same_and_say_what_is_left_out(tmp_path, name):
    lines, tokens = [], tokens_of(name)
    out = convert(GOLDEN / name, tmp_path / "out", ROTATED, say=lines.append)
    wanted = np.asarray(load(GOLDEN / name)(tokens))
    np.testing.assert_allclose(load(out)(tokens), wanted, atol=2e-4 * np.abs(wanted).max())
    dense = load(export_hf(out, tmp_path / "dense", say=quiet))
    np.testing.assert_allclose(dense(tokens), wanted, atol=2e-4 * np.abs(wanted).max())
    off = [line for line in lines if line.startswith("note: rotate: r1 is off, since")]
    assert len(off) == (name in UNROTATED)
    recipe = (out / "recipe.toml").read_text()
    assert ("r1 = false" in recipe) == ("r4 = true" in recipe) == (name in UNROTATED)


@pytest.mark.parametrize("name", UNROTATED)
def test_a_rotation_that_was_asked_for_is_refused(tmp_path, name):
    asked = {"overrides": ["rotate.r1=true"], "say": quiet}
    with pytest.raises(BadInput, match=r"layernorm is added to the residual.*use r1 = false"):
        convert(GOLDEN / name, tmp_path / "out", ROTATED, **asked)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*FAMILIES, *UNROTATED}))
def test_the_adaptive_recipe_converts(tmp_path, name):
    folder = tmp_path / "m"
    shutil.copytree(GOLDEN / name, folder)
    words = {f"w{i}": i for i in range(64)}
    Tokenizer(WordLevel(words, "w0")).save(str(folder / "tokenizer.json"))
    quick = [f"allocate.{key}bases=[1, 2, 3]" for key in ("", "embedding_")]
    quick += ["allocate.trellis=''", "calibrate.steps=2"]
    chosen = read_recipe("adaptive", ["allocate.bits=3.3", *quick])
    chosen = replace(chosen, calibration_tokens=2048)
    out = convert(folder, tmp_path / "out", chosen, cache=tmp_path / "cache", say=quiet)
    found, wanted = (np.asarray(load(m)(tokens_of(name))) for m in (out, folder))
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.5
    dense = export_hf(out, tmp_path / "dense", say=quiet)
    np.testing.assert_allclose(load(dense)(tokens_of(name)), found, atol=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dense_export_is_the_checkpoint_again(tmp_path, name):
    out = export_hf(GOLDEN / name, tmp_path / "same", say=quiet)
    stored, written = (tensors(folder) for folder in (GOLDEN / name, out))
    assert stored.keys() == written.keys()
    for tensor, array in stored.items():
        np.testing.assert_allclose(written[tensor], array, atol=1e-6, err_msg=tensor)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_export_refuses_by_name(tmp_path, name):
    with pytest.raises(BadInput, match=f"a model of type '{name}' cannot be exported as GGUF"):
        export_gguf(GOLDEN / name, tmp_path / "m.gguf", say=quiet)


# --- SmolLM3 --------------------------------------------------------------------------------------


def test_layers_of_smollm3_without_rope():
    assert parsed("smollm3").ropes == (True, True, True, False)
    assert parsed("smollm3", no_rope_layer_interval=2).ropes == (True, False) * 2
    assert parsed("smollm3", no_rope_layers=[0, 1, 1, 1, 0]).ropes == (False, True, True, True)
    graph = frontend.open(GOLDEN / "smollm3")
    assert [sum(n.op == "rope" for n in block.nodes) for block in graph.blocks] == [2, 2, 2, 0]


def test_windows_of_smollm3():
    windowed = {"use_sliding_window": True, "sliding_window": 5}
    assert parsed("smollm3", **windowed).windows == (0, 0, 0, 5)
    assert parsed("smollm3", use_sliding_window=True).windows == (0, 0, 0, 0)
    kinds = ["sliding_attention", *["full_attention"] * 3]
    assert parsed("smollm3", **windowed, layer_types=kinds).windows == (5, 0, 0, 0)


# --- Phi-3 ----------------------------------------------------------------------------------------


def test_short_sequences_of_phi3_have_short_factors():
    golden, model = np.load(GOLDEN / "phi3" / "logits.npz"), load(GOLDEN / "phi3")
    tokens, wanted = golden["tokens"][:, :12], golden["short"]
    np.testing.assert_allclose(model(tokens), wanted, atol=1e-4 * np.abs(wanted).max())
    last, cache = model.prefill(tokens[:, :7], model.new_cache(2, 16))
    for position in range(7, 12):
        np.testing.assert_allclose(last, wanted[:, position - 1], atol=2e-4)
        last, cache = model.decode(tokens[:, position], cache)


def test_joined_matrices_of_other_shapes_are_refused(tmp_path):
    joined = "model.layers.1.self_attn.qkv_proj.weight"
    arrays = tensors(GOLDEN / "phi3")
    refused(
        tmp_path, arrays | {joined: arrays[joined][1:]}, r"127, 64\], expected 64 \+ 32 \+ 32 rows"
    )
    del arrays[joined]
    refused(tmp_path, arrays, r"layers.1.self_attn.q_proj.weight \[64, 64\] is missing")


def refused(folder: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    save_file(arrays, folder / "model.safetensors")
    shutil.copy(GOLDEN / "phi3" / "config.json", folder)
    with pytest.raises(BadInput, match=message):
        frontend.open(folder)


@pytest.mark.parametrize(
    ("name", "held", "found"),
    [
        ("phi3", "joined matrices of Phi-3", "rows of qkv_proj"),
        ("granite", "multipliers of Granite", "multipliers in the weights"),
        ("gemma2", "gains of Gemma 2", "a gain of 1 \\+ w"),
    ],
)
def test_other_formats_do_not_hold_such_weights(tmp_path, name, held, found):
    with pytest.raises(BadInput, match=f"bitnet does not hold the {held}"):
        export_bitnet(GOLDEN / name, tmp_path / "out", say=quiet)
    assert re.search(found, str(difference(frontend.open(GOLDEN / name), "m")))


# --- Granite --------------------------------------------------------------------------------------


def test_multipliers_of_granite_are_in_its_weights():
    graph, stored = frontend.open(GOLDEN / "granite"), tensors(GOLDEN / "granite")
    dense = {ref.tensor: ref.dense() for _, ref in graph.weights()}
    layer = "model.layers.0"
    factors = {
        "model.norm.weight": 1 / 0.5,
        f"{layer}.self_attn.q_proj.bias": 0.25 * np.sqrt(8),
        f"{layer}.mlp.down_proj.weight": 0.7 / 3,
        f"{layer}.mlp.up_proj.weight": 1,
        "model.embed_tokens.weight": 1,
    }
    for tensor, factor in factors.items():
        np.testing.assert_allclose(dense[tensor], stored[tensor] * factor, rtol=1e-6)
    assert graph.blocks[0].nodes[0].attrs["eps"] == pytest.approx(1e-2 / 9)
    plain = dict.fromkeys(("residual_multiplier", "embedding_multiplier", "logits_scaling"))
    assert parsed("granite", **plain).residual_scale == 1.0


# --- OLMo 2 ---------------------------------------------------------------------------------------


def test_norms_of_olmo2():
    block = frontend.open(GOLDEN / "olmo2").blocks[0]
    assert block.node("self_attn.q_proj").inputs == ("x",)
    assert block.node("mlp.up_proj").inputs == ("self_attn.residual",)
    assert block.node("mlp.residual").inputs == ("self_attn.residual", "post_feedforward_layernorm")
    norms = {
        node.name: node.weights["weight"].type.shape for node in block.nodes if "eps" in node.attrs
    }
    assert norms == {
        "self_attn.q_norm": (32,),
        "self_attn.k_norm": (16,),
        "post_attention_layernorm": (32,),
        "post_feedforward_layernorm": (32,),
    }


def test_a_gguf_file_of_olmo3_is_refused(tmp_path):
    window = {"olmo2.attention.sliding_window": 4096}
    write_gguf(tmp_path / "m.gguf", "olmo2", gguf.GGMLQuantizationType.F32, window)
    with pytest.raises(BadInput, match=r"OLMo 3 .* is not supported"):
        frontend.open(tmp_path / "m.gguf")


# --- Gemma 2 --------------------------------------------------------------------------------------


def test_softcaps_and_windows_of_gemma2():
    found = parsed("gemma2")
    assert (found.attention_softcap, found.logit_softcap, found.windows) == (3.0, 30.0, (6, 0, 6))
    keys = ("attn_logit_softcapping", "final_logit_softcapping")
    none = parsed("gemma2", **dict.fromkeys(keys))
    assert (none.attention_softcap, none.logit_softcap) == (None, None)
    config = json.loads((GOLDEN / "gemma2" / "config.json").read_text())
    absent = parse_config({k: v for k, v in config.items() if k not in keys}, "m")
    assert (absent.attention_softcap, absent.logit_softcap) == (50.0, 30.0)


def test_a_gguf_file_of_gemma2_is_the_model_of_its_folder(tmp_path):
    """llama.cpp takes head_dim for query_pre_attn_scalar, but in the 27B model."""
    shutil.copytree(GOLDEN / "gemma2", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"query_pre_attn_scalar": 16}))
    write_gguf(tmp_path / "m.gguf", "gemma2", gguf.GGMLQuantizationType.F32)
    found, wanted = (load(tmp_path / m)(tokens_of("gemma2")) for m in ("m.gguf", "hf"))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "smollm3",
            {"no_rope_layers": [1, 0]},
            r"no_rope_layers is \[1, 0\]; expected 0 .*4 layers",
        ),
        ("smollm3", {"no_rope_layers": [2, 1, 1, 1]}, "no_rope_layers is"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("phi3", {"partial_rotary_factor": 0.2}, "3 of 16 features of a head"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("phi3", {"partial_rotary_factor": 0.5}, "short_factor is .* a list of 4 positive numbers"),
        ("phi3", {"rope_scaling": {"type": "linear2"}}, "rope type 'linear2' is not supported"),
        ("phi3", {"sliding_window": 0}, "sliding_window is 0"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0; expected a positive"),
        ("granite", {"logits_scaling": "8"}, "logits_scaling is '8'; expected a positive number"),
        ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0; expected a"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types is .* each of 3 layers"),
        ("gemma2", {"sliding_window": None}, "has sliding_attention, but sliding_window missing"),
        ("smollm3", {"layer_types": ["full_attention"]}, "layer_types is .* for each of 4 layers"),
    ],
)
def test_what_a_config_says_wrongly(name, changes, message):
    with pytest.raises(BadInput, match=message):
        parsed(name, **changes)
