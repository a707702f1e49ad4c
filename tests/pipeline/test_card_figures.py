"""Figures of an evaluation in the card of an output folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from atd.checkpoint.folder import CARD, MANIFEST, REPORT, foreign
from atd.errors import BadInput, RunFailed
from atd.pipeline.card_figures import add_figures, check_card, figures, with_row
from atd.pipeline.convert import convert
from atd.pipeline.integrity import verify_checkpoint
from atd.runtime.evaluate import Evaluation

RESULT = Evaluation(
    perplexity=17.4939,
    against_perplexity=15.489,
    kl_mean=0.10644,
    kl_median=0.0829,
    kl_99=0.5085,
    top1_agreement=0.828,
    windows=8,
    positions=4088,
    context=512,
    bos=False,
    convention="standard",
    tokens=4096,
    seconds=1.0,
    tokens_per_second=1.0,
)
ROW = figures(RESULT, text="topics.txt", against="user/dense")
LINE = (
    "| topics.txt | 4,096 | 8 windows of 512 tokens, no BOS, 4,088 positions scored | user/dense "
    "| 15.489 | 17.494 | 0.1064 | 0.5085 | 82.8% |"
)


@pytest.fixture(scope="module")
def made(packaged, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("figures") / "out"
    return convert(packaged.folder, out, "datafree2", say=lambda line: None)


@pytest.fixture
def out(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def test_figures_stand_in_front_of_how_to_load(out):
    card = (out / CARD).read_text()
    check_card(out)
    add_figures(out, ROW)
    found = (out / CARD).read_text()
    assert f"|\n{LINE}\n\n## Use\n" in found
    start, end = found.index("## Evaluation"), found.index("## Use")
    assert found[:start] + found[end:] == card
    verify_checkpoint(out)
    assert foreign(out) is None


def test_one_row_per_setting_of_which_the_latest_counts():
    card = "# Mine\n\ntext"
    once = with_row(card, ROW)
    assert once.startswith("# Mine\n\ntext\n\n## Evaluation\n\nMeasured")
    assert with_row(once, ROW) == once
    other = figures(replace(RESULT, perplexity=18.0), text="topics.txt", against="user/dense")
    assert with_row(once, other) == once.replace("17.494", "18.000")
    alone = replace(RESULT, against_perplexity=None, kl_mean=None, kl_99=None, top1_agreement=None)
    twice = with_row(once, figures(alone, text="a|b_c\n.txt", note="inputs not rounded"))
    last = twice.rstrip("\n").splitlines()[-2:]
    assert last[0] == LINE
    assert last[1].startswith(r"| a\|b\_c .txt | 4,096 | 8 windows")
    assert last[1].endswith("scored, inputs not rounded | – | – | 17.494 | – | – | – |")


def test_a_card_of_the_users_own_stays_changed(out):
    (out / CARD).write_text("# Mine\n")
    manifest = (out / MANIFEST).read_bytes()
    add_figures(out, ROW)
    assert LINE in (out / CARD).read_text()
    assert (out / MANIFEST).read_bytes() == manifest
    assert foreign(out) == "its README.md was changed since atd wrote it"


def test_other_changes_are_found_as_ever(out):
    report = out / REPORT
    report.write_text(report.read_text().replace("datafree", "free").replace('"node"', '"nodes"'))
    add_figures(out, ROW)
    with pytest.raises(RunFailed, match=r"report\.json is not what was written"):
        verify_checkpoint(out)


def test_models_without_a_card_of_atds_are_refused(out, packaged):
    with pytest.raises(BadInput, match="not a checkpoint that atd made"):
        check_card(packaged.folder)
    for name in ("user/repo", out / CARD):
        with pytest.raises(BadInput, match="no folder on this machine; leave out --card"):
            check_card(name)
    (out / CARD).write_bytes(b"\xff")
    with pytest.raises(BadInput, match=r"README\.md: not UTF-8"):
        check_card(out)
    (out / CARD).unlink()
    with pytest.raises(BadInput, match=r"README\.md: no such file"):
        check_card(out)
    manifest = json.loads((out / MANIFEST).read_text()) | {"atd": "2"}
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match=r"manifest\.json: damaged"):
        check_card(out)
