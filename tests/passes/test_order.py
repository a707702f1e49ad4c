"""Orders of passes that cannot work are refused before any weight is read, with the reason; those
of the recipes work.
"""

import pytest

from atd.errors import BadInput
from atd.ir import Graph, WeightRef
from atd.pipeline import Pipeline
from atd.pipeline.recipe import read_recipe, recipe_names
from tests.models.tiny import tiny_graph


def unreadable(tied: bool = False) -> Graph:
    def load():
        raise AssertionError("a weight was read")

    graph = tiny_graph(hidden=64, mlp=96, tied=tied)
    units = (
        unit.map_weights(lambda ref: WeightRef(ref.tensor, ref.type, load)) for unit in graph.units
    )
    return graph.with_units(tuple(units))


ALLOCATE = "allocate{bits = 3.6}"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        (
            ["calibrate", "decompose"],
            "calibrate: there is no ternary weight to calibrate; put decompose before it",
        ),
        (
            ["decompose", ALLOCATE],
            "allocate: .*q_proj is ternary .* already; put allocate before decompose",
        ),
        (
            ["decompose", "pack", "fuse", ALLOCATE],
            "allocate: .* is packed .* already; put allocate before decompose",
        ),
        (
            ["fold_norms", "decompose", "rotate"],
            "rotate: .* is ternary .*; put rotate before decompose",
        ),
        (["decompose", "rotate"], "rotate: .*put fold_norms before rotate"),
        (["fold_norms", "fuse", "rotate"], "rotate: .*put rotate before fuse"),
        (
            ["rotate", "fold_norms"],
            "rotate: the norm .* has a gain, .*; put fold_norms before rotate",
        ),
        (
            ["fold_norms", "rotate", "fold_norms"],
            r"fold_norms: there is no norm .* \(is it done already\?\)",
        ),
        (["decompose", "fold_norms"], "fold_norms: .* is ternary .*; put fold_norms first"),
        (["decompose", "equalize"], "equalize: .* is ternary .*; put equalize before decompose"),
        (["equalize", "rotate"], "rotate: .*put fold_norms before rotate"),
        ([ALLOCATE, ALLOCATE, "decompose"], "allocate: another allocate has decided already"),
        (
            ["fold_norms", ALLOCATE],
            "allocate: no pass carries out what it decides; put decompose behind it",
        ),
        (
            [ALLOCATE, "fuse"],
            "allocate: no pass carries out what it decides; put decompose behind it",
        ),
        ([ALLOCATE, "calibrate", "decompose"], "calibrate: there is no ternary weight"),
        ([ALLOCATE, "pack"], "pack: there is no ternary weight .*; put decompose before it"),
        (
            [ALLOCATE, "decompose{rules = [{match = '.*', bases = 3}]}"],
            "decompose: allocate has decided on every matrix, and the rule '.*' would have no say",
        ),
        (["allocate", "decompose"], "allocate: how many bytes"),
        (["decompose", "decompose"], "decompose: nodes = .* matches none of the dense matrices"),
        (["fuse", "pack"], "pack: there is no ternary weight"),
    ],
)
def test_refused_in_preflight(passes, reason, tied):
    with pytest.raises(BadInput, match=f"^pass {reason}"):
        Pipeline(passes).preflight(unreadable(tied))


def test_calibrate_before_decompose_behind_rotate():
    with pytest.raises(BadInput, match=r"^pass calibrate: there is no ternary weight"):
        Pipeline(["fold_norms", "rotate", "calibrate", "decompose"]).preflight(
            unreadable(tied=True)
        )


def test_a_rotated_tied_model_is_not_rotated_again():
    with pytest.raises(BadInput, match=r"^pass rotate: .*is the model rotated already"):
        Pipeline(["fold_norms", "rotate", "rotate"]).preflight(unreadable(tied=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "llama3-8b-4gb"])
def test_recipes_pass(name, tied):
    graph = read_recipe(name).pipeline.preflight(unreadable(tied))
    assert "packed" in str(graph)


def test_the_budget_of_a_large_model_is_refused_for_a_small_one():
    with pytest.raises(BadInput, match=r"allocate: budget 3\.43GB .* is above dense"):
        read_recipe("llama3-8b-4gb").pipeline.preflight(unreadable())
    fits = read_recipe("llama3-8b-4gb", ["allocate.budget=60kB"])
    assert "packed" in str(fits.pipeline.preflight(unreadable()))


def test_parts_that_were_decided_differently_are_not_joined():
    passes = [f"{ALLOCATE[:-1]}, fused = false}}", "fuse", "decompose"]
    apart = Pipeline(passes).preflight(unreadable())
    decided = Pipeline([passes[0], "decompose"]).preflight(unreadable())
    sizes = [sum(ref.type.nbytes for _, ref in graph.weights()) for graph in (apart, decided)]
    assert sizes[0] == sizes[1]
