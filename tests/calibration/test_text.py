"""Calibration text of files and of the model: order, refusals before the model writes."""

import re
from pathlib import Path

import numpy as np
import pytest

from atd.calibration import text as module
from atd.calibration.text import calibration_text, window_count
from atd.checkpoint.cache import Cache
from atd.errors import BadInput
from atd.models import frontend
from atd.pipeline.convert import convert
from atd.pipeline.recipe import read_recipe


@pytest.fixture
def get(stories260k, tmp_path):
    def windows(*texts: str, tokens=256, context=16) -> np.ndarray:
        options = {"tokens": tokens, "context": context, "seed": 0, "sha256": ""}
        graph, cache = frontend.open(stories260k), Cache(tmp_path / "cache")
        return calibration_text(texts, stories260k, graph, cache, **options, say=lambda line: None)

    return windows


@pytest.fixture
def written(monkeypatch):
    """Counts the texts that the model writes, which are zeros."""
    calls = []

    def zeros(graph, tokenizer, *, tokens, context, **options):
        calls.append(tokens)
        return np.zeros((tokens // context, context), np.int32)

    monkeypatch.setattr(module, "cached_self_text", zeros)
    return calls


def test_windows_of_all_texts_take_turns(get, small, written):
    windows = get("self", str(small.calibration))
    assert len(windows) == window_count(["self", "file"], 256, 16) == 16
    assert not windows[::2].any()
    assert windows[1::2].any(axis=1).all()


def test_windows_of_families_that_expect_bos_begin_with_it(get, small, monkeypatch):
    plain = [get(text) for text in ("self", str(small.calibration))]
    monkeypatch.setattr("atd.models.config.AFTER_BOS", ("llama",))
    own, file = (get(text) for text in ("self", str(small.calibration)))
    assert (own[:, 0] == 1).all()
    assert (own != plain[0]).any()
    assert (file[:, 0] == 1).all()
    np.testing.assert_array_equal(file[:, 1:], plain[1][:, :-1])


def test_files_are_refused_before_the_model_writes(get, small, written, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Once")
    for file, message in {tmp_path / "none.txt": "no such file", short: "are needed"}.items():
        with pytest.raises(BadInput, match=message):
            get("self", str(file))
    assert not written


def test_ids_beyond_the_vocabulary_are_refused_with_the_name_of_the_text(
    get, small, written, monkeypatch
):
    monkeypatch.setattr(module, "cut_windows", lambda *_: np.full((8, 16), 512, np.int32))
    named = re.escape(f"{small.calibration.name}: token id 512 lies outside")
    with pytest.raises(BadInput, match=named):
        get("self", str(small.calibration))
    assert not written


def test_too_few_windows_are_refused_before_the_model_writes(stories260k, written, tmp_path: Path):
    recipe = read_recipe("datafree2")
    passes = [*recipe.pipeline.passes[:-1], "calibrate", *recipe.pipeline.passes[-1:]]
    from dataclasses import replace

    from atd.pipeline import Pipeline

    recipe = replace(recipe, pipeline=Pipeline(passes), calibration_tokens=64)
    recipe = replace(recipe, calibration_context=32)
    with pytest.raises(BadInput, match="needs at least 8 calibration windows, there are 2 of 32"):
        convert(stories260k, tmp_path / "out", recipe, say=lambda line: None)
    assert not written
    assert not list(tmp_path.iterdir())
