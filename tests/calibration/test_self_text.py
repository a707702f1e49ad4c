"""Calibration text that the model writes: its distribution, its windows, its cache, refusals."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.calibration import self_text as module
from atd.calibration.self_text import (
    TEXT,
    cached_self_text,
    draws,
    pick,
    self_text,
    special_ids,
    start_ids,
)
from atd.checkpoint.cache import Cache
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput, RunFailed
from atd.ir import in_memory
from atd.models.model import load
from atd.progress import Progress
from atd.weights import Dense
from tests.models.tiny import change_in_place, tiny_graph


@pytest.fixture(scope="module")
def model():
    return load(tiny_graph())


def nll(model, windows: np.ndarray) -> np.ndarray:
    """-log p of each token but the first, [windows, context - 1]."""
    logits = np.asarray(model(windows), np.float64)[:, :-1]
    logits -= np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return -np.take_along_axis(logits, windows[:, 1:, None], axis=2)[:, :, 0]


@pytest.mark.parametrize("vocabulary", [5, 256, 700])
def test_what_is_drawn_follows_the_softmax(vocabulary):
    count = 20_000
    rng = np.random.default_rng(0)
    row = rng.standard_normal(vocabulary) * 2
    row[::3] = -np.inf  # probability 0, the first and maybe the last among them
    columns = jnp.asarray(rng.random((2, count), np.float32))
    tokens = np.asarray(
        pick(jnp.broadcast_to(jnp.asarray(row, jnp.float32), (count, vocabulary)), columns, 1)
    )
    expected = np.exp(row) / np.exp(row).sum()
    frequencies = np.bincount(tokens, minlength=vocabulary) / count
    assert not frequencies[expected == 0].any()
    np.testing.assert_allclose(frequencies, expected, atol=4 * np.sqrt(0.25 / count))
    squares = (frequencies - expected)[expected > 0] ** 2 / expected[expected > 0] * count
    freedom = np.count_nonzero(expected) - 1
    assert abs(squares.sum() - freedom) < 6 * np.sqrt(2 * freedom)  # chi squared


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_interval_draw_tokens_that_can_be(uniform):
    logits = jnp.full((1, 600), -jnp.inf).at[0, jnp.array([7, 300, 301])].set(0.0)
    token = int(pick(logits, jnp.full((1, 1), uniform, jnp.float32), 0)[0])
    assert token == (7 if uniform == 0 else 301)


def test_windows_are_drawn_from_the_model(model):
    """E[-log p(x)] of x ~ p is the entropy of p, given all that stands before; wrong positions or a
    wrong cache break it.
    """
    windows = self_text(model, None, tokens=64 * 40, context=40, seed=3)
    first, _ = draws(start_ids(40, None), 64, 40, 3)
    whole = np.concatenate([first[:, None], windows], axis=1)
    logits = np.asarray(model(whole), np.float64)[:, :-1]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=2)
    excess = nll(model, whole) - entropy
    assert abs(excess.mean()) < 3 * excess.std() / np.sqrt(excess.size)
    assert nll(model, windows[:, ::-1]).mean() > entropy.mean() + 0.2


def test_the_batch_and_the_growing_cache_change_nothing(model, monkeypatch):
    windows = self_text(model, None, tokens=7 * 20, context=20, seed=1)
    monkeypatch.setattr(module, "CACHE_STEP", 11)
    np.testing.assert_array_equal(
        self_text(model, None, tokens=7 * 20, context=20, seed=1, batch=3), windows
    )
    assert windows.shape == (7, 20)
    assert windows.dtype == np.int32


def test_windows_hold_short_texts_one_behind_the_other(model, monkeypatch):
    """Texts of 8 tokens fill windows of 20, and a window may begin inside of one."""
    monkeypatch.setattr(module, "TEXT", 8)
    windows = self_text(model, None, tokens=3 * 20, context=20, seed=4)
    texts = self_text(model, None, tokens=8 * 8, context=8, seed=4)  # one to a window
    np.testing.assert_array_equal(windows.reshape(-1), texts.reshape(-1)[:60])


def test_behind_bos_a_text_fills_its_window(model, monkeypatch):
    whole = self_text(model, None, tokens=3 * 20, context=20, seed=4, after_bos=True)
    monkeypatch.setattr(module, "TEXT", 8)
    np.testing.assert_array_equal(
        self_text(model, None, tokens=3 * 20, context=20, seed=4, after_bos=True), whole
    )


@pytest.mark.exact
def test_same_seed_same_windows(model):
    first = self_text(model, None, tokens=100, context=10, seed=5)
    np.testing.assert_array_equal(self_text(model, None, tokens=109, context=10, seed=5), first)
    assert (self_text(model, None, tokens=100, context=10, seed=6) != first).any()


def test_progress_reaches_all_tokens(model):
    seen = []
    self_text(
        model,
        None,
        tokens=5 * 20,
        context=20,
        batch=2,
        progress=seen.append,
    )
    assert [now.done for now in seen] == sorted(now.done for now in seen)
    assert seen[-1] == Progress("writing calibration text", 100, 100, "tokens")


def test_no_special_token_is_put_in_front(stories260k):
    words = open_tokenizer(stories260k)
    special = special_ids(words)
    assert {0, 1, 2} <= special
    assert not special & set(start_ids(512, words).tolist())
    assert len(start_ids(512, words)) == 512 - len(special)
    assert start_ids(512, words, after_bos=True).tolist() == [words.bos_id]
    assert len(start_ids(600, words)) == 512 - len(special)  # rows of padding stand for no token


def test_a_real_model_writes_stories(small, stories260k):
    """Its own text is about as likely to it as held-out stories are (perplexities of 2.7 and 3.5),
    texts begin in the middle of a story, two to a window, and one story follows another."""
    low, high = {"packaged": (2.5, 3.3), "stories260K": (3.5, 5.5)}[small.name]
    words, model = open_tokenizer(stories260k), load(stories260k)
    windows = self_text(model, words, tokens=32 * 256, context=256, seed=0)
    texts = windows.reshape(64, TEXT)
    first, _ = draws(start_ids(512, words), 64, TEXT, 0)
    written = np.concatenate([first[:, None], texts], axis=1)
    assert low < np.exp(nll(model, written).mean()) < high
    assert 0.001 < (windows == words.bos_id).mean() < 0.01  # a story is about 200 tokens long
    assert words.decode(windows.reshape(-1)).count("Once upon a time") > 5
    starts = [words.decode(text[:12]).strip() for text in texts]
    assert sum(start.startswith("Once") for start in starts) < 16
    assert len(set(starts)) == 64


def test_the_cache_is_written_once_and_read(stories260k, tmp_path, monkeypatch):
    words, folder = open_tokenizer(stories260k), tmp_path / "a" / "b"
    calls = []

    def fake(model, words, *, tokens, context, seed, after_bos, progress):
        calls.append((tokens, context, seed))
        return np.full((tokens // context, context), seed, np.int32)

    def get(words: Tokenizer | None = words, tokens=64, context=16, seed=1):
        return cached_self_text(
            stories260k, words, tokens=tokens, context=context, seed=seed, cache=Cache(folder)
        )

    monkeypatch.setattr(module, "load", lambda graph, backend: None)
    monkeypatch.setattr(module, "self_text", fake)
    np.testing.assert_array_equal(get(), np.full((4, 16), 1))
    np.testing.assert_array_equal(
        get(tokens=79), np.full((4, 16), 1)
    )  # no fifth window: the same text
    assert len(calls) == 1
    get(seed=2)
    get(tokens=80)
    get(context=32)
    get(words=None)
    assert len(calls) == len(list(folder.iterdir())) == 5
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:100])  # cut off
    np.testing.assert_array_equal(get(), np.full((4, 16), 1))
    assert len(calls) == 6
    get()
    assert len(calls) == 6


def test_a_model_of_equal_size_and_time_has_its_own_text(stories260k, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load", lambda graph, backend: None)
    monkeypatch.setattr(
        module, "self_text", lambda *args, **options: np.full((4, 16), next(texts), np.int32)
    )
    texts, source, cache = iter(range(9)), tmp_path / "source", Cache(tmp_path / "cache")
    shutil.copytree(stories260k, source)
    os.chmod(source, 0o755)

    def written() -> int:
        found = cached_self_text(source, None, tokens=64, context=16, cache=cache)
        return int(found[0, 0])

    assert (written(), written()) == (0, 0)
    change_in_place(source / "model.safetensors")
    assert (written(), written()) == (1, 1)
    with jax.enable_x64(True):
        assert written() == 2


def test_weights_without_an_identity_are_not_cached(tmp_path):
    windows = cached_self_text(tiny_graph(), None, tokens=8, context=8, cache=Cache(tmp_path))
    assert windows.shape == (1, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 9, "context": 10}, "9 calibration tokens are not one window of 10"),
        ({"tokens": 0, "context": 10}, "0 calibration tokens are not one window"),
        ({"tokens": 9, "context": 0}, "context 0, .* must be at least 1"),
        (
            {"tokens": 999, "context": 129},
            "windows of 129 tokens exceed the model's context of 128",
        ),
        ({"tokens": 9, "context": 9, "seed": -1}, "seed -1"),
    ],
)
def test_refusals(model, options, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        self_text(model, None, **options)
    with pytest.raises(BadInput, match=words):
        cached_self_text(tiny_graph(), None, **options, cache=Cache(tmp_path))


def test_a_cache_folder_that_cannot_be(stories260k, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cache folder cannot be made.*ATD_CACHE"):
        cached_self_text(
            stories260k, None, tokens=8, context=8, cache=Cache(tmp_path / "file" / "folder")
        )


def test_a_model_that_gives_nan_is_refused():
    graph = tiny_graph()
    norm = graph.epilogue.nodes[0]
    broken = in_memory("model.norm.weight", Dense(np.full(32, np.nan, np.float32)))
    epilogue = graph.epilogue.replace_node(
        type(norm)(norm.name, norm.op, norm.inputs, {"weight": broken}, norm.attrs)
    )
    with pytest.raises(RunFailed, match="logits are not finite"):
        self_text(load(graph.with_units((*graph.units[:-1], epilogue))), None, tokens=8, context=8)
