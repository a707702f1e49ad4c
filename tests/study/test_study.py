"""Sweeps: which points there are, that none is done twice or lost, what their folders and rows hold, table and picture."""

import csv
import fcntl
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from atd.errors import BadInput, RunFailed
from atd.pipeline.convert import convert
from atd.runtime.evaluate import Evaluation
from atd.study import results
from atd.study import run as study
from atd.study.points import points
from atd.study.run import raise_failed, run

FAST = '[[passes]]\nname = "decompose"\nmethod = "greedy"\nbases = {bases}\ngroup = "tensor"\n[[passes]]\nname = "pack"\n'
FIGURES = Evaluation(9.5, 5.9, 0.5, 0.25, 3.0, 0.7, 4, 252, 64, False, "standard", 256, 1.0, 100.0)


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> Path:
    """A recipe that takes a moment."""
    path = tmp_path_factory.mktemp("recipes") / "fast.toml"
    path.write_text(FAST.format(bases=1))
    return path


@pytest.fixture(scope="module")
def texts(shared_data, tmp_path_factory) -> list[Path]:
    words = (shared_data / "text" / "tinystories_sample.txt").read_text()
    paths = [tmp_path_factory.mktemp("texts") / f"{name}.txt" for name in ("start", "end")]
    paths[0].write_text(words[:1800])
    paths[1].write_text(words[-1800:])
    return paths


@pytest.fixture(scope="module")
def swept(stories260k, fast, texts, tmp_path_factory) -> tuple[Path, list[results.Row]]:
    """(OUT, rows) of a real sweep with two points on two texts; not to be changed."""
    out = tmp_path_factory.mktemp("sweeps") / "out"
    rows, failed = sweep(stories260k, out, fast, texts)
    assert not failed
    return out, rows


def sweep(model, out, recipe, texts, vary=("decompose.bases=1,2",), **options):
    options = {"data": texts, "context": 64, "tokens": 256, "say": lambda line: None} | options
    return run(model, out, [str(recipe)], vary, **options)


@pytest.fixture
def stubbed(monkeypatch):
    """Nothing is loaded or evaluated; conversions are real, and counted by the names of their folders."""
    done = []

    def counted(model, out, recipe, **options):
        done.append(Path(out).name.rpartition("-")[0])
        return convert(model, out, recipe, **options)

    monkeypatch.setattr(study, "load", lambda path, **options: None)
    monkeypatch.setattr(study, "evaluate", lambda model, tokens, **options: FIGURES)
    monkeypatch.setattr(study, "convert", counted)
    return done


def read_rows(out: Path) -> list[dict]:
    return list(csv.DictReader((out / "results.csv").open()))


# --- points ---


def test_points_are_the_product_and_equal_ones_are_merged():
    said = []
    found = points(
        ["datafree2", "datafree3"], ["decompose.bases=2,3", "decompose.group= 64 ,row"], said.append
    )
    assert [point.label for point in found] == [
        f"datafree2 bases={bases} group={group}" for bases in (2, 3) for group in (64, "row")
    ]  # datafree3 differs from datafree2 in its bases alone
    assert said[0] == "datafree3 bases=2 group=64 is datafree2 bases=2 group=64: done once"
    assert len(said) == 4
    assert len({point.digest for point in found}) == 4
    assert all(
        step.options()["bases"] == 3
        for step in found[3].recipe.pipeline.passes
        if step.name == "decompose"
    )
    assert [point.label for point in points(["datafree2", "greedy3", "datafree2"])] == [
        "datafree2",
        "greedy3",
    ]


def test_commas_in_quotes_belong_to_the_value():
    found = points(["datafree2"], ["decompose.nodes='.*(q,k).*','.*'"])
    assert [point.values["decompose.nodes"] for point in found] == [".*(q,k).*", ".*"]


def test_options_of_one_name_keep_their_pass():
    (found,) = points(["datafree2"], ["decompose.nodes='.*mlp.*'", "pack.nodes='.*'"])
    assert found.label == "datafree2 decompose.nodes=.*mlp.* pack.nodes=.*"


def test_recipes_of_one_name_are_told_apart(tmp_path):
    for i in (1, 2):
        (tmp_path / f"r{i}").mkdir()
        (tmp_path / f"r{i}" / "recipe.toml").write_text(FAST.format(bases=i))
    found = points([str(tmp_path / f"r{i}" / "recipe.toml") for i in (1, 2)])
    assert [point.label for point in found] == [str(tmp_path / f"r{i}" / "recipe") for i in (1, 2)]


@pytest.mark.parametrize(
    ("recipes", "vary", "message"),
    [
        ([], [], "at least one recipe"),
        (["ternary5"], [], "no recipe 'ternary5'"),
        (["datafree2"], ["decompose.bases"], "not of the form"),
        (["datafree2"], ["bases=1"], "not of the form"),
        (["datafree2"], ["decompose.bases="], "not of the form"),
        (["datafree2"], ["decompose.bases=1,,2"], "not of the form"),
        (["datafree2"], ["decompose.nodes='.*,2"], "not of the form"),
        (["datafree2"], ["decompose.bases=1, "], "empty value"),
        (["datafree2"], ["decompose.bases=1", "decompose.bases=2"], "twice"),
        (["datafree2"], ["decompose.base=1"], "no option 'base'; did you mean 'bases'"),
        (["datafree2"], ["decompose.bases=1,9"], "with decompose.bases=9"),
        (["greedy3", "datafree2"], ["fuse.rules=1"], "recipe greedy3 has no pass 'fuse'"),
        (["datafree2"], ["decompos.bases=1"], "no pass 'decompos'; did you mean 'decompose'"),
    ],
)
def test_points_refuse(recipes, vary, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        points(recipes, vary)


# --- a real sweep ---


def test_rows_hold_figures_and_conditions(swept):
    out, rows = swept
    assert rows == read_rows(out)
    one, two = rows
    assert (one["recipe"], one["decompose.bases"], two["decompose.bases"]) == ("fast", "1", "2")
    assert results.number(two, "bits_per_weight") > 1.5 * results.number(one, "bits_per_weight") > 2
    for text in ("start", "end"):
        assert (
            results.number(one, f"kl_mean:{text}") > results.number(two, f"kl_mean:{text}") > 0.01
        )
        assert (
            results.number(one, f"dense_perplexity:{text}")
            == results.number(two, f"dense_perplexity:{text}")
            < 20
        )
        assert (one[f"windows:{text}"], one[f"positions:{text}"]) == ("4", "252")
    assert one["sha256:start"] != one["sha256:end"]
    assert one["kl_mean:start"] != one["kl_mean:end"]
    assert (one["context"], one["tokens"], one["calib"], one["error"]) == ("64", "256", "", "")
    assert float(one["convert_seconds"]) > 0


def test_weights_go_and_what_repeats_them_stays(swept, stories260k, tmp_path):
    out, rows = swept
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


def test_a_finished_sweep_does_nothing_again(swept, stories260k, fast, texts, monkeypatch):
    out, rows = swept
    before = (out / "results.csv").read_bytes()
    monkeypatch.setattr(study, "convert", None)
    monkeypatch.setattr(study, "load", None)
    assert sweep(stories260k, out, fast, texts) == (rows, [])
    assert (out / "results.csv").read_bytes() == before


# --- resuming ---


def test_a_sweep_goes_on_where_it_was_cut_off(
    stories260k, fast, texts, tmp_path, stubbed, monkeypatch
):
    out, evaluated = tmp_path / "out", []

    def cut_off(model, tokens, **options):
        evaluated.append(1)
        if len(evaluated) == 3:  # the second point's first text
            raise KeyboardInterrupt
        return FIGURES

    monkeypatch.setattr(study, "evaluate", cut_off)
    with pytest.raises(KeyboardInterrupt):
        sweep(stories260k, out, fast, texts, ["decompose.bases=1,2,3"])
    assert [row["decompose.bases"] for row in read_rows(out)] == ["1"]
    rows, failed = sweep(stories260k, out, fast, texts, ["decompose.bases=1,2,3"])
    assert not failed
    assert [row["decompose.bases"] for row in rows] == ["1", "2", "3"]
    assert stubbed == [
        "fast-bases=1",
        "fast-bases=2",
        "fast-bases=3",
    ]  # the second stood there whole
    assert len(evaluated) == 3 + 4
    assert not list(out.glob("*/*.safetensors"))


def test_cut_off_before_the_first_row(stories260k, fast, texts, tmp_path, stubbed, monkeypatch):
    def cut_off(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "convert", cut_off)
        with pytest.raises(KeyboardInterrupt):
            sweep(stories260k, tmp_path / "out", fast, texts)
    assert len(sweep(stories260k, tmp_path / "out", fast, texts, ["decompose.bases=1"])[0]) == 1


def test_a_point_that_fails_is_told_and_tried_again(
    stories260k, fast, texts, tmp_path, stubbed, monkeypatch
):
    out, counted = tmp_path / "out", study.convert

    def failing(model, folder, recipe, **options):
        if "bases=1" in Path(folder).name:
            raise RunFailed("the disk is full")
        return counted(model, folder, recipe, **options)

    with monkeypatch.context() as patch:
        patch.setattr(study, "convert", failing)
        rows, failed = sweep(stories260k, out, fast, texts)
    assert failed == ["fast bases=1: the disk is full"]
    assert [row["decompose.bases"] for row in rows] == ["2"]
    assert [row["error"] for row in read_rows(out)] == ["the disk is full", ""]
    with pytest.raises(RunFailed, match=r"1 points failed.*\n  fast bases=1: the disk is full"):
        raise_failed(failed)
    rows, failed = sweep(stories260k, out, fast, texts)
    assert (len(rows), failed) == (2, [])
    assert [row["error"] for row in read_rows(out)] == ["", ""]
    assert stubbed == ["fast-bases=2", "fast-bases=1"]


def test_keep_and_other_settings(stories260k, fast, texts, tmp_path, stubbed):
    out = tmp_path / "out"
    one = ["decompose.bases=1"]
    (row,), _ = sweep(stories260k, out, fast, texts, one, keep=True)
    assert list((out / row["folder"]).glob("*.safetensors"))
    (other,), _ = sweep(
        stories260k, out, fast, texts, one, tokens=128, keep=True
    )  # another row, the same weights
    assert len(read_rows(out)) == 2
    assert other["setting"] != row["setting"]
    assert (other["folder"], stubbed) == (row["folder"], ["fast-bases=1"])
    sweep(stories260k, out, fast, texts, one)  # all done: what was kept stays
    assert list((out / row["folder"]).glob("*.safetensors"))
    for path in (out / row["folder"]).glob("*.safetensors"):
        path.write_bytes(b"damaged")
    sweep(stories260k, out, fast, texts, one, tokens=192, keep=True)
    assert stubbed == ["fast-bases=1"] * 2  # damaged weights are made again


def test_a_grid_that_grows_fills_in_its_new_options(stories260k, fast, texts, tmp_path, stubbed):
    out = tmp_path / "out"
    sweep(stories260k, out, fast, texts[:1], ["decompose.bases=1"])
    rows, _ = sweep(stories260k, out, fast, texts[:1], ["decompose.group=tensor,row"])
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

    monkeypatch.setattr(study, "convert", asked)
    monkeypatch.setattr(study, "load", lambda path, **options: None)
    shared = {"data": texts[:1], "context": 64, "tokens": 256, "say": lambda line: None}
    recipes = [str(fast), "ternary2"]
    run(stories260k, tmp_path / "out", recipes, **shared)  # by default the model writes its text
    assert given == {"fast": (), "ternary2": ()}
    run(stories260k, tmp_path / "out", recipes, calib="self", **shared)
    assert given == {"fast": (), "ternary2": ("self",)}
    assert len(read_rows(tmp_path / "out")) == 2, "the same point"
    run(stories260k, tmp_path / "out", recipes, calib=[texts[1], "self"], **shared)
    assert given == {"fast": (), "ternary2": (str(texts[1]), "self")}
    assert [(row["recipe"], row["calib"]) for row in read_rows(tmp_path / "out")] == [
        ("fast", ""),
        ("ternary2", "self"),
        ("ternary2", "end.txt + self"),
    ]


# --- refusals: nothing is written ---


def test_run_refuses(stories260k, fast, texts, tmp_path):
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
        ("x", {}, "not a table of atd sweep"),
        (stories260k / "sweep", {}, "must lie outside"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            sweep(stories260k, tmp_path / out, fast, **({"texts": texts} | options))
    assert sorted(os.listdir(tmp_path)) == ["full", "x"]
    assert os.listdir(full) == ["thesis.tex"]
    assert not (stories260k / "sweep").exists()


def test_two_sweeps_do_not_share_a_folder(swept, stories260k, fast, texts):
    folder = os.open(swept[0], os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        with pytest.raises(BadInput, match="another sweep is writing"):
            sweep(stories260k, swept[0], fast, texts)
    finally:
        os.close(folder)


# --- table, picture, command ---


def test_the_table_is_sorted_and_marks_the_front(swept):
    beaten = swept[1][1] | {
        "recipe": "worse",
        "folder": "z",
        "kl_mean:start": "99",
        "kl_mean:end": "0.0001",
    }
    text = io.StringIO()
    Console(width=160, file=text).print(results.table([beaten, swept[1][1], swept[1][0]]))
    one, two, worse = (
        line for line in text.getvalue().splitlines() if re.match("fast|worse", line)
    )
    assert one.split()[:2] == ["fast", "1"]
    assert two.split()[:2] == ["fast", "2"]
    assert (one.count("●"), two.count("●"), worse.count("●")) == (2, 1, 1)
    assert "4 windows of 64 tokens, no BOS, 252 positions scored" in " ".join(
        text.getvalue().split()
    )


def test_a_table_of_one_text_fits_80_columns(swept):
    row = {c: v for c, v in swept[1][1].items() if not c.endswith(":end")} | {
        "decompose.group": "tensor"
    }
    text = io.StringIO()
    Console(width=80, file=text).print(results.table([row]))
    assert f"{results.number(row, 'top1:start'):.1%}" in text.getvalue()
    assert "fast" in text.getvalue()


def test_the_command(atd, swept, stories260k, fast, texts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(swept[0], out)

    shared = [
        "--context",
        64,
        "--tokens",
        256,
        *(part for text in texts for part in ("--data", text)),
    ]
    wanted = ["sweep", stories260k, out, "--recipe", fast, *shared, "--vary"]
    code, printed, err = atd(*wanted, "decompose.bases=1,2")
    assert code == 0, err
    assert "2 points, 2 of them done before" in err
    assert "Pareto front" in printed
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")

    def full(*arguments, **options):
        raise RunFailed("the disk is full")

    monkeypatch.setattr(study, "convert", full)
    code, printed, err = atd(*wanted, "decompose.bases=1,2,3")
    assert code == 1
    assert "fast bases=3: the disk is full" in err
    assert "Pareto front" in printed  # of those that are done
    code, _, err = atd("sweep", stories260k, tmp_path / "new", *shared)
    assert (code, "at least one recipe" in err) == (2, True)
