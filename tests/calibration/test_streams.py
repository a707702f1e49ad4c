"""Calibration: the streams see what the models compute, and calibrated conversion is better,
repeats and resumes.
"""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from atd.calibration.room import Room
from atd.calibration.streams import Calibration
from atd.calibration.windows import cut_windows
from atd.checkpoint.files import read_text
from atd.checkpoint.folder import MANIFEST, read_manifest
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.writer import write_shard
from atd.errors import BadInput
from atd.models import frontend
from atd.models.execute import dense_weights, output, run
from atd.models.model import load
from atd.passes.decompose import Decompose
from atd.pipeline import Pipeline, Rule, driver
from atd.pipeline.convert import convert
from atd.pipeline.recipe import read_recipe
from atd.runtime.evaluate import evaluate
from tests.models.tiny import tiny_graph

RECIPE = replace(
    read_recipe("ternary2", ["decompose.trellis=", "decompose.refits=0"]), calibration_tokens=4096
)


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def calib(small):
    return small.calibration


@pytest.mark.usefixtures("exact_streams")
def test_streams_are_what_the_models_compute():
    """Behind the last block, each stream is what the model of its graph has there; moments are of a
    linear's inputs.
    """
    dense = tiny_graph()
    rough = Pipeline([Decompose(bases=1, group="row"), "fuse", "pack"])(dense)
    tokens = np.random.default_rng(0).integers(0, 40, (11, 16)).astype(np.int32)
    calibration = Calibration(tokens)
    for before, after in zip(dense.units[:-1], rough.units[:-1], strict=True):
        calibration.begin(before, after)
        calibration.finish()
    calibration.begin(dense.epilogue, rough.epilogue)
    moments = calibration.moments("lm_head")
    gain = dense.epilogue.node("model.norm").weights["weight"].load().dequantize()

    def normed(graph):
        hidden = np.asarray(load(graph).hidden(tokens), np.float64).reshape(-1, 32)
        return hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5) * gain

    x, exact = normed(rough), normed(dense)
    assert moments.positions == tokens.size
    np.testing.assert_allclose(moments.hessian, x.T @ x / len(x), atol=1e-4)
    np.testing.assert_allclose(moments.cross, exact.T @ x / len(x), atol=1e-4)
    assert np.abs(moments.cross - moments.hessian).max() > 0.01


def test_inputs_inside_a_unit_are_those_of_its_quantized_linears():
    """o_proj reads what the unit's own quantized q, k and v made, and linears that share an input
    share its moments.
    """
    dense = tiny_graph()
    rough = Pipeline([Decompose(bases=1, group="row"), "fuse", "pack"])(dense)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 16)).astype(np.int32)
    calibration = Calibration(tokens)
    calibration.begin(dense.prologue, rough.prologue)
    calibration.finish()
    calibration.begin(dense.blocks[0], rough.blocks[0])
    q, k, o = (calibration.moments(f"model.layers.0.self_attn.{n}_proj") for n in "qko")
    assert q is k
    np.testing.assert_allclose(
        q.cross, q.hessian, atol=1e-5
    )  # nothing before the first norm is quantized
    assert np.abs(o.cross - o.hessian).max() > 1e-3


@pytest.mark.usefixtures("exact_streams")
def test_what_the_residual_stream_lacks_is_found_where_a_linear_adds_to_it():
    """Behind the first block, o and down know what is lost in front of them; q, which adds to
    nothing, does not, and shares its moments with k.
    """
    dense = tiny_graph()
    rough = Pipeline([Decompose(bases=1, group="row"), "fuse", "pack"])(dense)
    tokens = np.random.default_rng(0).integers(0, 40, (11, 16)).astype(np.int32)
    calibration = Calibration(tokens)
    for before, after in zip(dense.units[:2], rough.units[:2], strict=True):
        calibration.begin(before, after)
        calibration.finish()
    block, made = dense.blocks[1], rough.blocks[1]
    calibration.begin(block, made)

    def found(name: str):
        return calibration.moments(f"{block.name}.{name}", residual=True)

    def value(graph, name: str) -> np.ndarray:
        x = tokens
        for unit in graph.units[:2]:
            x = output(unit, dense_weights(unit.nodes), x)
        unit = graph.units[2]
        return flat(run(unit, dense_weights(unit.nodes), {"x": x}, [name])[0][name] if name else x)

    def flat(x) -> np.ndarray:
        return np.asarray(x, np.float64).reshape(-1, x.shape[-1])

    assert found("self_attn.q_proj") is found("self_attn.k_proj")
    assert found("self_attn.q_proj").residual is None
    between = block.node("mlp.residual").inputs[0]
    for name, stream in (("self_attn.o_proj", ""), ("mlp.down_proj", between)):
        inputs, moments = block.node(name).inputs[0], found(name)
        lack, x = value(dense, stream) - value(rough, stream), value(rough, inputs)
        assert np.square(lack).mean() > 1e-4
        assert moments.residual is not None
        np.testing.assert_allclose(moments.residual, lack.T @ x / len(x), atol=1e-4)
        np.testing.assert_allclose(moments.hessian, x.T @ x / len(x), atol=1e-4)


@pytest.mark.exact
@pytest.mark.parametrize("bytes", [0, 60_000, 700_000, 1 << 30])
def test_what_has_no_room_is_the_same(tmp_path, bytes):
    """Streams in files, and inner values that are computed again, give equal moments."""
    dense = tiny_graph()
    rough = Pipeline([Decompose(bases=1, group="row")])(dense)
    tokens = np.random.default_rng(0).integers(0, 40, (11, 400)).astype(np.int32)  # two batches
    room = Room(bytes, tmp_path / "streams")
    small, large = Calibration(tokens, room), Calibration(tokens)
    for before, after in zip(dense.units[:-1], rough.units[:-1], strict=True):
        for calibration in (small, large):
            calibration.begin(before, after)
        for node in before.nodes:
            if node.op == "linear":
                name = before.full_name(node)
                one, other = (c.moments(name, residual=True) for c in (small, large))
                if node.name in ("self_attn.o_proj", "mlp.down_proj"):
                    np.testing.assert_array_equal(one.residual, other.residual)
                np.testing.assert_array_equal(one.hessian, other.hessian)
                np.testing.assert_array_equal(one.cross, other.cross)
        small.finish()
        large.finish()
        assert 0 <= room.left <= bytes
    stream = 2 * 10 * 400 * 32 * 2  # bytes: two batches, of which the first has 10 windows
    files = list((tmp_path / "streams").rglob("*.npy"))
    assert len(files) == (4 if bytes < stream else 2 if bytes < 2 * stream else 0)


@pytest.fixture(scope="module")
def calibrated(stories260k, calib, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "out"
    return convert(stories260k, out, RECIPE, calib=calib, say=quiet)


def test_calibration_beats_data_free_at_the_same_bits(stories260k, calibrated, small):
    """On text that was not calibrated on. A calibration that changes nothing fails this."""
    words = open_tokenizer(stories260k)
    tokens = words.encode(read_text(small.held_out))[:8192]
    dense, graph = load(stories260k), frontend.open(stories260k)
    free = evaluate(
        load(Pipeline(['decompose{group = "row", scales = "tied"}'])(graph)),
        tokens,
        context=256,
        against=dense,
    )
    fed = evaluate(load(calibrated), tokens, context=256, against=dense)
    assert fed.kl_mean is not None
    assert free.kl_mean is not None
    assert fed.kl_mean < 0.6 * free.kl_mean


@pytest.mark.exact
def test_an_interrupted_calibrated_run_ends_in_the_same_bytes(
    stories260k, calib, calibrated, tmp_path, monkeypatch
):
    write, calls = write_shard, []

    def stop(path, refs):
        calls.append(path.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(path, refs)

    monkeypatch.setattr(driver, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(stories260k, tmp_path / "out", RECIPE, calib=calib, say=quiet)
    again = convert(stories260k, tmp_path / "out", RECIPE, calib=calib, say=quiet)
    assert calls[4] == calls[3], "finished units were written again"
    assert read_manifest(again) == read_manifest(calibrated)


@pytest.mark.exact
@pytest.mark.slow
def test_its_own_recipe_makes_the_same_bytes_and_refuses_another_text(
    stories260k, calib, calibrated, small, tmp_path
):
    recipe = calibrated / "recipe.toml"
    again = convert(stories260k, tmp_path / "again", recipe, say=quiet)
    assert read_manifest(again) == read_manifest(calibrated)
    manifest = json.loads((again / MANIFEST).read_text())
    assert manifest["platform"] == jax.default_backend()
    assert manifest["calibration"] == {
        "texts": [calib.name],
        "tokens_sha256": read_recipe(recipe).calibration_sha256,
        "windows": [8, 512],
    }
    other = tmp_path / "other.txt"
    other.write_text(read_text(small.calibration)[1000:])
    with pytest.raises(
        BadInput, match=r"calibrated on other text: .*other\.txt gives tokens of sha256"
    ):
        convert(stories260k, tmp_path / "other", recipe, calib=other, say=quiet)
    short = replace(read_recipe(recipe), calibration=("self",), calibration_tokens=1024)
    with pytest.raises(BadInput, match="calibrated on other text: self gives"):
        convert(stories260k, tmp_path / "other", short, say=quiet)
    assert not (tmp_path / "other").exists()


def test_what_calibration_needs_is_said(stories260k, calib, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time there was a little girl.")
    with pytest.raises(BadInput, match=r"has \d+ tokens, 32,768 are needed"):
        convert(stories260k, tmp_path / "out", "ternary2", calib=short, say=quiet)
    with pytest.raises(BadInput, match="are not one window of 512"):
        cut_windows(np.zeros(1000), 100, 512)
    assert not (tmp_path / "out").exists()


def test_one_layer_calibrated_by_a_rule_needs_activations():
    rule = Rule(r".*down_proj", options=(("method", "hessian"),))
    assert Decompose(rules=(rule,)).needs == {"activations"}
    assert Decompose(rules=(rule,), uncertainty=True).needs == {"activations", "counts"}
    assert Decompose().needs == frozenset()
    assert read_recipe("ternary2").calibration_tokens == 32768
