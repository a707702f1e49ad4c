"""The CPU backend beyond the suite of all backends: codes, layouts, threads, registers."""

import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.decomposition.trellis_codes import TABLE, known_code
from atd.errors import BadInput
from atd.kernels import matmul as kernels
from atd.kernels import xla
from atd.kernels.cpu import build
from atd.kernels.cpu.backend import MAX_INPUTS, MAX_TOKENS
from atd.models import ops, rope
from atd.weights import DTYPES, Packed, PackedType, TernaryType, TrellisType
from atd.weights.layouts import LAYOUTS
from tests.kernels.backends import ABSENT
from tests.kernels.matrices import activations, ternary

needs_compiler = pytest.mark.skipif(bool(ABSENT["cpu"]), reason=str(ABSENT["cpu"]))


def packed_of(type, seed=0) -> Packed:
    random = np.random.default_rng(seed)
    trits = random.integers(-1, 2, type.trits_shape).astype(np.int8)
    scales = random.uniform(0.5, 1, type.scales_shape).astype(DTYPES[type.dtype])
    return Packed(LAYOUTS["aligned"].pack(trits), scales, PackedType(type, "aligned"))


def difference(x, weight) -> float:
    """The largest difference from XLA's product, in units of its root mean square."""
    wanted = xla.matmul(x, weight)
    found = jax.jit(lambda x, w: kernels.matmul(x, w, backend="cpu"))(x, weight)
    return float(jnp.abs(found - wanted).max() / jnp.sqrt(jnp.mean(wanted**2)))


@needs_compiler
@pytest.mark.parametrize("tokens", [2, pytest.param(MAX_TOKENS + 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("known", TABLE, ids=lambda known: f"{known.bases}-{known.kind}")
def test_every_code(known, tokens):
    """Of whole segments, and a shorter one at the end."""
    code = known_code(known.bases, known.kind)
    weight = packed_of(TrellisType((100, 131), code, 40, "f16"))
    assert difference(activations(tokens, 131), weight) < 1e-3


@needs_compiler
@pytest.mark.parametrize(
    ("bases", "tied"), [(1, True), (2, True), (3, True), (4, True), (2, False)]
)
def test_inputs_one_off_a_cell_and_a_block(bases, tied):
    for inputs in (1, 6, 319, 320, 321, 5121):
        weight = packed_of(TernaryType((9, inputs), bases, "row", tied, "bf16"))
        x = activations(2, inputs)
        wanted = np.asarray(x, np.float64) @ np.asarray(weight.dequantize(), np.float64).T
        found = kernels.matmul(x, weight, backend="cpu")
        bound = 2e-5 if tied else 2e-3  # integers of two parts, of one
        assert np.abs(found - wanted).max() < bound * np.sqrt(np.mean(wanted**2))


@needs_compiler
def test_a_token_that_is_not_finite_is_not_a_number_and_leaves_the_others_alone():
    weight = packed_of(TernaryType((9, 64), 2, "row", True, "f16"))
    x = np.array(activations(3, 64))
    x[1, 5] = np.inf
    y = np.asarray(kernels.matmul(jnp.asarray(x), weight, backend="cpu"))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()
    x[1, 5] = np.nan
    assert np.isnan(np.asarray(kernels.matmul(jnp.asarray(x), weight, backend="cpu"))[1]).all()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(6, 2, 0), (4, 4, 3)])
def test_attention_is_that_of_the_reference(dtype, heads, kv_heads, window):
    """Two sequences at positions of their own, q, k and v side by side in one array."""
    batch, length, dim, random = 2, 9, 16, np.random.default_rng(0)
    joined = jnp.asarray(random.standard_normal((batch, 1, (heads + 2 * kv_heads) * dim)))
    joined = joined.astype(jnp.float32)
    ends = heads * dim, (heads + kv_heads) * dim
    shape = batch, kv_heads, length, dim
    cache = jnp.asarray(random.standard_normal(shape), jnp.float32), jnp.ones(shape)
    cache = ops.in_8_bits(*cache) if dtype == "int8" else tuple(x.astype(dtype) for x in cache)
    positions = jnp.asarray([[4], [8]], jnp.int32)
    frequencies = rope.rope_frequencies(dim, 10000.0, ())
    q, k, v = jnp.split(joined, ends, axis=2)
    turned = [rope.rope(part, positions, dim, 10000.0) for part in (q, k)]
    new_k, new_v = (part.reshape(batch, 1, -1, dim).swapaxes(1, 2) for part in (turned[1], v))
    wanted_cache = ops.update_cache(cache, new_k, new_v, positions)
    query = turned[0].reshape(batch, 1, heads, dim)
    keys, values, *scales = wanted_cache
    wanted = ops.attention(query, keys, values, positions, window, scales=scales)
    wanted = wanted.reshape(batch, 1, -1)
    q, k, v = ((joined, start) for start in (0, *ends))

    @jax.jit
    def attend(cache):
        options = positions, cache, frequencies, heads, window
        return kernels.attend(q, k, v, *options, backend="cpu")

    found, found_cache = attend(cache)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    for found_part, wanted_part in zip(found_cache, wanted_cache, strict=True):
        # a sum that lies between two numbers of 16 bits may be rounded to either
        steps = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10, "int8": 2e-6}[dtype]
        np.testing.assert_allclose(
            np.asarray(found_part, np.float32), np.asarray(wanted_part, np.float32), atol=steps
        )
        assert found_part.dtype == wanted_part.dtype


@needs_compiler
@pytest.mark.parametrize(
    "type",
    [
        TrellisType((160, 131), known_code(2), 40, "f16"),
        TrellisType((160, 131), known_code(1.25), 80, "f16"),
        TernaryType((162, 131), 2, "row", True, "f16"),
    ],
    ids=str,
)
def test_a_norm_before_swiglu_and_a_residual(type):
    weight, x = packed_of(type), activations(3, 131)
    norm = kernels.Norm(jnp.asarray(activations(1, 131, seed=3)[0]), 1e-5)
    products = xla.matmul(norm(x), weight)
    gate, up = jnp.split(products, 2, axis=1)
    residual = jnp.asarray(activations(3, type.shape[0], seed=4))
    gated = jax.jit(lambda x, w: kernels.fused(x, w, norm, gated=True, backend="cpu"))(x, weight)
    added = jax.jit(lambda x, w: kernels.fused(x, w, None, residual, backend="cpu"))(x, weight)
    size = float(jnp.sqrt(jnp.mean(products**2)))
    np.testing.assert_allclose(gated, jax.nn.silu(gate) * up, atol=4e-3 * size**2)
    np.testing.assert_allclose(added, xla.matmul(x, weight) + residual, atol=1e-3 * size)


@needs_compiler
def test_halves_that_cut_a_segment_are_not_one_call():
    weight = packed_of(TrellisType((120, 131), known_code(2), 40, "f16"))
    x = jnp.asarray(activations(1, 131))
    assert kernels.fused(x, weight, gated=True, backend="cpu") is None


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 65, 1100])
@pytest.mark.parametrize("tied", [True, False])
def test_groups_and_more_tokens_than_a_tile_or_a_run(tokens, tied):
    weight = packed_of(TernaryType((19, 700), 2, 128, tied, "f16"))
    assert difference(activations(tokens, 700), weight) < 1e-5


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 3, MAX_TOKENS, MAX_TOKENS + 1, 65, 1100])
@pytest.mark.parametrize(
    "type",
    [
        *(TernaryType((9, 319), n, "row", True, "f32") for n in (1, 2, 3, 4)),
        *(TernaryType((67, 321), n, "tensor", False, "f16") for n in (1, 2, 3)),
        TernaryType((1, 1), 3, "row", True, "f16"),
        TernaryType((70, 1601), 2, "row", True, "bf16"),
        TernaryType((19, 700), 2, 128, True, "f16"),
        TrellisType((100, 131), known_code(2), 40, "f16"),
        TrellisType((160, 644), known_code(1.25), 80, "f16"),
    ],
    ids=str,
)
def test_activations_of_8_bits_are_those_of_the_reference(type, tokens):
    """Integers have the same sums everywhere: what is left are roundings of float32."""
    weight, x = packed_of(type), np.array(activations(tokens, type.shape[1]))
    x[-1] *= 1e-7  # a token below the least scale
    wide = np.asarray(kernels.rounded(jnp.asarray(x)), np.float64)
    wanted = wide @ np.asarray(weight.dequantize(), np.float64).T
    found = np.asarray(kernels.matmul(jnp.asarray(x), weight, int8=True, backend="cpu"))
    size = np.abs(wide) @ np.abs(np.asarray(weight.dequantize(), np.float64)).T
    assert found.shape == wanted.shape
    assert (np.abs(found - wanted) <= 1e-6 * size + 1e-30).all()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("known", TABLE, ids=lambda known: f"{known.bases}-{known.kind}")
def test_every_code_times_activations_of_8_bits(known):
    weight = packed_of(TrellisType((100, 131), known_code(known.bases, known.kind), 40, "f16"))
    for tokens in (2, MAX_TOKENS + 1):
        x = jnp.asarray(activations(tokens, 131))
        wanted = xla.matmul(kernels.rounded(x), weight)
        found = kernels.matmul(x, weight, int8=True, backend="cpu")
        assert float(jnp.abs(found - wanted).max() / jnp.sqrt(jnp.mean(wanted**2))) < 1e-5


@needs_compiler
def test_a_prompt_of_8_bits_has_the_bytes_of_its_tokens():
    weight = packed_of(TrellisType((80, 131), known_code(2), 40, "f16"))
    x = jnp.asarray(activations(MAX_TOKENS + 1, 131))
    together = kernels.matmul(x, weight, int8=True, backend="cpu")
    alone = jnp.stack([kernels.matmul(row, weight, int8=True, backend="cpu") for row in x])
    np.testing.assert_allclose(together, alone, rtol=2e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("tokens", [3, MAX_TOKENS + 1])
def test_a_token_of_8_bits_that_is_not_finite_leaves_the_others_alone(tokens):
    weight = packed_of(TernaryType((9, 64), 2, "row", True, "f16"))
    x = np.array(activations(tokens, 64))
    x[0, 5], x[1, 6] = np.inf, np.nan
    y = np.asarray(kernels.matmul(jnp.asarray(x), weight, int8=True, backend="cpu"))
    assert np.isnan(y[:2]).all()
    assert np.isfinite(y[2:]).all()


@needs_compiler
@pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("triton-interpret", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("tokens", [3, MAX_TOKENS])
def test_a_norm_and_rounding_before_swiglu_and_a_residual(tokens, backend):
    type = TrellisType((160, 131), known_code(2), 40, "f16")
    weight, x = packed_of(type), jnp.asarray(activations(tokens, 131))
    norm = kernels.Norm(jnp.asarray(activations(1, 131, seed=3)[0]), 1e-5)
    residual = jnp.asarray(activations(tokens, 160, seed=4))
    products = xla.matmul(kernels.rounded(norm(x)), weight)
    gate, up = jnp.split(products, 2, axis=1)
    size = float(jnp.sqrt(jnp.mean(products**2)))
    how = {"int8": True, "backend": backend}
    gated = np.asarray(kernels.fused(x, weight, norm, gated=True, **how))
    added = np.asarray(kernels.fused(x, weight, norm, residual, **how))
    np.testing.assert_allclose(gated, jax.nn.silu(gate) * up, atol=1e-4 * size**2)
    np.testing.assert_allclose(added, products + residual, atol=1e-4 * size)


def test_what_it_refuses_by_name():
    backend, float32 = kernels.PACKED["cpu"], jnp.dtype(jnp.float32)
    wide = PackedType(TernaryType((4, MAX_INPUTS + 1), 2, "row", True, "f16"), "aligned")
    assert "up to 65536 inputs" in (backend.refuses(float32, wide) or "")


def test_a_machine_without_a_compiler_takes_xla(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("ATD_CACHE", str(tmp_path))
    weight = packed_of(TernaryType((9, 64), 2, "row", True, "f16"))
    x = activations(1, 64)
    monkeypatch.setattr(build, "unavailable", build.unavailable.__wrapped__)
    assert kernels.resolve(x, weight) is xla
    with pytest.raises(BadInput, match="there is no compiler 'no-such-compiler'"):
        kernels.resolve(x, weight, "cpu")


@needs_compiler
def test_products_of_weights_that_it_does_not_take_need_no_compiler(monkeypatch):
    monkeypatch.setattr(build, "unavailable", lambda: pytest.fail("asked for a compiler"))
    assert kernels.resolve(activations(1, 64), ternary(4, 64)) is xla


_DIGEST = """
import hashlib, os, sys
if sys.argv[1] == "one thread":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from tests.kernels.cpu.test_backend import digest
print(digest())
"""


def digest() -> str:
    """Of products of all kinds."""
    hashed = hashlib.sha256()
    for type in (
        TernaryType((200, 1000), 2, "row", True, "f16"),
        TernaryType((201, 333), 3, "row", False, "f16"),
        TernaryType((1, 1), 4, "tensor", True, "f32"),
        TrellisType((240, 600), known_code(2), 80, "f16"),
        TrellisType((220, 641), known_code(1.25), 80, "bf16"),
    ):
        for tokens in (1, 5, MAX_TOKENS + 1):
            x = activations(tokens, type.shape[1])
            for int8 in (False, True):
                y = kernels.matmul(x, packed_of(type), int8=int8, backend="cpu")
                hashed.update(np.asarray(y).tobytes())
    return hashed.hexdigest()


def library_of(compiler: str, name: str) -> str:
    """Its path; empty where the compiler has none."""
    command = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return path if os.path.isabs(path) else ""


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
@pytest.mark.parametrize("how", ["one thread", "portable", "sanitizers"])
def test_bytes_do_not_depend_on_threads_or_on_the_width_of_registers(how, tmp_path):
    """And no address or overflow is wrong, by the compiler's sanitizers."""
    environment = dict(os.environ)
    if how != "one thread":
        environment["ATD_CACHE"] = str(tmp_path)
    if how == "portable":
        environment["CXX"] = "c++ -DATD_PORTABLE"
    if how == "sanitizers":
        found = [library_of("c++", name) for name in ("libasan.so", "libstdc++.so.6")]
        if not all(found):
            pytest.skip("the compiler has no libasan")
        environment |= {
            "CXX": "c++ -fsanitize=address,undefined -fno-sanitize-recover=all",
            "LD_PRELOAD": " ".join(found),
            "ASAN_OPTIONS": "detect_leaks=0",
        }
    command = [sys.executable, "-c", _DIGEST, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == digest()
