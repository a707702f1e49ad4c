"""calibrate on a real small model: it lowers the divergence, repeats, goes on without training
again, and says what it needs.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atd.calibration.streams import Calibration
from atd.calibration.windows import cut_windows
from atd.checkpoint.files import read_text
from atd.checkpoint.folder import read_manifest, result_folder
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.writer import write_shard
from atd.errors import BadInput
from atd.models import frontend
from atd.models.model import load
from atd.passes.calibrate import HELD_OUT, Calibrate
from atd.pipeline import Context, Pipeline, driver, parse_pass
from atd.pipeline.convert import convert
from atd.pipeline.recipe import Recipe
from atd.runtime.evaluate import evaluate
from tests.models.tiny import tiny_graph

BEFORE = ["decompose{bases = 2, group = 'row', scales = 'tied'}", "pack"]
STEP = Calibrate(steps=24, checks=2)


@pytest.fixture(scope="module")
def recipe(small) -> Recipe:
    text = str(small.calibration)
    pipeline = Pipeline([*BEFORE, STEP, "fuse", "verify"])
    return Recipe(pipeline, calibration=(text,), calibration_tokens=2048, calibration_context=64)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def calibrated(stories260k, recipe, said, tmp_path_factory) -> Path:
    said.clear()  # of another model
    return convert(
        stories260k, tmp_path_factory.mktemp("calibrate") / "out", recipe, say=said.append
    )


@pytest.fixture(scope="module")
def context(stories260k, recipe):
    """() -> what the pass is given, over the windows of the recipe; and the decomposed graph as it
    would be written.
    """
    tokens = open_tokenizer(stories260k).encode(read_text(recipe.calibration[0]))
    windows = cut_windows(tokens, 1024, 64)
    graph = frontend.open(stories260k)

    def made(lines: list[str]) -> Context:
        return Context(calibration=Calibration(windows), dense=graph, say=lines.append)

    return made, Pipeline(BEFORE)(graph)


def test_the_divergence_falls(stories260k, calibrated, said, small):
    """On the held-out windows, as it says, and on text that it never saw."""
    (line,) = [line for line in said if line.startswith("calibrate")]
    start, end = map(float, re.findall(r"\d+\.\d+", line)[:2])
    assert end < 0.97 * start
    words = open_tokenizer(stories260k)
    tokens = words.encode(read_text(small.held_out))[:4096]
    dense, plain = load(stories260k), load(Pipeline(BEFORE)(frontend.open(stories260k)))
    before, after = (
        evaluate(model, tokens, context=128, against=dense) for model in (plain, load(calibrated))
    )
    assert before.kl_mean is not None
    assert after.kl_mean is not None
    assert after.kl_mean < 0.97 * before.kl_mean
    assert start > 0.5 * before.kl_mean, "measured against the decomposed model, not the dense one?"


def test_the_report_still_knows_the_errors_of_the_stage_before(calibrated):
    rows = json.loads((calibrated / "report.json").read_text())["nodes"]
    assert all(0 < row["error"] < 1 for row in rows if "layers" in row["node"])
    assert {row["error"] for row in rows if "layers" not in row["node"]} == {None}


@pytest.mark.exact
def test_interrupted_in_the_last_stage(stories260k, recipe, calibrated, tmp_path, monkeypatch):
    """It ends in the same bytes, and what was trained is not trained again."""
    write, rewrite, runs = write_shard, Calibrate.rewrite, []
    last = result_folder((tmp_path / "out").absolute())

    def stop(path, refs):
        if path.parent == last and "00004" in path.name:
            raise KeyboardInterrupt
        return write(path, refs)

    def counted(*arguments):
        runs.append(1)
        return rewrite(*arguments)

    monkeypatch.setattr(driver, "write_shard", stop)
    monkeypatch.setattr(Calibrate, "rewrite", counted)
    with pytest.raises(KeyboardInterrupt):
        convert(stories260k, tmp_path / "out", recipe, say=lambda line: None)
    assert len(runs) == 1
    monkeypatch.setattr(driver, "write_shard", write)
    again = convert(stories260k, tmp_path / "out", recipe, say=lambda line: None)
    assert len(runs) == 1
    assert read_manifest(again) == read_manifest(calibrated)
    assert not any(path.is_dir() for path in again.iterdir())


def test_what_cannot_improve_changes_nothing(context):
    made, graph = context
    lines: list[str] = []
    step = Calibrate(steps=1, learning_rate=1e-12, codes_learning_rate=1e-12)
    assert step(graph, made(lines)) is graph
    assert re.fullmatch(
        r"calibrate improved nothing: KL.* on held-out windows stays \d\.\d+(;.*)?", lines[0]
    )


@pytest.mark.parametrize(
    "rates",
    [pytest.param({"codes_learning_rate": 100.0}, marks=pytest.mark.slow), {"learning_rate": 1e4}],
    ids=["codes", "scales"],
)
def test_rates_that_diverge_are_lowered_and_the_best_state_kept(context, rates):
    """The second makes infinities and NaN."""
    made, graph = context
    lines: list[str] = []
    step = Calibrate(steps=3, checks=3, patience=3, **rates)
    assert step(graph, made(lines)) is graph
    assert re.fullmatch(
        r"calibrate improved nothing: KL.* stays \d\.\d+; it rose to .*, "
        r"rates lowered each time; stopped early",
        lines[0],
    )


@pytest.mark.slow
def test_after_a_bad_start_it_still_improves(context):
    """At a rate for codes that is several times too high the first check is worse; at a quarter of
    it, or a sixteenth, it is not.
    """
    made, graph = context
    lines: list[str] = []
    after = Calibrate(steps=8, checks=8, patience=6, codes_learning_rate=0.3)(graph, made(lines))
    assert after is not graph
    start, end = map(float, re.findall(r"\d+\.\d+", lines[0])[:2])
    assert end < start
    assert "lowered" in lines[0]


def test_block_by_block(context):
    made, graph = context
    lines: list[str] = []
    after = Calibrate(against="block", steps=4, checks=1)(graph, made(lines))
    assert len(lines) == len(graph.blocks)
    assert sum("->" in line for line in lines) >= 3, lines
    assert [str(ref.type) for _, ref in after.weights() if "packed" in str(ref.type)] == [
        str(ref.type) for _, ref in graph.weights() if "packed" in str(ref.type)
    ]


def test_too_few_windows(stories260k, recipe, tmp_path):
    with pytest.raises(BadInput, match=rf"(too few|at least).* {HELD_OUT * 64:,}"):
        convert(
            stories260k,
            tmp_path / "out",
            replace(recipe, calibration_tokens=256),
            say=lambda line: None,
        )
    windows = np.zeros((HELD_OUT - 1, 16), np.int32)
    graph = tiny_graph()
    context = Context(calibration=Calibration(windows), dense=graph)
    with pytest.raises(
        BadInput,
        match=rf"7 windows of 16 tokens are too few; give at least {HELD_OUT * 16:,} tokens",
    ):
        Calibrate().rewrite(graph, context)
    with pytest.raises(BadInput, match="needs calibration text and the dense model"):
        Calibrate().rewrite(graph, Context())


def test_options():
    step = Calibrate(against="block", codes=False, steps=3)
    assert parse_pass(str(step)) == step
    assert step.needs == {"activations", "written"}
    for options, message in (
        ("against = 'logit'", "did you mean 'logits'"),
        ("scales = false, gains = false, codes = false", "nothing to move"),
        ("steps = -1", "at least 1"),
        ("learning_rate = 0", "above 0"),
    ):
        with pytest.raises(BadInput, match=message):
            parse_pass(f"calibrate{{{options}}}")
