"""allocate: budgets kept to the byte, decisions that decompose follows, refusals before data is
read.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from atd.checkpoint.cache import Cache
from atd.checkpoint.files import read_text
from atd.checkpoint.reader import open_tokenizer
from atd.decomposition.options import decision
from atd.errors import BadInput
from atd.ir import WeightRef
from atd.models import frontend
from atd.passes import allocate as module
from atd.passes.allocate import Allocate
from atd.passes.decompose import Decompose
from atd.pipeline import Context, Figures, Pipeline, Rule, make_pass, parse_pass
from atd.runtime.compare import graph_size
from atd.weights import PackedType
from tests.models.tiny import tiny_graph


def quiet(line: str) -> None:
    pass


def context_of(windows, **options) -> Context:
    """With an object that has of a Calibration what the pass looks at."""
    calibration = SimpleNamespace(tokens=windows, digest=str(windows.tobytes().__hash__()))
    return Context(calibration=calibration, say=options.pop("say", quiet), **options)  # type: ignore[arg-type]


@pytest.fixture
def windows():
    return np.random.default_rng(0).integers(0, 40, (4, 16)).astype(np.int32)


def decisions(graph) -> dict[str, str]:
    return {name: node.attrs["ternary"] for name, node in graph.nodes() if "ternary" in node.attrs}


def packed(graph, windows, *passes):
    return Pipeline([*passes, "decompose", "fuse", "pack"])(graph, context_of(windows))


@pytest.mark.parametrize(
    "bits", [4.1, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2.8, 3.4, 5.0))]
)
def test_bits_are_kept_over_all_bytes_of_the_linears(windows, bits):
    graph = tiny_graph(layers=4, hidden=64, mlp=160, heads=4)
    after = packed(graph, windows, Allocate(bits=bits))
    found, _ = graph_size(after)
    assert 0.96 * bits < found <= bits
    types = dict(after.weights())
    assert str(types["model.embed_tokens"].type).startswith("dense")
    assert str(types["lm_head"].type).startswith("dense")


@pytest.mark.parametrize(
    ("tied", "share"),
    [
        (True, 0.8),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((False, 0.2), (False, 0.5), (False, 0.8), (True, 0.2), (True, 0.5))
        ),
    ],
)
def test_a_budget_counts_every_stored_byte(windows, tied, share):
    """Also with the matrices that rotate puts around a tied model, and fuse's and pack's shapes;
    met to a few permille.
    """
    graph = tiny_graph(layers=4, hidden=64, mlp=160, heads=4, tied=tied, vocabulary=80)
    before = ("fold_norms", "rotate")
    with pytest.raises(BadInput, match="the minimum is") as refused:
        Pipeline([*before, Allocate(budget="1kB")])(graph)
    least = int(re.search(r"minimum is ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))  # type: ignore[index]
    budget = int(least * (1 + share))
    options = {"groups": (32, "row"), "fused": False}
    after = packed(graph, windows, *before, Allocate(budget=f"{budget}B", **options))
    used = sum(ref.type.nbytes for _, ref in after.weights())
    assert 0.99 * budget < used <= budget
    exactly = packed(graph, windows, *before, Allocate(budget=f"{least}B"))
    assert sum(ref.type.nbytes for _, ref in exactly.weights()) == least


def test_shares_of_an_input_are_shared_choices(windows):
    """So that fuse joins them: q, k and v, gate and up; unless they are told apart."""
    graph = tiny_graph(layers=3)
    together = packed(graph, windows, Allocate(bits=3.4))
    names = {
        name.rpartition(".")[2]
        for name, ref in together.weights()
        if isinstance(ref.type, PackedType)
    }
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    apart = decisions(Allocate(bits=4.2, fused=False)(graph, context_of(windows)))
    assert any(
        len({apart[f"model.layers.{i}.self_attn.{n}_proj"] for n in "qkv"}) > 1 for i in range(3)
    )


def test_decompose_follows_and_takes_the_attr_away(windows):
    graph = tiny_graph()
    decided = Allocate(bits=3.4)(graph, context_of(windows))
    after = Decompose(bases=4, group=32, nodes=r".*q_proj")(decided)
    wanted = {name: text for name, text in decisions(decided).items() if text != "dense"}
    types = {
        name: str(ref.type)
        for name, ref in after.weights()
        if not str(ref.type).startswith("dense")
    }
    assert types.keys() == wanted.keys()
    assert all(types[name].startswith(f"ternary {text}[") for name, text in wanted.items())
    assert decisions(decided)["lm_head"] == "dense"
    assert not decisions(after)
    with pytest.raises(BadInput, match=r"rule '.*down_proj' would have no say"):
        Decompose(rules=(Rule(r".*down_proj", skip=True),))(decided)


def test_nodes_that_are_no_choice_stay_dense(windows):
    graph = tiny_graph(layers=2)
    decided = Allocate(bits=20.0, nodes=r"model\.layers\.1\..*")(graph, context_of(windows))
    assert {text for name, text in decisions(decided).items() if ".0." in name} == {"dense"}
    assert {text for name, text in decisions(decided).items() if ".1." in name} == {
        "n=3 g=row tied f16"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"Set allocate.bits=3.4 or allocate.budget=3.9GB"),
        (
            {"bits": 1.0},
            r"bits = 1.0 is below what is possible: the minimum is [\d.]+ bits with N = 1",
        ),
        ({"bits": 40.0}, r"bits = 40.0 is above dense: 32.000 bits is what the dense model takes"),
        (
            {"budget": "5kB"},
            r"budget 5kB \(5,000 bytes\) is below what is possible: .* embedding and head N = 2",
        ),
        ({"budget": "1GB"}, r"budget 1GB \(1,000,000,000 bytes\) is above dense: [\d,]+ bytes"),
        (
            {"bits": 3.0, "nodes": "nothing"},
            r"matches no dense linear of the blocks; names are like 'model.layers.0",
        ),
    ],
)
def test_refused_on_shapes_alone(options, message):
    def unread():
        raise AssertionError("a weight was read")

    graph = tiny_graph()
    graph = graph.with_units(
        tuple(
            u.map_weights(lambda ref: WeightRef(ref.tensor, ref.type, unread)) for u in graph.units
        )
    )
    with pytest.raises(BadInput, match=message):
        Pipeline([Allocate(**options)]).preflight(graph)
    fine = Pipeline([Allocate(bits=3.4), "decompose", "fuse", "pack"]).preflight(graph)
    assert 3.0 < graph_size(fine)[0] <= 3.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3.0, "budget": "1MB"}, "one of the two"),
        ({"budget": "much"}, "is no size"),
        ({"bases": (0, 1)}, "allocate.bases must be"),
        ({"groups": ("tensor",)}, "allocate.groups must be"),
        ({"scales": ()}, "allocate.scales must be"),
        ({"sensitivity": "guess"}, "allocate.sensitivity 'guess' is unknown"),
        ({"layout": "other"}, "allocate.layout 'other' is unknown"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(BadInput, match=message):
        Allocate(**options)


def test_options_round_trip():
    step = make_pass("allocate", {"bits": 3, "groups": [64, "row"], "bases": [1, 2, 3, 4]})
    assert step == Allocate(bits=3.0, groups=(64, "row"), bases=(1, 2, 3, 4))
    assert parse_pass(str(step)) == step
    assert step.needs == {"activations"}


def test_decided_twice_and_converted_already(windows):
    decided = Allocate(bits=3.4)(tiny_graph(), context_of(windows))
    with pytest.raises(BadInput, match="another allocate has decided already"):
        Allocate(bits=3.4)(decided)
    with pytest.raises(BadInput, match="no dense matrix is left"):
        Allocate(bits=3.4)(Decompose(nodes=".*")(tiny_graph()))


def test_what_it_says_and_records(windows):
    lines, figures = [], Figures()
    context = context_of(windows, say=lines.append, record=figures.record)
    Allocate(bits=3.4)(tiny_graph(), context)
    (line,) = lines
    assert re.fullmatch(
        r"allocate: 3\.\d+ bits per weight, [\d,]+ of [\d,]+ bytes \(\d+\.\d+%\), "
        r"predicted KL \d\.\d+",
        line,
    )
    total = sum(found["predicted_kl"] for found in figures.values())
    assert total == pytest.approx(float(line.rpartition(" ")[2]), abs=1e-4)
    assert len(figures) == 14


def test_sensitivities_are_kept_and_used_again(windows, tmp_path, monkeypatch):
    graph = tiny_graph()
    first = decisions(Allocate(bits=3.4)(graph, context_of(windows, cache=Cache(tmp_path))))
    (file,) = tmp_path.glob("sensitivity-*.npz")
    Allocate(bits=3.4)(tiny_graph(seed=1), context_of(windows, cache=Cache(tmp_path)))
    assert len(list(tmp_path.glob("*.npz"))) == 2, "another model's sensitivities are others"

    def again(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "fisher_losses", again)
    assert decisions(Allocate(bits=3.4)(graph, context_of(windows, cache=Cache(tmp_path)))) == first
    Allocate(bits=4.0)(
        graph, context_of(windows, cache=Cache(tmp_path))
    )  # the budget is none of their business
    with pytest.raises(AssertionError, match="measured again"):
        Allocate(bits=3.4, moment_tokens=16)(graph, context_of(windows, cache=Cache(tmp_path)))
    file.write_bytes(b"PK")
    with pytest.raises(AssertionError, match="measured again"):
        Allocate(bits=3.4)(graph, context_of(windows, cache=Cache(tmp_path)))


def test_squared_gradients_of_outputs_are_left_for_decompose_and_kept(windows, tmp_path):
    step = Allocate(bits=3.4)

    def squares() -> dict[str, np.ndarray]:
        after = step(tiny_graph(), context_of(windows, cache=Cache(tmp_path)))
        assert "fisher" not in str(Decompose(method="hessian")(after))
        noted = {
            name: node.attrs["fisher"] for name, node in after.nodes() if "fisher" in node.attrs
        }
        return {name: moments.matrix for name, moments in noted.items()}

    first, kept = squares(), squares()
    assert len(first) == 14
    for name, found in first.items():
        assert (found > 0).all()
        np.testing.assert_array_equal(kept[name], found)


def test_gradients_that_overflow_or_vanish_are_named_and_left_out(windows, monkeypatch):
    real, lines = module.fisher_losses, []
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")

    def damaged(*arguments, **options):
        found = real(*arguments, **options)
        wrong = {q: np.full_like(found.squares[q], np.inf), k: np.zeros_like(found.squares[k])}
        return found._replace(squares=found.squares | wrong)

    monkeypatch.setattr(module, "fisher_losses", damaged)
    after = Allocate(bits=3.4)(tiny_graph(), context_of(windows, say=lines.append))
    assert lines[1:] == [
        f"allocate: {q}: gradients at its outputs overflow; its rows count alike",
        f"allocate: {k}: gradients at its outputs are all zero; its rows count alike",
    ]
    linears = {name: node for name, node in after.nodes() if node.op == "linear"}
    left = [name for name in linears if name != "lm_head" and "fisher" not in linears[name].attrs]
    assert left == [q, k]


@pytest.mark.exact
def test_an_embeddings_moments_are_left_for_decompose_and_kept(windows, tmp_path):
    graph, step = tiny_graph(tied=True), Allocate(budget="30kB")

    def moments() -> np.ndarray:
        after = step(graph, context_of(windows, cache=Cache(tmp_path)))
        (embed,) = [node for _, node in after.nodes() if "moments" in node.attrs]
        assert embed.op == "embed"
        assert "moments=f32[32,32]" in str(embed)
        assert "moments" not in str(Decompose(method="hessian")(after))
        return embed.attrs["moments"].matrix

    first = moments()
    np.testing.assert_array_equal(moments(), first)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(b"PK")
    np.testing.assert_allclose(moments(), first, rtol=1e-5)


@pytest.mark.slow
def test_measured(windows):
    decided = decisions(
        Allocate(bits=3.4, sensitivity="measured")(tiny_graph(mlp=32), context_of(windows))
    )
    assert {text for name, text in decided.items() if "layers" in name} <= {
        f"n={n} g=row tied f16" for n in (1, 2, 3)
    }


def test_better_than_chance_on_a_real_model(stories260k, small):
    """At equal bytes, the predicted KL of the optimum is below that of the stand-in's choice, which
    knows nothing.
    """
    tokens = open_tokenizer(stories260k).encode(read_text(small.calibration))
    windows = np.asarray(tokens[: 16 * 128], np.int32).reshape(16, 128)
    graph = Pipeline(["fold_norms", "rotate"])(frontend.open(stories260k))
    step, context = Allocate(bits=3.6), context_of(windows)
    problem = step.problem(graph)
    losses, _ = step.sensitivities(problem, graph, context)
    blind = decisions(step(graph, Context(say=quiet)))
    seen = problem.solved(losses)
    options = [decision(type) for type in problem.candidates[problem.choices[0][0]]]
    blind_kl = sum(
        loss.sum(axis=0)[options.index(blind[names[0]])]
        for names, loss in zip(problem.choices, losses, strict=True)
    )
    assert seen.used <= seen.budget
    assert seen.predicted_kl < blind_kl


def test_trellis_codes_are_options_and_decompose_follows(windows):
    graph = Pipeline(["fold_norms", "rotate"])(tiny_graph(layers=2, hidden=64, mlp=160, heads=4))
    step = Allocate(bits=3.4, bases=(1, 1.5, 2, 2.5, 3), trellis="fast", fused=False)
    decided = step(graph, context_of(windows))
    chosen = [text for text in decisions(decided).values() if text != "dense"]
    assert sum("taps=" in text for text in chosen) > len(chosen) / 2
    after = packed(graph, windows, step)
    types = {name: str(ref.type) for name, ref in after.weights()}
    assert any(text.startswith("packed trellis n=") for text in types.values())
    found, _ = graph_size(after)
    assert 0.96 * 3.4 < found <= 3.4


@pytest.mark.parametrize(
    "kind", ["fast", *(pytest.param(k, marks=pytest.mark.slow) for k in ("default", "best"))]
)
def test_with_codes_it_is_never_worse_than_without_them_or_than_one_for_all(windows, kind):
    """By the predicted losses: at the bytes of every uniform choice, and of every budget."""
    graph = Pipeline(["fold_norms", "rotate"])(tiny_graph(layers=2, hidden=64, mlp=160, heads=4))
    bases, context = (1, 1.25, 1.5, 1.75, 2, 2.5, 3), context_of(windows)
    step = Allocate(bits=3.4, bases=bases, trellis=kind, scales=("tied", "free"), fused=False)
    problem = step.problem(graph)
    losses, _ = step.sensitivities(problem, graph, context)
    options = len(problem.candidates[problem.choices[0][0]])
    assert options >= 9
    for option in range(options):
        size = sum(problem.bytes_of(names)[option] for names in problem.choices)
        uniform = sum(float(found[:, option].sum()) for found in losses)
        solved = replace(problem, budget=problem.fixed + size).solved(losses)
        assert solved.predicted_kl <= uniform * (1 + 1e-9)
    scalar = Allocate(bits=3.4, bases=(1, 2, 3), scales=("tied", "free"), fused=False)
    before = scalar.problem(graph)
    without = before.solved(scalar.sensitivities(before, graph, context)[0])
    assert problem.solved(losses).predicted_kl < 0.8 * without.predicted_kl


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trellis": "slow"}, "allocate.trellis 'slow' is unknown"),
        ({"bases": (1.5, 2)}, r"allocate.bases must be some of 1, 2, 3, 4, not \[1.5, 2\]"),
        ({"trellis": "fast", "bases": (1.6, 2)}, r"some of 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, not"),
    ],
)
def test_trellis_options_that_cannot_be(options, message):
    with pytest.raises(BadInput, match=message):
        Allocate(bits=3.4, **options)
