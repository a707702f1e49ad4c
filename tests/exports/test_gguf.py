"""GGUF files of ours: the values that the model has, for us and for the package gguf."""

import json
import shutil
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from atd.checkpoint.folder import GRAPH
from atd.checkpoint.gguf_file import foreign_file
from atd.checkpoint.gguf_header import OWN, read_header
from atd.checkpoint.reader import open_tokenizer
from atd.errors import BadInput, RunFailed
from atd.exports.absorb import absorb
from atd.exports.gguf import export_gguf
from atd.exports.gguf_tensors import encode, pairs, plan
from atd.exports.parts import parts
from atd.ir import Block, Graph, Node, in_memory
from atd.models import frontend
from atd.models.model import load
from atd.pipeline import Pipeline
from atd.pipeline.convert import convert
from atd.weights import TrellisType, parse_code, summed
from tests.golden.write_gguf import GOLDEN, TERNARY_CONFIG, ternary_model

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
RECIPE = """
[[passes]]
name = "decompose"
scales = "tied"
group = "row"
{rules}
[[passes]]
name = "pack"
"""
# What each matrix becomes, and the type that holds it.
CHOICES = {
    "q": ("bases = 1", "TQ2_0"),
    "k": ("bases = 1\ngroup = 96", "Q4_0"),
    "v": ("bases = 2", "Q4_0"),
    "o": ("bases = 3", "Q5_0"),
    "gate": ("bases = 4\ngroup = 32", "Q8_0"),
    "up": ('bases = 2\nscales = "free"', "F32"),
    "down": ("bases = 1\ngroup = 48", "F32"),
}
NAMES = dict(
    zip(
        CHOICES,
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        strict=True,
    )
)


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of 256 features with a tokenizer of 512 pieces, rows for 520 and a rope scaling."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    folder.mkdir()
    random = np.random.default_rng(0)
    tensors = {
        name: (random.normal(size=(520 if "embed" in name else len(array), *array.shape[1:])) / 16)
        for name, array in ternary_model().items()
    }
    save_file({n: a.astype(np.float16) for n, a in tensors.items()}, folder / "model.safetensors")
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    more = {"vocab_size": 520, "tie_word_embeddings": True, "rope_scaling": scaling}
    more |= {"rms_norm_eps": 1e-5, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(TERNARY_CONFIG | more))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "stories" / name, folder)
    return folder


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory) -> Path:
    """The model with another kind of ternary matrix in each place."""
    folder = tmp_path_factory.mktemp("converted")
    rules = "\n".join(
        f"[[passes.rules]]\nmatch = '.*{part}_proj'\n{options}"
        for part, (options, _) in CHOICES.items()
    )
    (folder / "recipe.toml").write_text(RECIPE.format(rules=rules))
    return convert(model, folder / "out", folder / "recipe.toml", say=quiet)


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model.gguf"
    return export_gguf(converted, out, dtype="float32", say=quiet)


def dense(graph: Graph) -> dict[str, np.ndarray]:
    """The weights of a graph, joined matrices apart."""
    return {
        name: ref.dense()[start:stop]
        for unit in graph.units
        for node in unit.nodes
        for name, ref, start, stop in parts(unit, node)
    }


def kinds(path: Path) -> dict[str, str]:
    return {name: entry.quantization.name for name, entry in read_header(path)[1].items()}


def plain(folder: Path, golden: str, **more) -> Path:
    """A golden model, without its tokenizer."""
    shutil.copytree(GOLDEN / golden, folder)
    config = json.loads((folder / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- values ---------------------------------------------------------------------------------------


def test_each_kind_of_matrix_has_its_type(exported):
    found = kinds(exported)
    for part, (_, kind) in CHOICES.items():
        assert found[f"blk.0.{NAMES[part]}.weight"] == kind, part
    assert {found["token_embd.weight"], found["output_norm.weight"]} == {"F32"}
    assert "output.weight" not in found  # tied


def test_read_back_every_weight_is_the_same_to_the_bit(converted, exported):
    ours, theirs = dense(frontend.open(converted)), dense(frontend.open(exported))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[name], array, err_msg=name)


def test_the_package_gguf_reads_the_same_values(converted, exported):
    ours = dense(frontend.open(converted))
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(exported).tensors}
    for part in CHOICES:
        place = "self_attn" if len(part) == 1 else "mlp"
        values = ours[f"model.layers.0.{place}.{part}_proj.weight"]
        values = pairs(values, {"q": 4, "k": 2}[part]) if part in "qk" else values
        tensor = read[f"blk.0.{NAMES[part]}.weight"]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found, values, err_msg=part)


def test_logits_are_equal(converted, exported):
    unpacked = partial(load, backend="xla-unpacked")
    ours, theirs = unpacked(converted)(TOKENS), unpacked(exported)(TOKENS)
    np.testing.assert_array_equal(np.asarray(theirs), np.asarray(ours))


def test_what_is_rounded_is_said_with_its_error(converted, tmp_path):
    lines: list[str] = []
    export_gguf(converted, tmp_path / "m.gguf", say=lines.append)
    assert lines[0] == (
        "matrices held exactly: 2 in Q4_0, 1 in Q5_0, 1 in Q8_0, 1 in TQ2_0; "
        "rounded: 1 to Q8_0 (N = 1 and groups of 48 of 512 inputs fit no block), "
        "1 to Q8_0 (dense), 1 to Q8_0 (free scales)"
    )
    assert lines[1].startswith("relative rmse of the rounded matrices: 0.")
    worst = lines[1].split("the largest, of ")[1].split(":")[0]
    ours = dense(frontend.open(converted))
    theirs = dense(frontend.open(tmp_path / "m.gguf"))
    error = {n: np.linalg.norm(theirs[n] - a) / np.linalg.norm(a) for n, a in ours.items()}
    largest = max(error, key=lambda name: error[name])
    assert {"token_embd.weight": "embed_tokens", "blk.0.ffn_up.weight": "up_proj"}.get(
        worst, "down_proj"
    ) in largest
    assert lines[1].endswith(f"{error[largest]:.2%}")
    assert error[largest] < 0.01


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes(model, tmp_path, dtype):
    lines: list[str] = []
    export_gguf(model, tmp_path / "m.gguf", dtype=dtype, say=lines.append)
    name = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert kinds(tmp_path / "m.gguf")["blk.0.ffn_up.weight"] == name
    assert ("rounded" in lines[0]) == (dtype == "bfloat16")  # the model is of float16


def test_a_joined_matrix_is_taken_apart(packaged, tmp_path):
    """N = 2, tied, in joined matrices; 172 inputs of down are no multiple of 32."""
    folder = convert(
        packaged.folder,
        tmp_path / "out",
        "datafree2",
        overrides=["decompose.scales=tied", "decompose.group=row"],
        say=quiet,
    )
    lines: list[str] = []
    export_gguf(folder, tmp_path / "m.gguf", say=lines.append)
    assert "30 in Q4_0" in lines[0]
    assert "5 to F16 (172 inputs, no multiple of the 32 of a block)" in lines[0]
    ours, theirs = dense(frontend.open(folder)), dense(frontend.open(tmp_path / "m.gguf"))
    for name in ours:
        if "_proj" in name and "down" not in name:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_trellis_code_is_rounded():
    type = TrellisType((8, 64), parse_code("0.5,0.5|1"), 8, "f16")
    random = np.random.default_rng(0)
    trits = random.integers(-1, 2, type.trits_shape).astype(np.int8)
    weight = summed(trits, np.full((8, 1, 1), 0.125, np.float16), type)
    ref = in_memory("model.layers.0.mlp.up_proj.weight", weight)
    block = Block("model.layers.0", (Node("mlp.up_proj", "linear", ("x",), {"weight": ref}),))
    (found,) = plan(Graph({}, Block("model", ()), (block,), Block("", ())), "q8_0", {})
    assert (found.quantization.name, found.rounded) == ("Q8_0", "trellis codes")
    (encoded,) = encode(found)
    assert encoded.data is not None
    back = gguf.quants.dequantize(encoded.data, found.quantization)
    assert 0 < encoded.error == pytest.approx(np.square(back - ref.dense()).sum(), rel=1e-4)
    assert encoded.total == pytest.approx(np.square(ref.dense()).sum())


def test_rotations_are_absorbed(packaged, tmp_path):
    recipe = Pipeline(["fold_norms", "rotate"])
    folder = convert(packaged.folder, tmp_path / "out", recipe, say=quiet)
    export_gguf(folder, tmp_path / "m.gguf", dtype="float32", say=quiet)
    graph = frontend.open(tmp_path / "m.gguf")
    assert not graph.is_tied
    expected = dense(absorb(frontend.open(folder)))
    for name, array in dense(graph).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    ours, theirs = load(folder)(TOKENS), load(graph)(TOKENS)
    np.testing.assert_allclose(np.asarray(theirs), np.asarray(ours), atol=1e-4)


def test_scales_that_are_no_float16_are_not_written_as_such(model, tmp_path):
    options = ["decompose.scales=tied", "decompose.dtype=f32", "decompose.group=row"]
    folder = convert(model, tmp_path / "out", "datafree2", overrides=options, say=quiet)
    lines: list[str] = []
    export_gguf(folder, tmp_path / "m.gguf", say=lines.append)
    assert "to Q8_0 (f32 scales that are no float16)" in lines[0]


def test_values_that_do_not_fit(tmp_path):
    source = plain(tmp_path / "source", "qwen2")
    tensors = {n: r.dense() for n, r in by_name(frontend.open(source)).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(RunFailed, match=r"layers\.1\.mlp\.up_proj\.weight: its values do not fit"):
        export_gguf(source, tmp_path / "m.gguf", dtype="float16", say=quiet)
    assert not (tmp_path / "m.gguf").exists()


def by_name(graph: Graph) -> dict:
    return {ref.tensor: ref for _, ref in graph.weights()}


# --- metadata -------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", ["llama_mha", "llama_gqa", "llama_bias", "qwen2", "qwen3"])
def test_every_family_comes_back(tmp_path, golden):
    plainly = {} if golden != "qwen2" else {"use_sliding_window": False}
    source = plain(tmp_path / "source", golden, **plainly)
    lines: list[str] = []
    out = export_gguf(source, tmp_path / "m.gguf", dtype="float32", say=lines.append)
    assert any("no vocabulary" in line for line in lines)
    np.testing.assert_array_equal(np.asarray(load(source)(TOKENS)), np.asarray(load(out)(TOKENS)))
    metadata, _ = read_header(out)
    config = json.loads((source / "config.json").read_text())
    architecture = metadata["general.architecture"]
    assert metadata[f"{architecture}.context_length"] == config["max_position_embeddings"]
    assert metadata[f"{architecture}.vocab_size"] == config["vocab_size"]
    assert metadata["general.file_type"] == 0
    assert metadata["tokenizer.ggml.model"] == "no_vocab"


def test_a_window_bounds_the_context(tmp_path):
    lines: list[str] = []
    out = export_gguf(plain(tmp_path / "source", "mistral"), tmp_path / "m.gguf", say=lines.append)
    metadata, _ = read_header(out)
    window = json.loads((tmp_path / "source" / "config.json").read_text())["sliding_window"]
    assert metadata["llama.context_length"] == window
    assert any(f"a window of {window} tokens" in line for line in lines)


def test_the_tokenizer_comes_along(model, exported):
    ours, theirs = open_tokenizer(model), open_tokenizer(exported)
    text = "Once upon a time, there was a café.\n  123 漢"
    np.testing.assert_array_equal(ours.encode(text), theirs.encode(text))
    assert (ours.bos_id, ours.eos_ids, ours.adds_bos) == (
        theirs.bos_id,
        theirs.eos_ids,
        theirs.adds_bos,
    )
    metadata, _ = read_header(exported)
    assert metadata["tokenizer.ggml.tokens"][519] == "[PAD519]"
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert metadata["tokenizer.ggml.token_type"][519] == 5


def test_what_llama_cpp_does_not_compute_is_refused(converted, tmp_path):
    """Attention and MLP side by side, in a folder of ours."""
    folder = tmp_path / "changed"
    shutil.copytree(converted, folder)
    graph = json.loads((folder / GRAPH).read_text())
    nodes = {node["name"]: node for node in graph["blocks"][0]["nodes"]}
    nodes["mlp.residual"]["inputs"] = ["x", "mlp.down_proj"]
    (folder / GRAPH).write_text(json.dumps(graph))
    with pytest.raises(BadInput, match=r"model\.layers\.0\.mlp\.residual is not what llama\.cpp"):
        export_gguf(folder, tmp_path / "m.gguf", say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


# --- the file -------------------------------------------------------------------------------------


def test_out_is_one_file(converted, tmp_path):
    with pytest.raises(BadInput, match=r"name that ends with \.gguf, such as .*/model\.gguf"):
        export_gguf(converted, tmp_path, say=quiet)
    with pytest.raises(BadInput, match=r"such as .*/out\.gguf"):
        export_gguf(converted, tmp_path / "out", say=quiet)
    with pytest.raises(BadInput, match="--dtype float64 is none of --to gguf: q8_0, float16"):
        export_gguf(converted, tmp_path / "m.gguf", dtype="float64", say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_what_atd_wrote_is_replaced_and_nothing_else(model, tmp_path):
    out = tmp_path / "m.gguf"
    export_gguf(model, out, say=quiet)
    first = out.read_bytes()
    assert foreign_file(out) is None
    with pytest.raises(BadInput, match="exists; choose another name"):
        export_gguf(model, out, say=quiet)
    export_gguf(model, out, dtype="float32", overwrite=True, say=quiet)
    assert out.read_bytes() != first
    out.write_bytes(first[:-1] + b"\x07")
    with pytest.raises(BadInput, match="it was changed since atd wrote it"):
        export_gguf(model, out, overwrite=True, say=quiet)
    out.write_bytes(first)
    export_gguf(model, out, overwrite=True, say=quiet)
    assert out.read_bytes() == first  # equal input, equal bytes
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("content", [b"", b"years of work"])
def test_files_of_others_stay(model, tmp_path, content):
    out = tmp_path / "m.gguf"
    out.write_bytes(content)
    with pytest.raises(BadInput, match=f"its metadata have no {OWN}"):
        export_gguf(model, out, overwrite=True, say=quiet)
    assert out.read_bytes() == content


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_output_meanwhile_stays(model, tmp_path, overwrite):
    out = tmp_path / "m.gguf"

    def thesis(now) -> None:
        out.write_text("years of work")

    with pytest.raises(BadInput, match=r"exists|its metadata have no"):
        export_gguf(model, out, overwrite=overwrite, say=quiet, progress=thesis)
    assert out.read_text() == "years of work"
    out.unlink()
    export_gguf(model, out, say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_model_itself_is_not_replaced(exported, tmp_path):
    shutil.copy(exported, tmp_path / "m.gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(BadInput, match="must lie outside"):
        export_gguf(tmp_path / "m.gguf", tmp_path / "m.gguf", overwrite=True, say=quiet)
    assert (tmp_path / "m.gguf").read_bytes() == before


def test_a_link_is_not_followed(model, exported, tmp_path):
    shutil.copy(exported, tmp_path / "real.gguf")
    (tmp_path / "m.gguf").symlink_to("real.gguf")
    with pytest.raises(BadInput, match="it is no file"):
        export_gguf(model, tmp_path / "m.gguf", overwrite=True, say=quiet)
