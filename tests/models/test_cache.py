"""The cache of keys and values: what fits in, how new tokens are padded, how far it goes back."""

import jax.numpy as jnp
import numpy as np
import pytest

from atd.errors import BadInput
from atd.models.cache import Cache, bucket, check_kv, check_room, empty_slots, padded_width


def cache(filled: int, length: int = 64, rows: int = 2) -> Cache:
    slots = {"attention": (jnp.ones((rows, 1, length, 4)), jnp.ones((rows, 1, length, 4)))}
    return Cache((slots,), jnp.full((rows, 1), filled, jnp.int32), filled, length)


def test_tokens_are_padded_to_few_widths_that_fit():
    assert [bucket(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert [padded_width(n, cache(0)) for n in (1, 3, 20, 60)] == [1, 4, 32, 64]
    assert [padded_width(n, cache(30)) for n in (1, 3, 20)] == [1, 16, 32]
    assert [padded_width(n, cache(55)) for n in (1, 2, 9)] == [1, 9, 9]


def test_a_longer_cache_keeps_what_it_has():
    grown = cache(7).longer(100)
    keys, _ = grown.blocks[0]["attention"]
    assert (grown.filled, grown.length, keys.shape) == (7, 100, (2, 1, 100, 4))
    assert np.array_equal(keys.sum(axis=(0, 1, 3)), [8] * 64 + [0] * 36)


def test_a_cache_in_8_bits_grows_with_its_scales():
    shape = 2, 1, 8, 4
    slots = {"attention": empty_slots(shape, jnp.bfloat16, in_8_bits=True)}
    grown = Cache((slots,), jnp.zeros((2, 1), jnp.int32), 0, 8).longer(12)
    assert grown.kv == "int8"
    shapes = [part.shape for part in grown.blocks[0]["attention"]]
    assert shapes == [(2, 1, 12, 4)] * 2 + [(2, 1, 12)] * 2
    check_kv(grown, "int8")
    with pytest.raises(BadInput, match="a model with kv 'int8', and this model's is 'model'"):
        check_kv(grown, "model")


def test_going_back_takes_no_sequence_forward():
    mixed = Cache((), jnp.array([[9], [3]], jnp.int32), 9, 16)
    assert mixed.back_to(5).positions.ravel().tolist() == [5, 3]
    assert mixed.back_to(0).filled == 0
    for tokens in (-1, 10):
        with pytest.raises(BadInput, match=f"a cache of 9 tokens has no first {tokens}"):
            mixed.back_to(tokens)


def test_what_does_not_fit_is_refused():
    check_room(cache(60), 2, 4)
    with pytest.raises(BadInput, match="5 tokens is longer than the cache of 64, 60 of them taken"):
        check_room(cache(60), 2, 5)
    with pytest.raises(BadInput, match="prefill of 3 prompts needs a cache for as many"):
        check_room(cache(0), 3, 1)
