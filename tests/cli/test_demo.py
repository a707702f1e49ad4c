"""The demo, on a small model in place of its own."""

import pytest

from atd.cli import demo


@pytest.fixture
def small_model(monkeypatch, stories260k):
    monkeypatch.setattr(demo, "demo_model", lambda: stories260k)
    monkeypatch.setattr(demo, "_answer", lambda model, words: 1.0)  # it has no chat template


def test_it_converts_compares_and_shows_published_figures(
    atd, small_model, tmp_path, monkeypatch, text
):
    monkeypatch.setattr(demo.console, "width", 100)
    options = ("--out", tmp_path, "--recipe", "datafree2", "--data", text, "--context", 64)
    code, out, err = atd("demo", *options, "--tokens", 256)
    assert code == 0, err
    assert (tmp_path / "SmolLM2-135M-datafree2" / "report.json").exists()
    assert (tmp_path / "layers.png").stat().st_size > 1000
    lines = out.splitlines()
    (mine,) = (line for line in lines if f"{text.name}, this run" in line)
    assert "SmolLM2-135M-datafree2" in mine
    published = [line for line in lines if "WikiText-2, published" in line]
    assert len(published) == len(demo.PUBLISHED) == 5
    assert "llama.cpp Q4_K_M" in published[-1]
    assert "Compare figures on the same text only" in " ".join(out.split())


def test_calibrated_recipes_write_as_much_text_as_is_asked_for(small_model, tmp_path, monkeypatch):
    given = {}

    def convert(source, folder, recipe, **options):
        given["tokens"] = recipe.calibration_tokens
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, context=64)
    assert given["tokens"] == demo.TOKENS
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, context=64, calibration_tokens=512)
    assert given["tokens"] == 512
