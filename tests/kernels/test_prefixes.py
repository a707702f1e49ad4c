"""Prefixes: every byte and pair of bytes, plans against trits, the fold of activations, the limits
of int8 and int32."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atd.kernels import prefixes
from atd.weights.layouts import DENSE_CODES, LAYOUTS

DIGITS = range(1, 6)
KINDS = [(bases, tied) for bases in range(1, prefixes.MAX_BASES + 1) for tied in (True, False)]
VALUES = np.arange(243)
TRITS = np.stack(
    [VALUES // 3 ** (5 - j) % 3 - 1 for j in DIGITS], axis=1
)  # [243, 5]: those of each code


def signed_bytes(words: np.ndarray, at: int) -> np.ndarray:
    return ((words >> np.uint32(at)) & np.uint32(255)).astype(np.uint8).view(np.int8).astype(int)


@pytest.mark.parametrize("digit", DIGITS)
def test_every_pair_of_codes_gives_both_prefixes_at_once(digit):
    first, second = (v.ravel() for v in np.meshgrid(VALUES, VALUES))
    words = DENSE_CODES[first].astype(np.uint32) | (DENSE_CODES[second].astype(np.uint32) << 16)
    factor, addend = prefixes.multiplier(digit)
    product = words * np.uint32(factor) + np.uint32(addend)
    prefix = TRITS[:, :digit] @ 3 ** np.arange(digit - 1, -1, -1)
    np.testing.assert_array_equal(signed_bytes(product, 8), prefix[first])
    np.testing.assert_array_equal(signed_bytes(product, 24), prefix[second])


@pytest.mark.parametrize(
    ("bases", "tied", "needed"),
    [(1, True, 20), (2, True, 12), (3, True, 28), (4, True, 8), (2, False, 20)],
)
def test_tied_weights_need_few_prefixes(bases, tied, needed):
    assert prefixes.plan(bases, tied).words == needed
    assert prefixes.plan(bases, tied).words % 4 == 0


def products(plan: prefixes.Plan, x: np.ndarray, trits: np.ndarray):
    """The sums by prefixes in numpy, int64 [M, sums, rows], and the integers that x became [M,
    in]."""
    codes = LAYOUTS["words"].pack(trits)
    steps = plan.steps(codes.shape[1])
    coefficients, largest = prefixes.fold(plan, jnp.asarray(x), steps)
    words = np.pad(
        codes, ((0, 0), (0, steps * plan.step_words - codes.shape[1])), constant_values=0x4D4D4D4D
    )
    pieces = words.reshape(len(trits), steps, 4, plan.piece_words)
    found = []
    for half in plan.halves:
        factor, addend = prefixes.multiplier(half.digit)
        low, high = (
            (pieces[..., byte // 4] >> np.uint32(8 * (byte % 4))) & np.uint32(255)
            for byte in half.bytes
        )
        product = (low | high << np.uint32(16)) * np.uint32(factor) + np.uint32(addend)
        found += [signed_bytes(product, 8), signed_bytes(product, 24)]
    values = np.stack(found, axis=-1).reshape(*pieces.shape[:3], plan.words, 4)
    return np.einsum(
        "mfstwb,ostwb->mfo", np.asarray(coefficients).astype(np.int64), values
    ), np.asarray(largest)


@pytest.mark.exact
@pytest.mark.parametrize(("bases", "tied"), KINDS)
@settings(max_examples=10, deadline=None)
@given(inputs=st.sampled_from([1, 79, 80, 81, 333]), seed=st.integers(0, 99))
def test_sums_over_prefixes_are_sums_over_trits(bases, tied, inputs, seed):
    plan, random = prefixes.plan(bases, tied), np.random.default_rng(seed)
    trits = random.integers(-1, 2, (3, inputs, bases)).astype(np.int8)
    integers = random.integers(-plan.limit, plan.limit + 1, (2, inputs))
    integers[:, random.integers(inputs)] = plan.limit  # so that the unit is 1
    found, _ = products(plan, integers.astype(np.float32), trits)
    levels = 3 ** np.arange(bases - 1, -1, -1)
    wanted = (
        (integers @ (trits @ levels).T)[:, None]
        if tied
        else np.einsum("mk,okf->mfo", integers, trits.astype(int))
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("bases", "tied"), KINDS)
def test_three_signed_bytes_hold_every_coefficient_and_give_it_back(bases, tied):
    plan = prefixes.plan(bases, tied)
    worst = plan.limit * plan.factor.sum(axis=0).max()
    assert (
        prefixes.LARGEST - plan.factor.sum(axis=0).max() < worst <= prefixes.LARGEST
    )  # no bit unused
    values = np.array(
        [
            -worst,
            -worst + 1,
            -65537,
            -129,
            -128,
            -1,
            0,
            1,
            127,
            128,
            255,
            256,
            65535,
            65536,
            worst - 1,
            worst,
        ]
    )
    coefficients = np.resize(values, (1, plan.sums, 2, 4, plan.words, 4)).astype(np.int32)
    words = np.asarray(
        prefixes.fragments(jnp.asarray(coefficients), 3 * plan.sums)
    )  # [steps, words, columns, threads]
    parts = np.stack([signed_bytes(words, 8 * b) for b in range(4)], axis=-1)
    parts = parts.reshape(2, plan.words, plan.sums, 3, 4, 4)
    joined = (
        parts[:, :, :, 0] + 256 * parts[:, :, :, 1] + 65536 * parts[:, :, :, 2]
    )  # [steps, words, sums, threads, byte]
    np.testing.assert_array_equal(joined.transpose(2, 0, 3, 1, 4)[None], coefficients)


def test_int32_holds_any_sum_of_a_row():
    """|prefix| <= 121 times |byte| <= 128, as many as trits need at most: 2^31 is reached at
    138,000 inputs a base."""
    assert 121 * 128 * 100_000 < 2**31


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_token_that_is_not_finite_has_results_that_are_not(bad):
    plan = prefixes.plan(2, True)
    x = np.ones((2, 40), np.float32)
    x[1, 7] = bad
    _, largest = prefixes.fold(plan, jnp.asarray(x), 1)
    np.testing.assert_array_equal(np.isnan(largest), [False, True])


def test_tokens_of_zeros_are_zeros():
    coefficients, largest = prefixes.fold(prefixes.plan(1, True), jnp.zeros((1, 40)), 1)
    assert not np.asarray(coefficients).any()
    assert largest.tolist() == [0.0]
