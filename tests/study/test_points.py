"""The grid of a study: which points there are, and which are one."""

import re

import pytest

from atd.errors import BadInput
from atd.study.points import grid


def test_points_are_the_product_and_equal_ones_are_merged():
    said = []
    found = grid(
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
    assert [point.label for point in grid(["datafree2", "greedy3", "datafree2"])] == [
        "datafree2",
        "greedy3",
    ]


def test_commas_in_quotes_belong_to_the_value():
    found = grid(["datafree2"], ["decompose.nodes='.*(q,k).*','.*'"])
    assert [point.values["decompose.nodes"] for point in found] == [".*(q,k).*", ".*"]


def test_options_of_one_name_keep_their_pass():
    (found,) = grid(["datafree2"], ["decompose.nodes='.*mlp.*'", "pack.nodes='.*'"])
    assert found.label == "datafree2 decompose.nodes=.*mlp.* pack.nodes=.*"


def test_recipes_of_one_name_are_told_apart(tmp_path, recipe_text):
    for i in (1, 2):
        (tmp_path / f"r{i}").mkdir()
        (tmp_path / f"r{i}" / "recipe.toml").write_text(recipe_text.format(bases=i))
    found = grid([str(tmp_path / f"r{i}" / "recipe.toml") for i in (1, 2)])
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
        grid(recipes, vary)
