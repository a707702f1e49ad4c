"""Attention of one token in one kernel, in interpret mode against float64, and on a GPU where there
is one."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.kernels.triton import attention
from atd.kernels.triton.backend import Triton
from atd.models import ops
from atd.models.rope import rope_frequencies
from tests.kernels.matrices import lowered_for, unoptimized

THETA = 10000.0
NAMES = ("heads", "kv_heads", "head_dim", "length", "positions", "dtype", "options")
CASES = [
    # nothing in the cache, something, the last place
    (4, 1, 64, 300, (0, 150, 299), "bfloat16", {}),
    (2, 2, 128, 140, (64, 63, 65), "bfloat16", {}),  # a turn's tiles end at 64
    (3, 1, 48, 140, (129, 1), "float16", {}),
    (8, 1, 8, 40, (17, 39), "float32", {}),  # the size of heads of test models
    (3, 1, 80, 300, (299, 100), "bfloat16", {"window": 130, "splits": 2}),
    (4, 2, 64, 2048, (1500,), "bfloat16", {}),  # a long cache
    (4, 1, 64, 300, (0, 150, 299), "int8", {}),
    (6, 2, 80, 300, (299, 100), "int8", {"window": 130, "splits": 2}),
]
SLOW_CASES = [
    (6, 2, 128, 70, (69,), "float32", {}),
    (4, 1, 64, 300, (3, 257), "bfloat16", {"window": 5}),
    (8, 1, 64, 300, (0, 299, 130), "bfloat16", {"splits": 3}),
    (4, 2, 128, 2048, (1500,), "int8", {}),
    (8, 1, 8, 40, (17, 39), "int8", {}),
]


def operands(heads, kv_heads, head_dim, length, positions, dtype):
    """(q, k, v in one array, positions, a cache with NaN from each position on, in its scales where
    it is in 8 bits)."""
    random = np.random.default_rng(0)
    batch = len(positions)
    qkv = random.standard_normal((batch, 1, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    cache = random.standard_normal((2, batch, kv_heads, length, head_dim)).astype(np.float32)
    for sequence, position in enumerate(positions):
        cache[:, sequence, :, position:] = np.nan
    positions = jnp.asarray(positions, jnp.int32)[:, None]
    parts = map(jnp.asarray, cache)
    held = ops.in_8_bits(*parts) if dtype == "int8" else tuple(x.astype(dtype) for x in parts)
    return jnp.asarray(qkv), positions, held


def attend(qkv, positions, cache, *, heads, window=0, splits=None, interpret=False):
    _, kv_heads, _, head_dim = cache[0].shape
    q, k, v = ((qkv, start * head_dim) for start in (0, heads, heads + kv_heads))
    frequencies = rope_frequencies(head_dim, THETA, ())
    options = {"splits": splits, "interpret": interpret}
    return attention.attend(q, k, v, positions, cache, frequencies, heads, window, **options)


def interpreted(*operands, **options):
    """On the CPU: on a GPU XLA leaves out the rounding of new keys and values."""
    options = partial(attend, interpret=True, **options)
    with jax.default_device(jax.devices("cpu")[0]):
        return unoptimized(options)(*jax.tree.map(np.asarray, operands))


def epsilon_of(dtype: str) -> float:
    """Relative rounding of numbers in a cache; of codes none."""
    return 0.0 if dtype == "int8" else float(jnp.finfo(dtype).eps)


def assert_near(found: np.ndarray, wanted: np.ndarray, atol: np.ndarray, rtol: float):
    """As `assert_allclose`, with a bound for each row."""
    assert (np.abs(found - wanted) <= atol + rtol * np.abs(wanted)).all()


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    """x [heads, head_dim], float64."""
    angle = np.float32(position) * rope_frequencies(x.shape[1], THETA, ())
    cos, sin = np.cos(angle, dtype=np.float64), np.sin(angle, dtype=np.float64)
    first, second = np.split(x.astype(np.float64), 2, axis=1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def wanted(q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int, window: int) -> np.ndarray:
    """q [heads, head_dim], k, v [kv_heads, length, head_dim], as the cache holds them -> [heads,
    head_dim], float64."""
    seen = slice(max(0, position - window + 1) if window else 0, position + 1)
    k, v = (x[:, seen].astype(np.float64).repeat(len(q) // len(k), axis=0) for x in (k, v))
    scores = np.einsum("hd,hsd->hs", q, k) / math.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,hsd->hd", weights / weights.sum(axis=1, keepdims=True), v)


def dequantized(cache) -> list[np.ndarray]:
    """k and v as the cache holds them, float32."""
    k, v, *scales = (np.asarray(part, np.float32) for part in cache)
    if not scales:
        return [k, v]
    with np.errstate(invalid="ignore"):  # scales of places that hold nothing
        return [codes * scale[..., None] for codes, scale in zip((k, v), scales, strict=True)]


@pytest.mark.parametrize(
    NAMES, [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_it_attends(heads, kv_heads, head_dim, length, positions, dtype, options):
    qkv, at, cache = operands(heads, kv_heads, head_dim, length, positions, dtype)
    mixed, new = interpreted(qkv, at, cache, heads=heads, **options)
    assert mixed.shape == (len(positions), 1, heads * head_dim)
    q, k, v = np.split(
        np.asarray(qkv).reshape(len(positions), -1, head_dim), [heads, heads + kv_heads], axis=1
    )
    for sequence, position in enumerate(positions):
        for before, after in zip(cache, new, strict=True):
            before, after = (np.array(x[sequence], np.float32) for x in (before, after))
            before[:, position] = after[:, position]
            np.testing.assert_array_equal(after, before)  # nothing else was written
        keys, values = (x[sequence] for x in dequantized(new))
        for after, value in ((keys, rotated(k[sequence], position)), (values, v[sequence])):
            half = np.abs(value).max(axis=1, keepdims=True) / 254  # of a code
            near = {"atol": 1e-5 + half * (dtype == "int8"), "rtol": epsilon_of(dtype)}
            assert_near(after[:, position], value, **near)
        expected = wanted(
            rotated(q[sequence], position), keys, values, position, options.get("window", 0)
        )
        found = np.asarray(mixed[sequence]).reshape(heads, head_dim)
        np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.skipif(bool(Triton().device_refuses()), reason=str(Triton().device_refuses()))
def test_a_gpu_finds_the_same():
    for heads, kv_heads, head_dim, length, positions, dtype, options in CASES + SLOW_CASES:
        given = operands(heads, kv_heads, head_dim, length, positions, dtype)
        mixed, new = jax.jit(partial(attend, heads=heads, **options))(*given)
        expected, expected_new = interpreted(*given, heads=heads, **options)
        near = 2e-3 if dtype == "int8" else 2e-5
        np.testing.assert_allclose(mixed, expected, atol=near * np.abs(np.asarray(expected)).max())
        for found, wanted in zip(new, expected_new, strict=True):
            off = 1 if found.dtype == jnp.int8 else 1e-5  # a code may be its neighbour
            found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
            np.testing.assert_allclose(found, wanted, atol=off, rtol=2 * epsilon_of(dtype))


@pytest.mark.parametrize(
    ("heads", "group", "splits", "queries"),
    [
        (32, 4, 1, 1),
        (256, 4, 1, 2),
        (4096, 4, 1, 4),
        (32, 4, 8, 4),
        (9, 3, 1, 1),
        (32, 16, 4, 4),
        (14, 7, 4, 1),
    ],
)
def test_query_heads_of_a_block_divide_the_group(heads, group, splits, queries):
    assert attention.queries_of(heads, group, splits) == queries


def test_blocks_share_long_caches_alone():
    assert [attention.splits_of(8, n) for n in (1, 1024, 2048, 8192, 131072)] == [
        1,
        1,
        4,
        16,
        16,
    ]
    assert attention.splits_of(256, 8192) == 1


def test_what_it_refuses():
    def cache(*shape, dtype=jnp.float32) -> Any:
        return (jax.ShapeDtypeStruct(shape, dtype),) * 2

    assert attention.refuses(cache(1, 2, 10, 96)) is None
    assert attention.refuses(cache(1, 2, 10, 96, dtype=jnp.int8)) is None
    assert "not float64" in (attention.refuses(cache(1, 2, 10, 64, dtype=np.float64)) or "")
    assert "not 512" in (attention.refuses(cache(1, 2, 10, 512)) or "")
    assert "32 bits" in (attention.refuses(cache(64, 8, 32768, 128)) or "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_lowers_for_cuda(dtype):
    """One kernel, which writes into the cache that it is given; a second one where blocks share a
    long cache."""
    shape = jax.ShapeDtypeStruct
    for head_dim, length, kernels in ((128, 1024, 1), (96, 200, 1), (64, 4096, 2)):
        cache = (shape((2, 2, length, head_dim), dtype),) * 2
        codes = dtype == "int8"
        cache += (shape((2, 2, length), jnp.float32),) * 2 * codes
        qkv = shape((2, 1, 10 * head_dim), jnp.float32)
        function = partial(attend, heads=6, window=50)
        text = lowered_for("NVIDIA H200", function, qkv, shape((2, 1), jnp.int32), cache)
        assert text.count("custom_call @") == kernels
        assert attention.name(head_dim, codes) in text
        assert text.count("output_operand_alias<") == len(cache)
