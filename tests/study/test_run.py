"""Studies: that no point is done twice or lost, and what their folders and rows hold."""

import csv
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from atd.errors import BadInput, RunFailed
from atd.pipeline.convert import convert
from atd.runtime import compare
from atd.runtime.evaluate import Evaluation
from atd.study import run as module
from atd.study.results import number
from atd.study.run import raise_failed, run_study

FIGURES = Evaluation(9.5, 5.9, 0.5, 0.25, 3.0, 0.7, 4, 252, 64, False, "standard", 256, 1.0, 100.0)


@pytest.fixture
def stubbed(monkeypatch):
    """Loads and evaluates nothing; conversions are real, counted by the names of their folders."""
    done = []

    def counted(model, out, recipe, **options):
        done.append(Path(out).name.rpartition("-")[0])
        return convert(model, out, recipe, **options)

    monkeypatch.setattr(compare, "load", lambda graph, **options: None)
    monkeypatch.setattr(compare, "evaluate", lambda model, tokens, **options: FIGURES)
    monkeypatch.setattr(module, "convert", counted)
    return done


def read_rows(out: Path) -> list[dict]:
    return list(csv.DictReader((out / "results.csv").open()))


# --- a real study ---


def test_rows_hold_figures_and_conditions(studied):
    out, rows = studied
    assert rows == read_rows(out)
    one, two = rows
    assert (one["recipe"], one["decompose.bases"], two["decompose.bases"]) == ("fast", "1", "2")
    assert number(two, "bits_per_weight") > 1.5 * number(one, "bits_per_weight") > 2
    for text in ("start", "end"):
        assert number(one, f"kl_mean:{text}") > number(two, f"kl_mean:{text}") > 0.01
        assert (
            number(one, f"dense_perplexity:{text}") == number(two, f"dense_perplexity:{text}") < 20
        )
        assert (one[f"windows:{text}"], one[f"positions:{text}"]) == ("4", "252")
    assert one["sha256:start"] != one["sha256:end"]
    assert one["kl_mean:start"] != one["kl_mean:end"]
    assert (one["context"], one["tokens"], one["calib"], one["error"]) == ("64", "256", "", "")
    assert float(one["convert_seconds"]) > 0


def test_weights_go_and_what_repeats_them_stays(studied, stories260k, tmp_path):
    out, rows = studied
    folder = out / rows[1]["folder"]
    assert folder.name.startswith("fast-bases=2-")
    assert sorted(os.listdir(folder)) == [
        "config.json",
        "manifest.json",
        "recipe.toml",
        "report.json",
    ]
    again = convert(stories260k, tmp_path / "again", folder / "recipe.toml", say=lambda line: None)
    files = [json.loads((f / "manifest.json").read_text())["files"] for f in (folder, again)]
    assert files[0] == files[1]
    assert any(name.endswith(".safetensors") for name in files[0])


def test_a_finished_study_does_nothing_again(studied, stories260k, fast, texts, monkeypatch, study):
    out, rows = studied
    before = (out / "results.csv").read_bytes()
    monkeypatch.setattr(module, "convert", None)
    monkeypatch.setattr(compare, "load", None)
    assert study(stories260k, out, fast, texts) == (rows, [])
    assert (out / "results.csv").read_bytes() == before


# --- resuming ---


def test_a_study_goes_on_where_it_was_cut_off(
    stories260k, fast, texts, tmp_path, stubbed, monkeypatch, study
):
    out, evaluated = tmp_path / "out", []

    def cut_off(model, tokens, **options):
        evaluated.append(1)
        if len(evaluated) == 3:  # the second point's first text
            raise KeyboardInterrupt
        return FIGURES

    monkeypatch.setattr(compare, "evaluate", cut_off)
    with pytest.raises(KeyboardInterrupt):
        study(stories260k, out, fast, texts, ["decompose.bases=1,2,3"])
    assert [row["decompose.bases"] for row in read_rows(out)] == ["1"]
    rows, failed = study(stories260k, out, fast, texts, ["decompose.bases=1,2,3"])
    assert not failed
    assert [row["decompose.bases"] for row in rows] == ["1", "2", "3"]
    assert stubbed == [
        "fast-bases=1",
        "fast-bases=2",
        "fast-bases=3",
    ]  # the second stood there whole
    assert len(evaluated) == 3 + 4
    assert not list(out.glob("*/*.safetensors"))


def test_cut_off_before_the_first_row(
    stories260k, fast, texts, tmp_path, stubbed, monkeypatch, study
):
    def cut_off(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "convert", cut_off)
        with pytest.raises(KeyboardInterrupt):
            study(stories260k, tmp_path / "out", fast, texts)
    assert len(study(stories260k, tmp_path / "out", fast, texts, ["decompose.bases=1"])[0]) == 1


def test_a_point_that_fails_is_told_and_tried_again(
    stories260k, fast, texts, tmp_path, stubbed, monkeypatch, study
):
    out, counted = tmp_path / "out", module.convert

    def failing(model, folder, recipe, **options):
        if "bases=1" in Path(folder).name:
            raise RunFailed("the disk is full")
        return counted(model, folder, recipe, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "convert", failing)
        rows, failed = study(stories260k, out, fast, texts)
    assert failed == ["fast bases=1: the disk is full"]
    assert [row["decompose.bases"] for row in rows] == ["2"]
    assert [row["error"] for row in read_rows(out)] == ["the disk is full", ""]
    with pytest.raises(RunFailed, match=r"1 point failed.*\n  fast bases=1: the disk is full"):
        raise_failed(failed)
    rows, failed = study(stories260k, out, fast, texts)
    assert (len(rows), failed) == (2, [])
    assert [row["error"] for row in read_rows(out)] == ["", ""]
    assert stubbed == ["fast-bases=2", "fast-bases=1"]


def test_keep_and_other_settings(stories260k, fast, texts, tmp_path, stubbed, study):
    out = tmp_path / "out"
    one = ["decompose.bases=1"]
    (row,), _ = study(stories260k, out, fast, texts, one, keep=True)
    assert list((out / row["folder"]).glob("*.safetensors"))
    (other,), _ = study(
        stories260k, out, fast, texts, one, tokens=128, keep=True
    )  # another row, the same weights
    assert len(read_rows(out)) == 2
    assert other["setting"] != row["setting"]
    assert (other["folder"], stubbed) == (row["folder"], ["fast-bases=1"])
    study(stories260k, out, fast, texts, one)  # all done: what was kept stays
    assert list((out / row["folder"]).glob("*.safetensors"))
    for path in (out / row["folder"]).glob("*.safetensors"):
        path.write_bytes(b"damaged")
    study(stories260k, out, fast, texts, one, tokens=192, keep=True)
    assert stubbed == ["fast-bases=1"] * 2  # damaged weights are made again


def test_what_atd_did_not_write_stays_in_the_folder_of_a_point(
    stories260k, fast, texts, tmp_path, stubbed, study
):
    out, one = tmp_path / "out", ["decompose.bases=1"]
    (row,), _ = study(stories260k, out, fast, texts, one, keep=True)
    notes = out / row["folder"] / "notes.txt"
    notes.write_text("years of work")
    study(stories260k, out, fast, texts, one, tokens=128)  # the weights are dropped
    assert not list(notes.parent.glob("*.safetensors"))
    _, failed = study(stories260k, out, fast, texts, one, tokens=192)  # and would be made again
    assert len(failed) == 1
    assert "atd did not write its notes.txt" in failed[0]
    assert notes.read_text() == "years of work"


def test_a_grid_that_grows_fills_in_its_new_options(
    stories260k, fast, texts, tmp_path, stubbed, study
):
    out = tmp_path / "out"
    study(stories260k, out, fast, texts[:1], ["decompose.bases=1"])
    rows, _ = study(stories260k, out, fast, texts[:1], ["decompose.group=tensor,row"])
    assert [(row["decompose.bases"], row["decompose.group"]) for row in rows] == [
        ("1", "tensor"),
        ("1", "row"),
    ]
    assert stubbed == ["fast-bases=1", "fast-group=row"]


def test_calibration_goes_to_those_that_ask(stories260k, fast, texts, tmp_path, monkeypatch):
    given = {}

    def asked(model, out, recipe, *, calib, **options):
        given[Path(out).name.partition("-")[0]] = calib
        raise RunFailed("enough")

    monkeypatch.setattr(module, "convert", asked)
    monkeypatch.setattr(compare, "load", lambda graph, **options: None)
    shared = {"data": texts[:1], "context": 64, "tokens": 256, "say": lambda line: None}
    recipes = [str(fast), "ternary2"]
    run_study(
        stories260k, tmp_path / "out", recipes, **shared
    )  # by default the model writes its text
    assert given == {"fast": (), "ternary2": ()}
    run_study(stories260k, tmp_path / "out", recipes, calib="self", **shared)
    assert given == {"fast": (), "ternary2": ("self",)}
    assert len(read_rows(tmp_path / "out")) == 2, "the same point"
    run_study(stories260k, tmp_path / "out", recipes, calib=[texts[1], "self"], **shared)
    assert given == {"fast": (), "ternary2": (str(texts[1]), "self")}
    assert [(row["recipe"], row["calib"]) for row in read_rows(tmp_path / "out")] == [
        ("fast", ""),
        ("ternary2", "self"),
        ("ternary2", "end.txt + self"),
    ]


# --- refusals: nothing is written ---


def test_run_refuses(stories260k, fast, texts, tmp_path, study):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "start.txt").write_text("Once upon a time")
    (tmp_path / "x" / "results.csv").write_text("a,b\n1,2\n")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("")
    for out, options, message in (
        ("new", {"texts": []}, "needs a text"),
        ("new", {"texts": [tmp_path / "none.txt"]}, "none.txt: no such file"),
        ("new", {"texts": [tmp_path / "x" / "start.txt"]}, "too few"),
        (
            "new",
            {"texts": [texts[0], tmp_path / "x" / "start.txt"], "context": 4},
            "two texts are called start",
        ),
        ("new", {"tokens": 0}, "--tokens must be at least 1"),
        ("new", {"context": 100000}, "beyond the 512 positions"),
        ("new", {"calib": tmp_path / "none.txt"}, "none.txt: no such file"),
        ("full", {}, "holds no results.csv"),
        ("full/thesis.tex", {}, "holds no results.csv"),
        ("x", {}, "not the results of a study"),
        (stories260k / "study", {}, "must lie outside"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            study(stories260k, tmp_path / out, fast, **({"texts": texts} | options))
    assert sorted(os.listdir(tmp_path)) == ["full", "x"]
    assert os.listdir(full) == ["thesis.tex"]
    assert not (stories260k / "study").exists()


def test_two_studies_do_not_share_a_folder(studied, stories260k, fast, texts, study):
    folder = os.open(studied[0], os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        with pytest.raises(BadInput, match="another run is writing"):
            study(stories260k, studied[0], fast, texts)
    finally:
        os.close(folder)


# --- the command ---


def test_the_command(atd, studied, stories260k, fast, texts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(studied[0], out)

    shared = [
        "--context",
        64,
        "--tokens",
        256,
        *(part for text in texts for part in ("--data", text)),
    ]
    wanted = ["study", stories260k, out, "--recipe", fast, *shared, "--vary"]
    code, printed, err = atd(*wanted, "decompose.bases=1,2")
    assert code == 0, err
    assert "2 points, 2 of them done already" in err
    assert "Pareto front" in printed
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")

    def full(*arguments, **options):
        raise RunFailed("the disk is full")

    monkeypatch.setattr(module, "convert", full)
    code, printed, err = atd(*wanted, "decompose.bases=1,2,3")
    assert code == 1
    assert "fast bases=3: the disk is full" in err
    assert "Pareto front" in printed  # of those that are done
    code, _, err = atd("study", stories260k, tmp_path / "new", *shared)
    assert (code, "at least one recipe" in err) == (2, True)
