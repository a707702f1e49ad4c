"""Passes, their text, their contract, the registry, and a pass that another package brings."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atd.errors import BadInput
from atd.ir import InvalidGraph, Node
from atd.passes.decompose import Decompose
from atd.passes.fuse import Fuse
from atd.passes.pack import Pack
from atd.passes.verify import Verify
from atd.pipeline import Context, Pass, Pipeline, Rule, make_pass, parse_pass, pass_class
from atd.pipeline.registry import BUILTIN
from atd.weights import Packed, PackedType
from tests.models.tiny import loaded, tiny_graph

ROOT = Path(__file__).parents[2]


# --- text ---


@settings(deadline=None)  # the first example imports the passes
@given(
    bases=st.integers(1, 4),
    group=st.one_of(st.integers(32, 4096), st.sampled_from(["row", "tensor"])),
    scales=st.sampled_from(["free", "tied"]),
    dtype=st.sampled_from(["f16", "bf16", "f32"]),
    nodes=st.sampled_from([r"model\.layers\..*", ".*", 'a"b\\d+', "[{,}]"]),
    rules=st.lists(
        st.tuples(st.sampled_from([r".*\.3\..*", "x{1,2}"]), st.integers(1, 4)), max_size=2
    ),
)
def test_passes_round_trip_to_text(bases, group, scales, dtype, nodes, rules):
    made = Decompose(
        bases=bases,
        group=group,
        scales=scales,
        dtype=dtype,
        nodes=nodes,
        rules=tuple(Rule(m, False, (("bases", b),)) for m, b in rules),
    )
    assert parse_pass(str(made)) == made


def test_text_of_a_pass():
    assert str(Fuse()) == "fuse{}"
    assert str(Pack(layout="bit-ttt")) == 'pack{layout = "bit-ttt", nodes = ".*"}'
    assert parse_pass("fuse") == Fuse()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decompos{}", "did you mean 'decompose'"),
        ("decompose{base = 2}", "did you mean 'bases'"),
        ("decompose{bases = true}", "must be int"),
        ("decompose{bases = 5}", "1, 2, 3 or 4"),
        ('decompose{group = "column"}', "'row' or 'tensor'"),
        ("decompose{group = 16}", "at least 32"),
        ('decompose{method = "alss"}', "did you mean 'als'"),
        ('decompose{method = "greedy", scales = "tied"}', "free scales only"),
        ('decompose{nodes = "("}', "no regular expression"),
        ('decompose{rules = [{match = "(", bases = 2}]}', "no regular expression"),
        ('decompose{rules = [{match = ".*", bases = 7}]}', "1, 2, 3 or 4"),
        ('decompose{rules = [{match = ".*", skip = true, bases = 2}]}', "takes no other option"),
        ("decompose{rules = [{bases = 2}]}", "match = 'regex'"),
        ('fuse{rules = [{match = ".*"}]}', "takes no rules"),
        ('pack{layout = "nibble"}', "is unknown"),
        ("decompose{bases = }", "no TOML"),
        ("decompose bases=2", "not a pass"),
    ],
)
def test_bad_passes_are_refused_by_name(text, message):
    with pytest.raises(BadInput, match=message):
        parse_pass(text)


# --- the contract ---


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_options_that_are_not_finite_are_refused(bad):
    for name in BUILTIN:
        cls = pass_class(name)
        for option, value in cls().options().items():
            if type(value) is float:
                with pytest.raises(BadInput, match=f"{name}"):
                    parse_pass(f"{name}{{{option} = {bad}}}")
    with pytest.raises(BadInput, match=r"decompose"):
        parse_pass(f"decompose{{rules = [{{match = 'lm_head', damping = {bad}}}]}}")
    with pytest.raises(BadInput, match=r"decompose"):
        Pipeline([Decompose(damping=float(bad))])


def test_pipeline_changes_types_before_any_weight_is_read():
    def never():
        raise AssertionError("a weight was read")

    graph = tiny_graph()

    def unread_node(node):
        return replace(
            node, weights={slot: replace(ref, load=never) for slot, ref in node.weights.items()}
        )

    unread = graph.with_units(
        tuple(replace(u, nodes=tuple(map(unread_node, u.nodes))) for u in graph.units)
    )
    after = Pipeline([Decompose(group="row"), Fuse(), Pack()])(unread)
    types = {name: str(ref.type) for name, ref in after.weights()}
    assert (
        types["model.layers.1.self_attn.qkv_proj"]
        == "packed n=2 g=row free layout=aligned/1 f16[64,32]"
    )
    assert types["model.embed_tokens"] == "dense f32[40,32]"
    with pytest.raises(AssertionError, match="was read"):
        after.blocks[0].nodes[1].weights["weight"].load()


def test_rules_first_match_wins_and_skip_leaves_alone():
    rules = (
        Rule(r".*\.0\.mlp\..*", skip=True),
        Rule(r".*\.mlp\.down_proj", options=(("bases", 1),)),
        Rule(r".*\.down_proj", options=(("bases", 4),)),
    )
    types = {
        name: ref.type
        for name, ref in Decompose(group="row", bases=3, rules=rules)(tiny_graph()).weights()
    }
    assert str(types["model.layers.0.mlp.down_proj"]).startswith("dense")
    assert str(types["model.layers.1.mlp.down_proj"]).startswith("ternary n=1")
    assert str(types["model.layers.1.mlp.up_proj"]).startswith("ternary n=3")


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(BadInput, match=r"rule 'layers\.0' matches no node"):
        Pack(rules=(Rule("layers.0", skip=True),))(Decompose()(tiny_graph()))
    with pytest.raises(BadInput, match=r"rule 'layers\.0' matches no dense matrix"):
        Decompose(rules=(Rule("layers.0", skip=True),))(tiny_graph())
    # a name that exists, but that `nodes` does not let through
    with pytest.raises(BadInput, match="matches no dense matrix among"):
        Decompose(rules=(Rule("lm_head", options=(("bases", 3),)),))(tiny_graph())
    with pytest.raises(BadInput, match="matches none of the dense matrices"):
        Decompose(nodes=r"layers\..*")(tiny_graph())


def test_an_order_that_cannot_work_is_refused():
    with pytest.raises(BadInput, match="put decompose before it"):
        Pipeline([Pack(), Decompose()])(tiny_graph())
    with pytest.raises(BadInput, match="converted already"):
        Pipeline([Decompose(nodes=".*"), Decompose(nodes=".*")])(tiny_graph())


@dataclass(frozen=True, kw_only=True)
class Break(Pass):
    name = "break"
    scope = "block"

    def rewrite(self, block, context):
        return replace(block, nodes=(*block.nodes, Node("extra", "add", ("x", "nowhere"))))


def test_a_pass_that_breaks_the_graph_is_named():
    with pytest.raises(
        InvalidGraph, match=r"after pass break: model\.extra: input %nowhere is not defined"
    ):
        Break()(tiny_graph())


@dataclass(frozen=True, kw_only=True)
class Promise(Pass):
    name = "promise"
    scope = "graph"

    def rewrite(self, graph, context):
        return None

    def ensures(self, before, after):
        return "it always fails"


def test_a_broken_promise_is_named():
    with pytest.raises(InvalidGraph, match="pass promise broke its own promise: it always fails"):
        Promise()(tiny_graph())


def test_stages_are_cut_where_a_pass_reads_what_was_written():
    a, b, c = Decompose(), Pack(), Verify()
    assert Pipeline([a, b]).stages() == [((a, b), ())]
    assert Pipeline([a, c, b, c]).stages() == [((a,), (c,)), ((b,), (c,))]
    tune = make_pass("calibrate", {})
    assert Pipeline([a, tune, b, c]).stages() == [((a,), (tune,)), ((b,), (c,))]
    assert Pipeline([a, tune]).stages() == [
        ((a,), (tune,)),
        ((), ()),
    ]  # what it makes is written last


def test_feature_weights_reach_the_decomposition():
    """Errors on the inputs that matter must shrink, and others grow."""
    graph = tiny_graph(hidden=64)
    name = "model.layers.0.self_attn.o_proj"
    importance = np.ones(64, np.float32)
    importance[:8] = 1000.0

    def error(context):
        node = Decompose(group="row")(graph, context).blocks[0].node("self_attn.o_proj")
        dense = graph.blocks[0].node("self_attn.o_proj").weights["weight"].load().dequantize()
        difference = (np.asarray(node.weights["weight"].load().dequantize()) - dense) ** 2
        return difference[:, :8].sum(), difference[:, 8:].sum()

    plain, weighted = error(Context()), error(Context(feature_weights={name: importance}))
    assert weighted[0] < 0.5 * plain[0]
    assert weighted[1] > plain[1]


def test_a_graph_can_be_executed_after_each_pass():
    """The lazily rewritten graph runs: same logits after pack and fuse as after decompose."""
    from atd.models.model import load

    tokens = np.arange(12, dtype=np.int32).reshape(1, 12)
    graph, logits = tiny_graph(layers=1, mlp=32), []
    for step in (Decompose(group="row", bases=3), Fuse(), Pack()):
        graph = step(graph)
        logits.append(np.asarray(load(graph, backend="xla")(tokens)))
    dense = np.asarray(load(tiny_graph(layers=1, mlp=32))(tokens))
    assert 0 < np.abs(logits[0] - dense).max() < 0.3 * np.abs(dense).max()
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-5)


# --- the registry ---


def test_built_in_passes_are_found_by_name():
    for name in BUILTIN:
        assert pass_class(name).name == name


@pytest.fixture(scope="module")
def third_party(tmp_path_factory) -> Path:
    """A folder with the third-party distribution installed in it by pip."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    subprocess.run(["cp", "-r", str(ROOT / "tests/third_party"), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    ]
    subprocess.run([*command, str(source / "third_party")], check=True)
    return target


def run_python(code: str, *path: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_a_third_party_pass_works_in_a_recipe(third_party, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[passes]]\nname = "halve"\n'
        '[[passes.rules]]\nmatch = ".*\\\\.0\\\\..*"\nfactor = 0.25\n'
        '[[passes]]\nname = "decompose"\n'
    )
    code = f"""
from atd.pipeline.recipe import read_recipe
from tests.models.tiny import tiny_graph
import numpy as np
recipe = read_recipe({str(recipe)!r}, ["halve.factor=2"])
print(recipe.pipeline.passes[0])
before, after = tiny_graph(), recipe.pipeline.passes[0](tiny_graph())
for i in (0, 1):
    nodes = (graph.blocks[i].node("mlp.down_proj") for graph in (before, after))
    a, b = (node.weights["weight"].load().array for node in nodes)
    print(np.unique(np.round(b / a, 3)))
"""
    done = run_python(code, third_party)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        'halve{factor = 2.0, nodes = ".*\\\\.down_proj", '
        'rules = [{match = ".*\\\\.0\\\\..*", factor = 0.25}]}',
        "[0.25]",
        "[2.]",
    ]


def test_a_pass_name_given_twice_is_an_error(third_party, tmp_path):
    other = tmp_path / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[atd.passes]\nhalve = other:Halve\n")
    done = run_python(
        "from atd.pipeline import make_pass; make_pass('halve', {})", third_party, tmp_path
    )
    assert "pass 'halve' is registered twice" in done.stderr
    assert "atd-halve" in done.stderr
    assert "other" in done.stderr


def test_an_unknown_pass_lists_the_known_ones(third_party):
    done = run_python("from atd.pipeline import make_pass; make_pass('distil', {})", third_party)
    known = (
        "allocate, calibrate, decompose, equalize, fold_norms, fuse, halve, pack, rotate, verify"
    )
    assert f"unknown pass 'distil'; known: {known}" in done.stderr


def test_options_reach_the_pass():
    assert make_pass(
        "decompose", {"bases": 3, "rules": [{"match": ".*q_proj", "group": 64}]}
    ) == Decompose(bases=3, rules=(Rule(".*q_proj", False, (("group", 64),)),))


@pytest.mark.exact
def test_packing_keeps_values_bit_for_bit():
    graph = loaded(Decompose(group="row", bases=3)(tiny_graph(layers=1)))
    for layout in ("interleaved", "bit-ttt", "tq2_0"):
        for (_, ternary), (_, packed) in zip(
            graph.weights(), Pack(layout=layout)(graph).weights(), strict=True
        ):
            if isinstance(packed.type, PackedType):
                weight = packed.load()
                assert isinstance(weight, Packed)
                np.testing.assert_array_equal(weight.dequantize(), ternary.load().dequantize())
