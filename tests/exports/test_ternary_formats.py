"""Exports to `bitnet` and Bit-TTT-Engine: exact both ways, or refused before they begin."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from atd.checkpoint.writer import write_shard
from atd.errors import BadInput
from atd.exports.bit_ttt import export_bit_ttt
from atd.exports.bitnet import export_bitnet
from atd.ir import Block, Node, in_memory
from atd.ir.rewrite import map_nodes, with_weight
from atd.models import frontend
from atd.weights import Ternary, TernaryType

GOLDEN = Path(__file__).parents[1] / "golden"


def quiet(line: str) -> None:
    pass


def tensors(folder) -> dict[str, np.ndarray]:
    return {
        name: array
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def assert_equal_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def assert_equal_values(found: Path, expected: Path) -> None:
    weights = {ref.tensor: ref for _, ref in frontend.open(found).weights()}
    for _, ref in frontend.open(expected).weights():
        assert np.array_equal(weights[ref.tensor].dense(), ref.dense()), ref.tensor


def converted(out: Path, bases: int, group: str = "tensor", scales: str = "free") -> Path:
    """A random model whose linears are of one type, as a folder of atd's."""
    dense, rng = frontend.open(GOLDEN / "llama_mha"), np.random.default_rng(0)

    def ternary(unit: Block, node: Node) -> Node:
        if node.op == "rms_norm":
            return replace(node, attrs={"eps": 1e-5})
        if node.op != "linear" or not unit.name:
            return node
        ref = node.weights["weight"]
        out, inputs = ref.type.shape
        type = TernaryType((out, inputs), bases, group, scales == "tied", "f16")
        trits = rng.integers(-1, 2, type.trits_shape).astype(np.int8)
        values = rng.uniform(0.01, 0.02, type.scales_shape).astype(np.float16)
        return with_weight(node, in_memory(ref.tensor, Ternary(trits, values, type)))

    graph = map_nodes(dense, ternary)
    out.mkdir()
    write_shard(out / "model.safetensors", [ref for _, ref in graph.weights()])
    quantization = {"quant_method": "atd", "format_version": 1, "passes": []}
    config = graph.config | {"rms_norm_eps": 1e-5, "quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config))
    (out / "atd_graph.json").write_text(json.dumps(graph.to_json()))
    return out


@pytest.mark.parametrize("kind", ["bitnet_llama", "bitnet_norms", "bitnet_falcon3", "bitnet_2b4t"])
def test_bitnet_there_and_back(tmp_path, kind):
    out = export_bitnet(GOLDEN / kind, tmp_path / "out", say=quiet)
    assert_equal_tensors(tensors(out), tensors(GOLDEN / kind))
    assert_equal_values(out, GOLDEN / kind)


def test_scales_of_bfloat16_that_divide(tmp_path):
    import ml_dtypes

    folder = tmp_path / "model"
    folder.mkdir()
    stored = {
        name: array.astype(ml_dtypes.bfloat16) if name.endswith("_scale") else array
        for name, array in tensors(GOLDEN / "bitnet_llama").items()
    }
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_bytes((GOLDEN / "bitnet_llama/config.json").read_bytes())
    out = export_bitnet(folder, tmp_path / "out", say=quiet)
    assert_equal_tensors(tensors(out), stored)


def test_bitnet_of_a_converted_model(tmp_path):
    said: list[str] = []
    model = converted(tmp_path / "model", 1)
    out = export_bitnet(model, tmp_path / "out", say=said.append)
    assert_equal_values(out, model)
    assert any("logits change by" in line for line in said)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["linear_class"] == "autobitlinear"
    # transformers computes in one dtype
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert {str(array.dtype) for array in tensors(out).values()} == {"uint8", "float32"}


@pytest.mark.parametrize(("bases", "scales"), [(1, "free"), (3, "free"), (4, "tied")])
def test_bit_ttt_there_and_back(tmp_path, bases, scales):
    model = converted(tmp_path / "model", bases, scales=scales)
    out = export_bit_ttt(model, tmp_path / "out", say=quiet)
    assert_equal_values(out, model)
    again = export_bit_ttt(out, tmp_path / "again", say=quiet)
    assert_equal_tensors(tensors(again), tensors(out))
    assert (again / "config.json").read_text() == (out / "config.json").read_text()
    found = tensors(out)
    name = "model.layers.0.self_attn.q_proj"
    assert found[f"{name}.weight_packed"].shape == (32, 8, bases)
    assert found[f"{name}.scales"].shape == (bases,)
    assert "lm_head.weight" in found


@pytest.mark.parametrize(
    ("export", "bases", "group", "message"),
    [
        (export_bitnet, 2, "tensor", r"n=2 .* N = 1 .*--recipe greedy3 --set decompose\.bases=1"),
        (export_bitnet, 1, "row", r"g=row .* \(g=tensor\)"),
        (export_bit_ttt, 2, "row", r"g=row .* N = 1 to 4 .*--recipe greedy3"),
    ],
)
def test_what_they_do_not_hold_is_refused(tmp_path, export, bases, group, message):
    model = converted(tmp_path / "model", bases, group)
    with pytest.raises(BadInput, match=message):
        export(model, tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


# --- Bit-TTT in -----------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def bit_ttt(tmp_path, change, bases: int = 2) -> Path:
    """A folder of Bit-TTT-Engine with changed tensors."""
    out = export_bit_ttt(converted(tmp_path / "model", bases), tmp_path / "out", say=quiet)
    found = tensors(out)
    change(found)
    save_file(found, out / "model.safetensors")
    return out


def packed_names(found: dict) -> list[str]:
    return [name for name in found if name.endswith(".weight_packed")]


@pytest.mark.parametrize("bases", [1, 2])
def test_the_older_form_of_one_trit_per_byte(tmp_path, bases):
    def unpack(found: dict) -> None:
        for name in packed_names(found):
            fields = np.stack([found[name] >> 2 * j & 3 for j in range(4)], axis=-1)
            found[name] = np.array([0, 1, 255], np.uint8)[fields]

    folder = bit_ttt(tmp_path, unpack, bases)
    assert tensors(folder)[f"{Q}.weight_packed"].shape == (32, 8, bases, 4)
    assert_equal_values(folder, tmp_path / "model")


def test_one_base_without_an_axis_of_its_own(tmp_path):
    def flatten(found: dict) -> None:
        found |= {name: found[name][..., 0] for name in packed_names(found)}

    folder = bit_ttt(tmp_path, flatten, 1)
    assert tensors(folder)[f"{Q}.weight_packed"].shape == (32, 8)
    assert_equal_values(folder, tmp_path / "model")
    again = export_bit_ttt(folder, tmp_path / "again", say=quiet)
    assert tensors(again)[f"{Q}.weight_packed"].shape == (32, 8, 1)  # as the engine writes it


@pytest.mark.parametrize(("bases", "form"), [(5, ()), (6, (4,)), (7, ()), (8, ())])
def test_more_than_four_bases_are_refused_by_name(tmp_path, bases, form):
    def widen(found: dict) -> None:
        for name in packed_names(found):
            out, quarter = found[name].shape[:2]
            found[name] = np.zeros((out, quarter, bases, *form), np.uint8)
            found[f"{name.removesuffix('.weight_packed')}.scales"] = np.ones(bases, np.float32)

    folder = bit_ttt(tmp_path, widen)
    with pytest.raises(BadInput) as error:
        frontend.open(folder)
    shape = [32, 8, bases, *form]
    assert str(error.value) == (
        f"{folder / 'model.safetensors'}: tensor {Q}.weight_packed has N = {bases} bases (its "
        f"shape is {shape}); expected 1 to 4, the most that atd has; convert from the original "
        "checkpoint instead: atd convert MODEL OUT --recipe greedy3"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.weight_packed": np.zeros((32, 8, 0), np.uint8)}, "N = 0 bases .*expected 1 to 4"),
        ({f"{Q}.weight_packed": np.zeros((32, 7, 2), np.uint8)}, r"\[32, 7, 2\], expected \[32, 8"),
        ({f"{Q}.weight_packed": np.full((32, 8, 2, 4), 2, np.uint8)}, "2048 bytes are no trits"),
        ({f"{Q}.scales": np.ones(3, np.float32)}, r"scales has the shape \[3\], expected \[2\]"),
        ({f"{Q}.weight_packed": np.full((32, 8, 2), 3, np.uint8)}, "512 bytes hold the code 3"),
        ({f"{Q}.scales": np.full(2, np.nan, np.float32)}, "expected finite numbers"),
    ],
)
def test_bit_ttt_that_cannot_be(tmp_path, change, message):
    folder = bit_ttt(tmp_path, lambda found: found.update(change))
    with pytest.raises(BadInput, match=message):
        [ref.load() for _, ref in frontend.open(folder).weights()]
