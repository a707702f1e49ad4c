"""The model: prefill and decode against the whole forward pass, packed weights, compilations,
memory, refusals.
"""

import weakref
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from atd.errors import BadInput
from atd.ir import Graph, Node, WeightRef, in_memory
from atd.kernels.triton import attention
from atd.models import execute, ops
from atd.models import model as model_module
from atd.models.model import load
from atd.models.rope import rope_frequencies
from atd.pipeline import Pipeline
from atd.weights import Dense, DenseType, Packed, PackedType, Ternary, TernaryType
from atd.weights.layouts import LAYOUTS
from tests.models.tiny import tiny_graph

VOCABULARY = 40


def mapped(graph: Graph, change) -> Graph:
    """The graph with `change(node)` in place of each node."""
    return graph.with_units(
        tuple(
            replace(unit, nodes=tuple(change(node) for node in unit.nodes)) for unit in graph.units
        )
    )


def with_window(graph: Graph, window: int) -> Graph:
    return mapped(
        graph,
        lambda n: replace(n, attrs=n.attrs | {"window": window}) if n.op == "attention" else n,
    )


def ternary(
    graph: Graph,
    *,
    packed: bool,
    layout: str = "interleaved",
    group: int | str = 16,
    tied: bool = False,
) -> Graph:
    """Every matrix, table and head included, as random trits of two bases."""
    random = np.random.default_rng(5)

    def change(node: Node) -> Node:
        if "weight" not in node.weights or len(node.weights["weight"].type.shape) != 2:
            return node
        ref = node.weights["weight"]
        out, inputs = ref.type.shape
        type = TernaryType((out, inputs), 2, group, tied, "f16")
        trits = random.integers(-1, 2, (*type.shape, 2)).astype(np.int8)
        scales = random.uniform(0.02, 0.2, type.scales_shape).astype(np.float16)
        if packed:
            weight = Packed(LAYOUTS[layout].pack(trits), scales, PackedType(type, layout))
        else:
            weight = Ternary(trits, scales, type)
        return replace(node, weights=node.weights | {"weight": in_memory(ref.tensor, weight)})

    return mapped(graph, change)


def tokens_of(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


GRAPHS = {
    "dense": lambda: tiny_graph(layers=1),
    "one key head": lambda: tiny_graph(layers=1, heads=4, kv_heads=1, tied=True),
    "window": lambda: with_window(tiny_graph(layers=1), 5),
    "softcap": lambda: mapped(
        with_window(tiny_graph(layers=1), 5),
        lambda n: replace(n, attrs=n.attrs | {"softcap": 2.0}) if n.op == "attention" else n,
    ),
    "packed": lambda: ternary(tiny_graph(layers=1, tied=True), packed=True),
    "packed, window, tied scales": lambda: with_window(
        ternary(tiny_graph(layers=1), packed=True, layout="bit-ttt", group="row", tied=True), 3
    ),
    "ternary": lambda: ternary(tiny_graph(layers=1), packed=False),
}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("dense", "xla-unpacked"),
        ("one key head", "xla-unpacked"),
        pytest.param("window", "xla-unpacked", marks=pytest.mark.slow),
        ("packed", "xla"),
        ("packed", "xla-unpacked"),
        pytest.param("packed, window, tied scales", "xla", marks=pytest.mark.slow),
        pytest.param("ternary", "xla", marks=pytest.mark.slow),
    ],
)
def test_prefill_and_decode_are_the_forward_pass(name, backend):
    check_steps(load(GRAPHS[name](), backend=backend), 2e-5)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("softcap", "xla-unpacked"),
        ("packed, window, tied scales", "auto"),
        pytest.param("one key head", "xla-unpacked", marks=pytest.mark.slow),
        pytest.param("packed", "xla", marks=pytest.mark.slow),
    ],
)
def test_keys_and_values_in_8_bits_are_the_same_in_all_passes(name, backend):
    """But for codes that a sum in another order rounds to a neighbour."""
    check_steps(load(GRAPHS[name](), backend=backend, kv="int8"), 2e-3)


def check_steps(model, relative: float):
    """Compares prefill and steps of rows of different lengths with the whole forward pass."""
    tokens, lengths = tokens_of(3, 14), np.array([6, 1, 3])
    logits = np.asarray(model(tokens))
    tolerance = relative * np.abs(logits).max()
    last, cache = model.prefill(tokens[:, :6], model.new_cache(3, 16), lengths)
    rows = np.arange(3)
    np.testing.assert_allclose(last, logits[rows, lengths - 1], atol=tolerance)
    for step in range(8):
        last, cache = model.decode(tokens[rows, lengths + step], cache)
        np.testing.assert_allclose(
            last, logits[rows, lengths + step], atol=tolerance, err_msg=f"decode step {step}"
        )


@pytest.mark.parametrize(
    ("name", "kv", "relative"),
    [
        ("window", "model", 2e-5),
        ("packed", "model", 2e-5),
        pytest.param("window", "int8", 2e-3, marks=pytest.mark.slow),
    ],
)
def test_a_filled_cache_goes_on(name, kv, relative):
    """By chunks of rows of different lengths, from a place further back, and in a longer cache."""
    model = load(GRAPHS[name](), backend="xla", kv=kv)
    tokens, rows = tokens_of(3, 40), np.arange(3)
    logits = np.asarray(model(tokens))
    tolerance = relative * np.abs(logits).max()
    lengths = np.array([11, 2, 7])
    last, cache = model.prefill(tokens[:, :11], model.new_cache(3, 32), lengths, chunk=4)
    assert (cache.filled, cache.positions.ravel().tolist()) == (11, lengths.tolist())
    np.testing.assert_allclose(last, logits[rows, lengths - 1], atol=tolerance)
    more = np.array([1, 9, 4])
    appended = np.stack([tokens[r, n : n + 9] for r, n in enumerate(lengths)])
    last, cache = model.prefill(appended, cache, more)
    np.testing.assert_allclose(last, logits[rows, lengths + more - 1], atol=tolerance)
    last, cache = model.decode(tokens[rows, lengths + more], cache)
    np.testing.assert_allclose(last, logits[rows, lengths + more], atol=tolerance)
    cache = cache.back_to(3)
    assert cache.positions.ravel().tolist() == [3, 3, 3]
    last, cache = model.prefill(tokens[:, 3:32], cache, chunk=16)
    last, cache = model.prefill(tokens[:, 32:], cache.longer(48))
    np.testing.assert_allclose(last, logits[:, -1], atol=tolerance)


@pytest.mark.parametrize("name", ["one key head", "packed"])  # the first has a tied embedding
def test_a_step_of_all_blocks_at_once_is_the_same(name, monkeypatch):
    """As on a GPU."""
    model, logits = load(GRAPHS[name]()), []
    for at_once in (False, True):
        monkeypatch.setattr(model_module, "steps_at_once", lambda _, at_once=at_once: at_once)
        _, cache = model.prefill(tokens_of(2, 5), model.new_cache(2, 8))
        for token in (3, 4):
            last, cache = model.decode(jnp.full(2, token), cache)
        logits.append(np.asarray(last))
        assert (cache.filled, cache.positions.tolist()) == (7, [[7], [7]])
    np.testing.assert_allclose(*logits, atol=2e-6 * np.abs(logits[0]).max())


def test_whole_sequences_read_in_chunks_are_the_same():
    model, tokens = load(GRAPHS["window"]()), tokens_of(2, 13)
    hidden = np.asarray(model.hidden(tokens))
    for chunk in (5, 13):
        found = model.hidden(tokens, chunk=chunk)
        np.testing.assert_allclose(found, hidden, atol=2e-5 * np.abs(hidden).max())


def test_a_cache_in_8_bits_holds_codes_and_scales():
    """Logits are near those of the cache in float32, and not the same."""
    model, plain = (load(tiny_graph(layers=1), kv=kv) for kv in ("int8", "model"))
    (slots,) = model.new_cache(2, 16).blocks
    shape = 2, 2, 16, 8
    assert [(part.shape, part.dtype) for part in slots["self_attn.attention"]] == [
        (shape, jnp.int8),
        (shape, jnp.int8),
        (shape[:3], jnp.float32),
        (shape[:3], jnp.float32),
    ]
    tokens = tokens_of(2, 9)
    logits, rounded = np.asarray(plain(tokens)), np.asarray(model(tokens))
    assert 0 < np.abs(logits - rounded).max() < 0.02 * np.abs(logits).max()
    with pytest.raises(BadInput, match="the cache is one of a model with kv 'int8'"):
        plain.decode([1, 2], model.new_cache(2, 16))
    with pytest.raises(BadInput, match="unknown kv 'int4'"):
        load(tiny_graph(layers=1), kv="int4")


@pytest.mark.exact
def test_what_stands_in_the_padding_does_not_matter():
    model = load(tiny_graph())
    tokens, other = tokens_of(2, 7), tokens_of(2, 7, seed=1)
    other[:, :5] = tokens[:, :5]
    last, cache = model.prefill(tokens, model.new_cache(2, 16), [5, 5])
    same, other_cache = model.prefill(other, model.new_cache(2, 16), [5, 5])
    np.testing.assert_array_equal(last, same)
    np.testing.assert_array_equal(
        model.decode([1, 2], cache)[0], model.decode([1, 2], other_cache)[0]
    )


@pytest.mark.exact
def test_a_window_hides_what_lies_before_it():
    tokens, other = tokens_of(1, 12), tokens_of(1, 12)
    other[0, 0] = (other[0, 0] + 1) % VOCABULARY
    one_layer = tiny_graph(layers=1)
    plain, windowed = load(one_layer), load(with_window(one_layer, 4))
    assert np.abs(plain(tokens)[0, 4:] - plain(other)[0, 4:]).max(axis=1).min() > 1e-4
    np.testing.assert_array_equal(
        windowed(tokens)[0, 4:], windowed(other)[0, 4:]
    )  # position 4 sees 1 to 4
    assert (
        np.abs(windowed(tokens)[0, 3] - windowed(other)[0, 3]).max() > 1e-4
    )  # position 3 still sees 0


@pytest.mark.parametrize("layout", ["interleaved", pytest.param("tq2_0", marks=pytest.mark.slow)])
def test_packed_and_unpacked_agree(layout):
    graph = ternary(tiny_graph(layers=1), packed=True, layout=layout)
    tokens = tokens_of(2, 9)
    packed, unpacked = load(graph, backend="xla"), load(graph, backend="xla-unpacked")
    expected = np.asarray(unpacked(tokens))
    np.testing.assert_allclose(packed(tokens), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("backend", "group"), [("triton-interpret", "row"), ("mosaic-interpret", "row")]
)
@pytest.mark.slow
def test_kernels_of_gpus_write_the_same_tokens(backend, group):
    """Prefill and decode, with embedding and tied head in the layout that kernels read too."""
    graph = ternary(tiny_graph(layers=1, tied=True), packed=True, group=group, tied=True)
    found, wanted = load(graph, backend=backend), load(graph, backend="xla")
    assert found.backend == backend
    logits, cache = found.prefill(tokens_of(1, 3), found.new_cache(1, 8))
    expected, wanted_cache = wanted.prefill(tokens_of(1, 3), wanted.new_cache(1, 8))
    np.testing.assert_allclose(logits, expected, atol=3e-5 * np.abs(np.asarray(expected)).max())
    logits, expected = found.decode([3], cache)[0], wanted.decode([3], wanted_cache)[0]
    np.testing.assert_allclose(logits, expected, atol=3e-5 * np.abs(np.asarray(expected)).max())


@pytest.mark.parametrize(
    ("graph", "length"),
    [
        (lambda: Pipeline(["fuse"])(tiny_graph(layers=2)), 16),
        pytest.param(
            lambda: with_window(tiny_graph(layers=1, heads=4, kv_heads=1), 5),
            16,
            marks=pytest.mark.slow,
        ),
        (lambda: tiny_graph(layers=1), 1100),  # a cache that several blocks of the kernel share
    ],
    ids=["fused", "window", "long"],
)
def test_the_attention_kernel_writes_the_same_tokens(graph, length, monkeypatch):
    """Sequences of different lengths, step by step; everything but attention is XLA's."""
    calls, attend = [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a, **b: (calls.append(a), attend(*a, **b))[1])
    results = []
    for backend in ("triton-interpret", "xla"):
        model = load(graph(), backend=backend)
        logits, cache = model.prefill(tokens_of(2, 6), model.new_cache(2, length), [6, 1])
        steps = [logits]
        for token in range(4):
            logits, cache = model.decode([token, token + 1], cache)
            steps.append(logits)
        results.append(np.stack(steps))
    found, wanted = results
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert calls  # by the kernel, and not by the nodes in its place


def test_a_backend_that_cannot_take_the_model_names_every_reason():
    graph = ternary(tiny_graph(layers=1), packed=True, layout="tq2_0")
    with pytest.raises(
        BadInput,
        match=r"backend triton-interpret: model.embed_tokens and [0-9]+ more: "
        "it multiplies weights packed in",
    ):
        load(graph, backend="triton-interpret")
    if jax.default_backend() == "cpu":
        with pytest.raises(BadInput, match="backend triton: it needs an NVIDIA GPU"):
            load(tiny_graph(), backend="triton")


def test_xla_holds_the_bytes_that_are_stored_and_unpacked_the_weights():
    graph = ternary(tiny_graph(hidden=64), packed=True, group="row")
    stored = sum(ref.type.nbytes for _, ref in graph.weights())
    weights = sum(int(np.prod(ref.type.shape)) for _, ref in graph.weights())
    assert load(graph, backend="xla").weights_nbytes == stored
    assert load(graph, backend="xla-unpacked").weights_nbytes == 4 * weights
    gains = 5 * 64
    assert (
        load(graph, backend="xla-unpacked", dtype="bfloat16").weights_nbytes
        == 2 * (weights - gains) + 4 * gains
    )


def test_bfloat16_weights_are_close():
    tokens = tokens_of(1, 8)
    exact, rounded = (
        np.asarray(load(tiny_graph(), dtype=dtype)(tokens)) for dtype in ("float32", "bfloat16")
    )
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.03


# --- compilation ----------------------------------------------------------------------------------


@pytest.fixture
def traces(monkeypatch) -> list[str]:
    """The first node of each block that was traced, which happens once for each compilation."""
    seen = []
    run = execute.run

    def counted(block, *args, **options):
        seen.append(block.nodes[0].name)
        return run(block, *args, **options)

    monkeypatch.setattr(execute, "run", counted)
    return seen


def run_everything(graph: Graph) -> None:
    model = load(graph)
    model(tokens_of(1, 8))
    _, cache = model.prefill(tokens_of(1, 5), model.new_cache(1, 16))
    for _ in range(3):
        _, cache = model.decode(np.array([1]), cache)


def test_compilations_do_not_grow_with_depth(traces):
    run_everything(tiny_graph(layers=1))
    shallow = sorted(traces)
    traces.clear()
    run_everything(tiny_graph(layers=9))
    assert sorted(traces) == shallow
    assert traces.count("input_layernorm") == 3  # forward, prefill, decode


def test_blocks_of_two_kinds_are_compiled_once_each(traces):
    dense, packed = tiny_graph(layers=6), ternary(tiny_graph(layers=6), packed=True)
    mixed = replace(dense, blocks=(*dense.blocks[:2], *packed.blocks[2:5], dense.blocks[5]))
    load(mixed, backend="xla").hidden(tokens_of(1, 4))
    assert traces.count("input_layernorm") == 2


def test_prompts_of_like_length_share_a_compilation(traces):
    model = load(tiny_graph())
    for length in (9, 12, 16):
        model.prefill(tokens_of(1, length), model.new_cache(1, 32))
    assert traces.count("input_layernorm") == 1


@pytest.mark.parametrize("at_once", [False, True])
def test_decoding_never_compiles_again(traces, at_once, monkeypatch):
    monkeypatch.setattr(model_module, "steps_at_once", lambda _: at_once)
    model = load(tiny_graph())
    _, cache = model.prefill(tokens_of(1, 4), model.new_cache(1, 32))
    _, cache = model.decode(jnp.array([1]), cache)
    traces.clear()
    for _ in range(20):
        _, cache = model.decode(jnp.array([1]), cache)
    assert not traces


# --- the module -----------------------------------------------------------------------------------


@pytest.mark.exact
def test_it_is_an_nnx_module():
    model, tokens = load(ternary(tiny_graph(layers=1), packed=True), backend="xla"), tokens_of(1, 6)
    logits = np.asarray(model(tokens))
    definition, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(definition, state)(tokens), logits)
    np.testing.assert_allclose(
        jax.jit(lambda m, t: m(t))(model, tokens), logits, atol=1e-5 * np.abs(logits).max()
    )
    nnx.update(model, jax.tree.map(jnp.zeros_like, state))
    np.testing.assert_array_equal(model(tokens), 0)


def test_what_it_says_of_itself():
    model = load(tiny_graph())
    assert (model.backend, model.vocabulary, model.max_context) == ("xla-unpacked", VOCABULARY, 128)
    assert model.config["model_type"] == "llama"
    assert load(tiny_graph(), backend="xla").backend == "xla"


def test_hidden_then_logits_of_any_rows():
    model, tokens = load(tiny_graph()), tokens_of(2, 6)
    hidden = model.hidden(tokens)
    np.testing.assert_allclose(model.logits(hidden[1, 2:4]), model(tokens)[1, 2:4], atol=1e-5)


def test_weights_are_read_one_at_a_time():
    """When a tensor is read, those before it are gone, but for one whose buffer jax may be about to
    release.
    """
    alive: list[weakref.ref] = []
    counts = []

    def reading(node: Node) -> Node:
        def reader(ref: WeightRef):
            def read():
                assert sum(array() is not None for array in alive) <= 1
                array = np.asarray(ref.load().dequantize()).astype(np.float16)
                alive.append(weakref.ref(array))
                return Dense(array)

            return WeightRef(ref.tensor, DenseType(ref.type.shape, "f16"), read)

        return replace(node, weights={slot: reader(ref) for slot, ref in node.weights.items()})

    load(mapped(tiny_graph(), reading), progress=lambda now: counts.append((now.done, now.total)))
    assert len(alive) == 21
    assert counts == [(i + 1, 21) for i in range(21)]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"backend": "xla_unpacked"},
            "unknown backend 'xla_unpacked'; did you mean 'xla-unpacked'",
        ),
        (
            {"backend": "?"},
            "unknown backend '[?]'; known: auto, cpu, mosaic, .*, triton, .*, xla, xla-unpacked",
        ),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_unknown_options(options, words):
    with pytest.raises(BadInput, match=words):
        load(tiny_graph(), **options)


def test_a_full_cache_and_a_long_prompt():
    model = load(tiny_graph())
    _, cache = model.prefill(tokens_of(1, 3), model.new_cache(1, 4))
    _, cache = model.decode([1], cache)
    with pytest.raises(BadInput, match="the cache is full: it was made for 4 tokens"):
        model.decode([1], cache)
    with pytest.raises(BadInput, match="a prompt of 5 tokens is longer than the cache of 4"):
        model.prefill(tokens_of(1, 5), model.new_cache(1, 4))
    with pytest.raises(BadInput, match="2 tokens is longer than the cache of 4, 4 of them taken"):
        model.prefill(tokens_of(1, 2), cache)
    with pytest.raises(BadInput, match="of 2 prompts needs a cache for as many sequences"):
        model.prefill(tokens_of(2, 2), model.new_cache(1, 4))
    with pytest.raises(BadInput, match="a cache of 4 tokens has no first 5"):
        cache.back_to(5)
    with pytest.raises(BadInput, match="at least 1"):
        model.new_cache(0, 4)


@pytest.mark.parametrize("lengths", [[0, 1], [1, 4], [1]])
def test_impossible_lengths(lengths):
    model = load(tiny_graph())
    with pytest.raises(BadInput, match="expected 2 numbers from 1 to 3"):
        model.prefill(tokens_of(2, 3), model.new_cache(2, 4), lengths)


# --- ops ------------------------------------------------------------------------------------------


def test_rope_rotates_pairs_half_a_head_apart():
    x = np.random.default_rng(0).standard_normal((1, 3, 8)).astype(np.float32)  # 2 heads of 4
    y = np.asarray(ops.rope(jnp.asarray(x), np.array([[0, 1, 7]]), 4, 100.0))
    for t, position in enumerate((0, 1, 7)):
        for head in (0, 4):
            for i, frequency in enumerate((1.0, 0.1)):
                rotated = complex(x[0, t, head + i], x[0, t, head + i + 2]) * np.exp(
                    1j * position * frequency
                )
                np.testing.assert_allclose(
                    y[0, t, [head + i, head + i + 2]], [rotated.real, rotated.imag], atol=1e-5
                )


def test_rope_scalings():
    plain = rope_frequencies(64, 5e5, ())
    np.testing.assert_allclose(rope_frequencies(64, 5e5, ("linear", 4.0)), plain / 4)
    scaled = rope_frequencies(64, 5e5, ("llama3", 8.0, 1.0, 4.0, 8192))
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any()
    assert np.all((scaled < plain)[between] & (scaled > plain / 8)[between])
    with pytest.raises(ValueError, match="'yarn'"):
        rope_frequencies(64, 5e5, ("yarn", 4.0))


def test_rms_norm_over_heads():
    x, gain = jnp.arange(1.0, 9).reshape(1, 1, 8), jnp.array([1.0, 2, 1, 1])
    y = ops.rms_norm(x, gain, 0.0, head_dim=4)
    expected = np.concatenate(
        [np.arange(1.0, 5) / np.sqrt(7.5), np.arange(5.0, 9) / np.sqrt(43.5)]
    ) * np.tile(gain, 2)
    np.testing.assert_allclose(y[0, 0], expected, rtol=1e-6)


SOME = [(1, 0), (4, 3), (5, 5), (11, 3), (24, 0)]
OTHERS = sorted(set(product((1, 4, 5, 11, 24), (0, 3, 5))) - set(SOME))


@pytest.mark.parametrize(
    ("queries", "window"),
    [*SOME, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)],
)
def test_sequences_run_by_run_attend_as_if_all_at_once(monkeypatch, queries, window):
    """With a ragged last run, a last run of one query, and more queries than shortest runs hold."""
    monkeypatch.setattr(ops, "QUERIES", 4)
    monkeypatch.setattr(ops, "RUNS", 4)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, queries, 6, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, 3, queries, 8)), jnp.float32) for _ in range(2))
    positions = ops.from_start(q)
    expected, found = (
        jax.jit(attend, static_argnums=4)(q, k, v, positions, window)
        for attend in (ops.attention, ops.sequence_attention)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_runs_over_a_cache_attend_as_if_all_at_once(monkeypatch):
    """Two runs, each a turn of a loop, of a cache in 8 bits."""
    monkeypatch.setattr(ops, "QUERIES", 4)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 8, 6, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, 3, 20, 8)), jnp.float32) for _ in range(2))
    k, v, *scales = ops.in_8_bits(k, v)
    positions = ops.from_start(q) + jnp.asarray([[3], [12]])
    expected = ops.attention(q, k, v, positions, 5, scales=scales)
    found = ops.sequence_attention(q, k, v, positions, 5, whole=False, scales=scales)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_codes_are_the_nearest_of_the_largest_127th():
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 16)).astype(np.float32)
    x[1, 1, 2] = 0
    codes, scales = map(np.asarray, ops.codes_of(jnp.asarray(x)))
    assert (codes.dtype, codes.shape, scales.shape) == (np.int8, x.shape, x.shape[:-1])
    assert np.abs(codes).max() == 127
    assert codes.min() >= -127
    np.testing.assert_allclose(scales, np.abs(x).max(axis=-1) / 127, rtol=1e-6)
    assert (np.abs(codes * scales[..., None] - x) <= 0.5001 * scales[..., None]).all()
    assert not codes[1, 1, 2].any()
    assert scales[1, 1, 2] == 0
    x[0, 0, 0, 3] = np.nan
    assert np.isnan(ops.codes_of(jnp.asarray(x))[1][0, 0, 0])
