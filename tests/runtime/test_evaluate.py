"""Evaluation: its arithmetic against numpy float64, windows, refusals, and known figures of real
models.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.checkpoint.files import read_text
from atd.checkpoint.reader import open_tokenizer
from atd.errors import BadInput, RunFailed
from atd.models.model import load
from atd.runtime.compare import load_checkpoint
from atd.runtime.evaluate import _score, cut, evaluate
from tests.golden.write_gguf import GOLDEN

VOCABULARY, WIDTH = 37, 5


@partial(jax.tree_util.register_dataclass, data_fields=["table", "head"], meta_fields=["limit"])
@dataclass(frozen=True)
class Toy:
    """hidden_t = mean of the embeddings of tokens 0..t of the window, logits = hidden @ head."""

    table: jax.Array  # [V, D]
    head: jax.Array  # [D, V]
    limit: int = 64

    @property
    def vocabulary(self):
        return self.table.shape[0]

    @property
    def max_context(self):
        return self.limit

    def hidden(self, tokens):
        return jnp.cumsum(self.table[tokens], axis=1) / jnp.arange(1, tokens.shape[1] + 1)[:, None]

    def logits(self, hidden):
        return hidden @ self.head


def toy(seed: int, vocabulary: int = VOCABULARY, near: Toy | None = None) -> Toy:
    """A random model, or one a little off `near`."""
    random = np.random.default_rng(seed)
    table, head = (
        random.normal(size=(vocabulary, WIDTH)),
        3 * random.normal(size=(WIDTH, vocabulary)),
    )
    if near is not None:
        table, head = near.table + 0.2 * table, near.head + 0.1 * head
    return Toy(jnp.asarray(table, jnp.float32), jnp.asarray(head, jnp.float32))


def log_p(model: Toy, window: np.ndarray) -> np.ndarray:
    """float64 [T, V] of one window, position by position."""
    table, head = np.asarray(model.table, np.float64), np.asarray(model.head, np.float64)
    rows = []
    for t in range(len(window)):
        logits = table[window[: t + 1]].mean(axis=0) @ head
        rows.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return np.stack(rows)


def reference(model: Toy, dense: Toy, windows, first: int = 0) -> dict:
    nll, dense_nll, kl, same = [], [], [], []
    for window in windows:
        p, q = log_p(model, window), log_p(dense, window)
        for t in range(first, len(window) - 1):
            nll.append(-p[t, window[t + 1]])
            dense_nll.append(-q[t, window[t + 1]])
            kl.append(sum(np.exp(q[t, v]) * (q[t, v] - p[t, v]) for v in range(p.shape[1])))
            same.append(p[t].argmax() == q[t].argmax())
    return {
        "perplexity": np.exp(np.mean(nll)),
        "against_perplexity": np.exp(np.mean(dense_nll)),
        "kl_mean": np.mean(kl),
        "kl_median": np.median(kl),
        "kl_99": np.quantile(kl, 0.99),
        "top1_agreement": np.mean(same),
        "kl_windows": np.mean(np.reshape(kl, (len(windows), -1)), axis=1),
        "positions": len(nll),
    }


TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, 150)


@pytest.mark.parametrize(
    ("batch", "positions"),
    [(8, 256), (2, 7), (3, 1), (1, 15)],
    ids=[
        "one batch",
        "padded last batch and chunk",
        "one position at a time",
        "one window at a time",
    ],
)
def test_figures_equal_float64(batch, positions):
    dense = toy(0)
    model = toy(1, near=dense)
    result = evaluate(model, TOKENS, context=16, against=dense, batch=batch, positions=positions)
    windows = [TOKENS[i * 16 : i * 16 + 16] for i in range(9)]  # 6 tokens are left over
    for name, value in reference(model, dense, windows).items():
        np.testing.assert_allclose(getattr(result, name), value, rtol=2e-5, err_msg=name)
    assert (result.windows, result.positions, result.context, result.bos, result.tokens) == (
        9,
        135,
        16,
        False,
        150,
    )
    assert result.top1_agreement not in (0, 1)


def test_with_bos_a_window_is_bos_and_one_token_less_of_text():
    dense = toy(0)
    model = toy(1, near=dense)
    result = evaluate(model, TOKENS, context=16, against=dense, bos_id=3, batch=4, positions=32)
    windows = [np.concatenate([[3], TOKENS[i * 15 : i * 15 + 15]]) for i in range(10)]
    for name, value in reference(model, dense, windows).items():
        np.testing.assert_allclose(getattr(result, name), value, rtol=2e-5, err_msg=name)
    assert (result.windows, result.positions, result.bos) == (10, 150, True)


def test_llama_cpp_scores_the_second_half_after_a_bos_that_replaces_the_first_token():
    dense = toy(0)
    model = toy(1, near=dense)
    result = evaluate(model, TOKENS, context=16, against=dense, bos_id=3, convention="llama.cpp")
    text = np.concatenate([[3], TOKENS])
    windows = [np.concatenate([[3], text[i * 16 + 1 : i * 16 + 16]]) for i in range(9)]
    for name, value in reference(model, dense, windows, first=8).items():
        np.testing.assert_allclose(getattr(result, name), value, rtol=2e-5, err_msg=name)
    assert result.positions == 9 * 7  # llama-perplexity: n_ctx - n_ctx/2 - 1 per window
    assert result.convention == "llama.cpp"


def test_a_model_agrees_with_itself_and_alone_has_no_distance():
    model = toy(0)
    both = evaluate(model, TOKENS, context=16, against=model)
    assert both.perplexity == both.against_perplexity
    assert both.kl_mean == pytest.approx(0, abs=1e-6)
    assert both.top1_agreement == 1
    alone = evaluate(model, TOKENS, context=16)
    assert alone.perplexity == both.perplexity
    assert (
        alone.kl_mean
        is alone.kl_median
        is alone.kl_99
        is alone.top1_agreement
        is alone.against_perplexity
        is None
    )
    assert alone.to_json()["perplexity"] == alone.perplexity


def test_the_last_batch_compiles_nothing_anew_and_progress_reaches_the_end():
    shapes, traces, seen = [], [], []

    @partial(jax.tree_util.register_dataclass, data_fields=["table", "head"], meta_fields=["limit"])
    @dataclass(frozen=True)
    class Counting(Toy):
        def hidden(self, tokens):
            shapes.append(tokens.shape)
            return super().hidden(tokens)

        def logits(self, hidden):
            traces.append(hidden.shape)
            return super().logits(hidden)

    model = toy(0)
    counting = Counting(model.table, model.head)
    evaluate(
        counting,
        TOKENS,
        context=16,
        batch=4,
        progress=lambda now: seen.append((now.done, now.total)),
    )
    assert shapes == [(4, 16)] * 3
    assert len(traces) == 1
    assert seen == [(64, 144), (128, 144), (144, 144)]


def test_logits_of_more_than_the_given_positions_never_exist():
    model, hidden, targets = (
        toy(0),
        np.zeros((8, 15, WIDTH), np.float32),
        np.zeros((8, 15), np.int32),
    )
    text = str(jax.make_jaxpr(partial(_score, positions=12))(model, model, hidden, hidden, targets))
    assert f"f32[12,{VOCABULARY}]" in text
    assert f"f32[120,{VOCABULARY}]" not in text
    assert f"f32[8,15,{VOCABULARY}]" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokens": TOKENS[:15]},
            "15 tokens are too few for one window of 16: at least 16 are needed",
        ),
        (
            {"tokens": TOKENS[:14], "bos_id": 1},
            "14 tokens are too few for one window of 16: at least 15 are needed",
        ),
        ({"tokens": TOKENS[:0]}, "0 tokens are too few"),
        (
            {"tokens": np.append(TOKENS[:31], VOCABULARY)},
            f"token id {VOCABULARY} lies outside the model's vocabulary",
        ),
        ({"tokens": np.append(TOKENS[:31], -1)}, "token id -1 lies outside"),
        ({"bos_id": 99}, "token id 99 lies outside"),
        ({"context": 1}, "at least 2"),
        ({"context": 65}, "beyond the 64 positions"),
        ({"context": 2, "convention": "llama.cpp"}, "at least 3"),
        ({"convention": "lama.cpp"}, "known: standard, llama.cpp"),
        ({"against": toy(1, vocabulary=38)}, "vocabularies differ: 37 and 38"),
    ],
)
def test_bad_input_is_refused_with_the_reason(change, message):
    arguments = {"tokens": TOKENS, "context": 16} | change
    with pytest.raises(BadInput, match=message):
        evaluate(toy(0), arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_end_the_evaluation(bad):
    """A token whose embedding is broken breaks its window from there on."""
    tokens = np.arange(32) % 31
    tokens[21] = 35
    model = toy(0)
    broken = Toy(model.table.at[35].set(bad), model.head)
    found = r"logits are not finite at 10 of 30 positions, the first in window 1 at .* position 5"
    with pytest.raises(RunFailed, match=f"the model's {found}"):
        evaluate(broken, tokens, context=16)
    with pytest.raises(RunFailed, match=f"the dense model's {found}"):
        evaluate(model, tokens, context=16, against=broken)


def test_cut_leaves_the_text_it_was_given_alone():
    tokens = np.arange(20)
    windows, _ = cut(tokens, 5, bos_id=7, convention="llama.cpp")
    windows[:] = -1
    np.testing.assert_array_equal(tokens, np.arange(20))


# --- real models ----------------------------------------------------------------------------------


def test_windows_in_chunks_and_8_bits(stories260k):
    """Chunks change nothing, 8 bits little; the same of windows that are read at once."""
    load_it = partial(load_checkpoint, stories260k)
    dense, rounded = load_it(), load_it(kv="int8")
    tokens = np.random.default_rng(0).integers(3, 500, 128)
    options: dict[str, Any] = {"context": 64, "against": dense.model}
    whole, chunks = (evaluate(dense.model, tokens, chunk=n, **options) for n in (None, 24))
    assert chunks.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    found = [evaluate(rounded.model, tokens, chunk=n, **options).kl_mean or 0 for n in (None, 24)]
    assert 1e-7 < found[0] < 0.002
    assert found[1] == pytest.approx(found[0], rel=0.1)
    with pytest.raises(BadInput, match="chunk is 0; expected at least 1"):
        evaluate(dense.model, tokens, context=64, chunk=0)


@pytest.mark.parametrize("bos", [False, True])
def test_a_real_model_has_its_known_perplexity(trained, bos):
    """The packaged model's are from make_stories.py, stories15M's were measured with PyTorch."""
    known = {"packaged": np.load(GOLDEN / "stories.npz")["perplexity"], "stories15M": (6.390, 7.38)}
    tokenizer = open_tokenizer(trained.folder)
    tokens = tokenizer.encode(read_text(trained.held_out))
    bos_id = tokenizer.bos_id if bos else None
    result = evaluate(load(trained.folder), tokens, context=256, bos_id=bos_id)
    windows = len(tokens) // (256 - bos)
    assert (result.windows, result.positions) == (windows, 255 * windows)
    assert result.bos == bos
    tolerance = 0.01 if bos else 0.002
    assert result.perplexity == pytest.approx(known[trained.name][int(bos)], abs=tolerance)


@pytest.mark.slow
def test_smollm2_with_its_cache_in_8_bits_is_near_that_in_16(smollm2, shared_data):
    """Windows are read in chunks, so that most positions read the cache."""
    ids = open_tokenizer(smollm2).encode(read_text(shared_data / "text" / "wikitext2_raw_test.txt"))
    model, dense = (load(smollm2, dtype="bfloat16", kv=kv) for kv in ("int8", "model"))
    options: dict[str, Any] = {"context": 2048, "batch": 1, "chunk": 512}
    result = evaluate(model, ids[:4096], against=dense, **options)
    assert result.kl_mean is not None
    assert 0 < result.kl_mean < 0.002


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "context", "perplexity", "positions"),
    [(4096, 512, 30.36, 4088), (20480, 1024, 23.23, 20460)],
)
def test_smollm2_has_its_known_perplexity(
    smollm2, shared_data, tokens, context, perplexity, positions
):
    """As transformers has it, in float32, of the dequantized weights."""
    ids = open_tokenizer(smollm2).encode(read_text(shared_data / "text" / "wikitext2_raw_test.txt"))
    result = evaluate(load(smollm2), ids[:tokens], context=context, batch=4)
    assert result.positions == positions
    assert result.perplexity == pytest.approx(perplexity, abs=0.005)


def logits_of_bitnet(*ways: Literal["model", "float", "int8"]) -> list[np.ndarray]:
    """Logits of a golden model whose linears round their inputs, one for each of `activations`."""
    golden = GOLDEN / "bitnet_llama"
    tokens = np.load(golden / "logits.npz")["tokens"]
    return [np.asarray(load_checkpoint(golden, activations=how).model(tokens)) for how in ways]


def test_activations_of_bitnet_are_rounded_unless_they_are_to_be_floats():
    rounded, floats = logits_of_bitnet("model", "float")
    assert np.abs(rounded - floats).max() > 1e-3 * np.abs(rounded).max()


def test_activations_of_any_model_are_rounded_where_it_is_asked_for():
    model, rounded = logits_of_bitnet("model", "int8")
    size = np.abs(model).max()  # its head is the one linear that the model itself does not round
    assert 1e-5 * size < np.abs(rounded - model).max() < 0.05 * size
