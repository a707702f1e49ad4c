"""Recipes: the ones that come with atd, overrides, and every kind of mistake."""

import pytest

from atd.errors import BadInput
from atd.passes.decompose import Decompose
from atd.passes.pack import Pack
from atd.pipeline import Pipeline, Rule
from atd.pipeline.recipe import Recipe, read_recipe, recipe_names, with_overrides


def test_the_recipes_that_come_with_atd():
    assert recipe_names() == [
        "adaptive",
        "datafree2",
        "datafree3",
        "greedy3",
        "llama3-8b-4gb",
        "rotated2",
        "rotated3",
        "ternary1",
        "ternary2",
        "ternary3",
    ]
    for name in recipe_names():
        recipe = read_recipe(name)
        assert recipe.description
        assert "decompose" in {step.name for step in recipe.pipeline.passes}
    options = read_recipe("greedy3").pipeline.passes[0].options()
    assert options | {"method": "greedy", "bases": 3, "group": "tensor"} == options
    assert isinstance(read_recipe("datafree2").pipeline.passes[0], Decompose)


def test_toml_round_trip(tmp_path):
    rules = (Rule(r".*\.0\..*", True), Rule('a"b', False, (("bases", 1), ("group", "row"))))
    recipe = Recipe(
        Pipeline([Decompose(bases=3, rules=rules), Pack()]),
        'says "hello"',
        seed=7,
        nonfinite="zero",
    )
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert read_recipe(path) == recipe


def test_overrides():
    recipe = read_recipe(
        "datafree2",
        [
            "decompose.bases=3",
            "decompose.group=row",
            "decompose.scales = 'tied'",
            "pack.layout=bit-ttt",
        ],
    )
    assert recipe.pipeline.passes[0] == Decompose(bases=3, group="row", scales="tied")
    assert recipe.pipeline.passes[2] == Pack(layout="bit-ttt")
    assert with_overrides(recipe, ["decompose.bases=1"]).pipeline.passes[0] == Decompose(
        bases=1, group="row", scales="tied"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decompose.base=3", "did you mean 'bases'"),
        ("decompos.bases=3", "no pass 'decompos'; did you mean 'decompose'"),
        ("bases=3", "not of the form pass.option=value"),
        ("decompose.bases", "not of the form pass.option=value"),
        ("decompose.bases=two", "must be int or float, not 'two'"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(BadInput, match=message):
        read_recipe("ternary2", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes = [", "not a TOML file"),
        ("", "it has no passes"),
        ("pases = []", "unknown key 'pases'; did you mean 'passes'"),
        ('seed = "x"\n[[passes]]\nname = "fuse"', "seed must be int"),
        ('nonfinite = "keep"\n[[passes]]\nname = "fuse"', "'refuse' or 'zero'"),
        ("[[passes]]\nbases = 2", "name = 'decompose'"),
        ('[[passes]]\nname = "decompos"', "unknown pass 'decompos'; did you mean 'decompose'"),
        ('[[passes]]\nname = "decompose"\ngroups = 64', "no option 'groups'; did you mean 'group'"),
        ('[[passes]]\nname = "decompose"\nrules = 3', "rule"),
    ],
)
def test_bad_recipes_name_the_file_and_the_fault(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        read_recipe(path)
    assert "mine.toml" in str(caught.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(BadInput, match="no recipe 'ternary4'; did you mean 'ternary"):
        read_recipe("ternary4")
