"""Gemma 3: configs in both spellings, what passes and exports do with it, and what they refuse.

Its logits are compared with those of transformers in `tests.models.test_golden`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from atd.errors import BadInput
from atd.exports.bit_ttt import export_bit_ttt
from atd.exports.bitnet import export_bitnet
from atd.exports.gguf import export_gguf
from atd.exports.hf import export_hf
from atd.models import frontend
from atd.models.config import parse_config
from atd.models.model import load
from atd.models.structure import difference
from atd.passes.decompose import Decompose
from atd.passes.equalize import sites
from atd.passes.fold_norms import FoldNorms
from atd.passes.fuse import Fuse
from atd.passes.pack import Pack
from atd.passes.rotate import Rotate
from atd.pipeline import Pipeline
from atd.pipeline.convert import convert
from tests.golden.write_gguf import GOLDEN

FOLDER = GOLDEN / "gemma3"
CONFIG = json.loads((FOLDER / "config.json").read_text())
TOKENS = np.load(FOLDER / "logits.npz")["tokens"]
FULL = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def quiet(line: str) -> None:
    pass


def parsed(**changes):
    return parse_config(CONFIG | changes, "m")


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.asarray(load(FOLDER)(TOKENS))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    return convert(FOLDER, tmp_path_factory.mktemp("gemma3") / "out", "datafree2", say=quiet)


# --- config ---------------------------------------------------------------------------------------


def test_both_spellings_of_a_config():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    local = {"rope_type": "default", "rope_theta": 100.0}
    newer = dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_scaling"))
    newer |= {"sliding_window_pattern": None, "layer_types": kinds}
    newer |= {"rope_parameters": {"full_attention": FULL, "sliding_attention": local}}
    assert parsed(**newer) == parsed()
    assert parsed().windows == (6, 0, 6)
    assert parsed().windowed_rope == (100.0, ())
    assert parsed().rope_scaling == ("linear", 2.0)


def test_defaults_of_a_config():
    absent = ("rope_theta", "rope_local_base_freq", "head_dim", "query_pre_attn_scalar")
    found = parsed(**dict.fromkeys((*absent, "sliding_window_pattern", "tie_word_embeddings")))
    assert (found.rope_theta, found.windowed_rope) == (1e6, (10000.0, ()))
    assert (found.head_dim, found.query_scale, found.tie_word_embeddings) == (256, 1.0, True)
    assert found.windows == (6, 6, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported; supported:"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"sliding_window": None}, "layer_types has sliding_attention, but sliding_window missing"),
        ({"rope_parameters": FULL}, "rope_parameters is .*; expected full_attention and"),
        ({"rope_parameters": {"full_attention": 3}}, "must hold objects"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; expected a positive number"),
        ({"model_type": "gemma3"}, "the architecture 'gemma3' .*is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(BadInput, match=message):
        parsed(**changes)


# --- passes ---------------------------------------------------------------------------------------


def test_prefill_and_decode_are_the_forward_pass(logits):
    model = load(FOLDER)
    last, cache = model.prefill(TOKENS[:, :8], model.new_cache(2, 24))
    for position in range(8, 24):
        np.testing.assert_allclose(last, logits[:, position - 1], atol=2e-4)
        last, cache = model.decode(TOKENS[:, position], cache)


@pytest.mark.parametrize("fuse", [False, True])
def test_passes_that_rewrite_keep_the_function(logits, fuse):
    passes = [FoldNorms(), Rotate(r1=False, r3=True), *([Fuse()] if fuse else [])]
    graph = Pipeline(passes)(frontend.open(FOLDER))
    np.testing.assert_allclose(load(graph)(TOKENS), logits, atol=1e-3)
    block = graph.blocks[0]
    assert block.node("pre_feedforward_layernorm").attrs["unit_gain"]
    assert "unit_gain" not in block.node("post_feedforward_layernorm").attrs
    assert "unit_gain" not in block.node("post_attention_layernorm").attrs


def test_equalize_finds_all_its_sites():
    writers = [site.writer for site in sites(frontend.open(FOLDER).blocks[0])]
    assert writers == [
        "input_layernorm",
        "self_attn.v_proj",
        "pre_feedforward_layernorm",
        "mlp.up_proj",
    ]


def test_the_stream_is_not_rotated_through_gains():
    graph = FoldNorms()(frontend.open(FOLDER))
    gain = r"post_attention_layernorm is added to the residual stream.*; use r1 = false"
    with pytest.raises(BadInput, match=gain):
        Rotate()(graph)


def test_recipes_work_or_say_what_to_leave_out(tmp_path, converted):
    assert np.isfinite(load(converted)(TOKENS)).all()
    assert "from_pretrained" not in (converted / "README.md").read_text()
    asked = {"overrides": ["rotate.r1=true"], "say": quiet}
    with pytest.raises(BadInput, match="use r1 = false"):
        convert(FOLDER, tmp_path / "out", "ternary2", **asked)


@pytest.mark.slow
def test_ternary2_without_the_rotation_of_the_stream(tmp_path, logits):
    folder = tmp_path / "m"
    shutil.copytree(FOLDER, folder)
    words = {f"w{i}": i for i in range(64)}
    Tokenizer(WordLevel(words, "w0")).save(str(folder / "tokenizer.json"))
    options = {"cache": tmp_path / "cache", "say": quiet}
    out = convert(folder, tmp_path / "out", "ternary2", **options)
    assert np.corrcoef(np.asarray(load(out)(TOKENS)).ravel(), logits.ravel())[0, 1] > 0.7


# --- exports --------------------------------------------------------------------------------------


def test_dense_exports_are_the_model_again(tmp_path, logits):
    out = export_hf(FOLDER, tmp_path / "same", say=quiet)
    np.testing.assert_allclose(load(out)(TOKENS), logits, atol=2e-4)
    graph = frontend.open(FOLDER), frontend.open(out)
    for (name, mine), (_, theirs) in zip(*(g.weights() for g in graph), strict=True):
        np.testing.assert_allclose(theirs.dense(), mine.dense(), atol=1e-6, err_msg=name)


def test_dense_exports_of_a_converted_model(tmp_path, converted):
    out = export_hf(converted, tmp_path / "dense", say=quiet)
    np.testing.assert_allclose(load(out)(TOKENS), load(converted)(TOKENS), atol=1e-3)


def test_formats_without_such_norms_refuse(tmp_path, converted):
    ternary = Pipeline([Decompose(bases=1, group="tensor"), Pack()])
    out = convert(FOLDER, tmp_path / "ternary", ternary, say=quiet)
    with pytest.raises(BadInput, match="does not hold the gains of Gemma 3; use --to hf"):
        export_bitnet(out, tmp_path / "bitnet", say=quiet)
    with pytest.raises(BadInput, match="bit-ttt does not hold this model"):
        export_bit_ttt(out, tmp_path / "bit-ttt", say=quiet)
    with pytest.raises(BadInput, match="type 'gemma3_text' cannot be exported as GGUF"):
        export_gguf(out, tmp_path / "m.gguf", say=quiet)
    found = difference(frontend.open(out), "m")
    assert found is not None
    assert "a gain of 1 + w" in found
