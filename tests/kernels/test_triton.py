"""The Triton backend without a GPU: choices of way, refusals, self-test, lowering for CUDA. Its numbers: test_matmul.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.kernels import packed as packed_backends
from atd.kernels import prefixes
from atd.kernels import settings as tuning
from atd.kernels.matmul import matmul
from atd.kernels.settings import Settings
from atd.kernels.triton import backend as triton
from atd.kernels.triton import decode as triton_decode
from atd.kernels.triton import gemv as triton_gemv
from atd.kernels.triton import ptx as triton_ptx
from atd.kernels.triton import trits as triton_weights
from atd.kernels.triton.gemm import Tiles
from atd.kernels.triton.gemv import Shape
from atd.weights import Dense, Packed, PackedType, TernaryType
from atd.weights.layouts import LAYOUTS
from tests.kernels.matrices import activations, lowered, packed, unoptimized

DEVICES = ["NVIDIA H200", "NVIDIA A10", "NVIDIA L4"]


def interpreted(x, weight, settings=None):
    """`triton.multiply` in interpret mode, compiled in a hurry."""
    return unoptimized(lambda x, w: triton.multiply(x, w, settings, interpret=True))(x, weight)


@pytest.mark.parametrize(
    ("tokens", "group", "way"),
    [
        (1, "row", "gemv"),
        (4, "tensor", "gemv"),
        (4, 128, "gemv"),
        (1, 64, "gemv"),
        (1, 32, "gemv"),
        (16, "row", "gemv"),
        (17, "row", "gemm"),
        (128, "row", "gemm"),
        (129, "row", "decode"),
        (64, 32, "gemm"),
        (65, 32, "decode"),
    ],
)
def test_ways(tokens, group, way):
    type = TernaryType((64, 640), 2, group, True, "f16")
    assert triton.path(tuning.settings("no such GPU", type, tokens), type, tokens) == way


@pytest.mark.parametrize("way", ["gemv", "gemm", "decode"])
@pytest.mark.parametrize(
    ("bases", "group", "tied"), [(2, "row", True), (2, 128, False), (3, 160, True)]
)
def test_all_ways_agree(way, bases, group, tied):
    weight, x = (
        packed(40, 700, bases, group, tied),
        activations(3, 700).astype(jnp.bfloat16).astype(jnp.float32),
    )
    settings = {
        "gemv": Settings(),
        "gemm": Settings(gemv_tokens=0),
        "decode": Settings(gemv_tokens=0, gemm_tokens=0),
    }[way]
    found = interpreted(x, weight, settings)
    wanted = x @ weight.dequantize().T
    exact = way == "gemv" or group == "row"  # elsewhere weights are rounded to 16 bits
    np.testing.assert_allclose(
        found, wanted, atol=(2e-5 if exact else 2e-3) * np.abs(np.asarray(wanted)).max()
    )


def test_decoding_goes_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(triton_decode, "CHUNK_BYTES", 0)  # as few rows as a block has
    weight, x = packed(44, 700, 3), activations(3, 700).astype(jnp.bfloat16).astype(jnp.float32)
    wanted = x @ weight.dequantize().T
    found = interpreted(x, weight, Settings(gemv_tokens=0, gemm_tokens=0))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(np.asarray(wanted)).max())


@pytest.mark.parametrize(
    "settings",
    [
        Settings(Shape(warps=1)),
        Settings(Shape(warps=8, row_blocks=2)),
        Settings(Shape(warps=2, row_blocks=4, unroll=2)),
        Settings(Shape(warps=4, row_warps=4, unroll=4)),
        Settings(Shape(warps=4, row_blocks=2, unroll=2)),
        Settings(Shape(warps=8, row_warps=2, row_blocks=2)),
        Settings(gemv_tokens=0, tiles=Tiles(16, 16, 16, 2, 1)),
        Settings(gemv_tokens=0, tiles=Tiles(128, 64, 64, 8, 3)),
    ],
)
def test_shapes_of_tiles_change_nothing(settings):
    weight, x = (
        packed(75, 700),
        activations(5 if settings.gemv_tokens == 0 else 3, 700)
        .astype(jnp.bfloat16)
        .astype(jnp.float32),
    )
    found = interpreted(x, weight, settings)
    wanted = x @ weight.dequantize().T
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(np.asarray(wanted)).max())


@pytest.mark.parametrize(
    ("layout", "inputs"),
    [
        ("aligned", 288),
        ("words", 300),
        ("interleaved", 576),
        ("aligned", 4096),
        ("interleaved", 4096),
    ],
)
def test_stored_layouts_are_read(layout, inputs):
    weight, x = packed(20, inputs, layout=layout), activations(1, inputs)
    np.testing.assert_array_equal(
        interpreted(x, weight), interpreted(x, packed(20, inputs, layout=triton.LAYOUT))
    )


def test_a_row_too_short_for_all_the_groups_that_a_step_can_touch():
    """One step touches two groups of 100, later ones three: the padding must not count them otherwise."""
    weight, x = packed(20, 110, group=100), activations(1, 110)
    wanted = np.asarray(x @ weight.dequantize().T)
    np.testing.assert_allclose(
        interpreted(x, weight, Settings(Shape(warps=4))), wanted, atol=2e-5 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("layout", ["words", "aligned", "interleaved"])
def test_prepare_makes_tiles_and_leaves_alone_what_it_does_not_read(layout):
    weight, tiles = (
        packed(20, 333, bases=3, layout=layout),
        packed(20, 333, bases=3, layout="tiles"),
    )
    for form in (np.asarray, jnp.asarray):
        held = triton.Triton().prepare(jax.tree.map(form, weight))
        assert isinstance(held, Packed)
        assert held.type == tiles.type
        np.testing.assert_array_equal(held.codes, tiles.codes)
    for other in (tiles, Dense(np.ones((3, 4))), packed(4, 64, layout="bit-ttt")):
        assert triton.Triton().prepare(other) is other


def test_prepare_of_words_keeps_the_bytes_of_wide_rows():
    aligned = jax.tree.map(np.asarray, packed(4, 4096, layout="aligned"))
    held = packed_backends.prepare(aligned, "words")
    assert isinstance(held, Packed)
    assert held.type.nbytes == aligned.type.nbytes
    assert np.shares_memory(held.codes, aligned.codes)


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_kernels_find_words_where_tiles_have_them(bases):
    words, tiles = (
        np.asarray(packed(40, 1300, bases, layout=layout).codes) for layout in ("words", "tiles")
    )
    row, word = (jnp.asarray(i, jnp.int32) for i in np.indices(words.shape))
    at = triton_gemv.word_at(row, word, bases, tiles.shape[1])
    np.testing.assert_array_equal(tiles.reshape(-1)[np.asarray(at)], words)


@pytest.mark.parametrize(("bases", "tied"), [(2, True)])
def test_sixteen_tokens_are_fixed_point_and_exact(bases, tied):
    """Integers of which the largest is the limit stay what they are, in columns of all bytes together and apart."""
    limit = prefixes.plan(bases, tied).limit
    type = PackedType(TernaryType((40, 700), bases, "row", tied, "f16"), "tiles")
    random = np.random.default_rng(0)
    x = random.integers(-99, 100, (16, 700))
    x[:, 5] = limit
    trits = random.integers(-1, 2, (40, 700, bases)).astype(np.int8)
    scales = np.ones(type.ternary.scales_shape, np.float16)
    weight = Packed(jnp.asarray(LAYOUTS["tiles"].pack(trits)), jnp.asarray(scales), type)
    wanted = x @ np.asarray(weight.dequantize()).astype(int).T
    settings = Settings(Shape(warps=4, row_warps=2, row_blocks=2))
    assert triton.path(settings, type.ternary, 16) == "gemv"
    for tokens in (2, 16):
        found = interpreted(jnp.asarray(x[:tokens], jnp.float32), weight, settings)
        np.testing.assert_allclose(
            found, wanted[:tokens], rtol=1e-6, atol=0.1
        )  # of 2^22: of float32 alone


def test_refusals_name_the_reason_and_the_backend_that_could():
    x = activations(1, 64)
    with pytest.raises(
        ValueError,
        match=r"'triton-interpret' cannot multiply .* it multiplies weights packed in layout",
    ):
        matmul(x, packed(4, 64, layout="bit-ttt"), backend="triton-interpret")
    with pytest.raises(ValueError, match="up to 4 bases, not 5; backend 'xla' multiplies any"):
        matmul(x, packed(4, 64, bases=5), backend="triton-interpret")
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, not int32"):
        matmul(x.astype(jnp.int32), packed(4, 64), backend="triton-interpret")
    if jax.default_backend() == "cpu":
        with pytest.raises(
            ValueError,
            match="needs an NVIDIA GPU and this process runs on cpu; backend 'xla' runs there",
        ):
            matmul(x, packed(4, 64), backend="triton")


def test_an_old_gpu_is_refused(monkeypatch):
    class Device:
        platform, device_kind, compute_capability = "gpu", "Tesla T4", "7.5"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert "Tesla T4 has compute capability 7.5 and Triton needs 8.0" in (
        triton.device_refuses() or ""
    )
    Device.compute_capability = "12.0"  # not less than "8.0", though the text is
    assert triton.device_refuses() is None


@pytest.mark.parametrize(
    ("bases", "tied"),
    [(1, True), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in ((2, False), (3, True)))],
)
def test_self_test_sees_a_wrong_kernel(bases, tied, monkeypatch):
    assert triton.largest_difference(bases, tied, interpret=True) < 1e-4
    twin = triton_ptx.multiply_twin
    monkeypatch.setattr(
        triton_ptx, "multiply_twin", lambda words, x, sums: twin(words[::-1], x, sums)
    )
    assert triton.largest_difference(bases, tied, interpret=True) > 0.1
    monkeypatch.setattr(triton_ptx, "multiply_twin", twin)
    of_tiles = triton_weights._twin
    monkeypatch.setattr(
        triton_weights, "_twin", lambda digits, number: of_tiles(digits, number) + 1
    )
    assert triton.largest_difference(bases, tied, interpret=True) > 0.1


def test_self_test_runs_while_a_program_is_traced(monkeypatch):
    """As on a GPU, where the first product of a model asks for it: nothing of that trace may reach its kernels."""
    found = []

    def difference(bases: int, tied: bool) -> float:
        found.append(triton.largest_difference(bases, tied, interpret=True))
        return found[-1]

    @jax.jit
    def model(x):
        packed_backends.self_test("triton", difference, 1, True)
        return x

    assert model(1.0) == 1.0
    assert len(found) == 1


def test_self_test_raises(monkeypatch):
    monkeypatch.setattr(
        triton, "largest_difference", lambda bases, tied: 0.5 if bases == 3 else 0.0
    )
    triton.self_test.cache_clear()
    with pytest.raises(
        RuntimeError,
        match=r"computes wrong results .* N = 3, tied, off by 5\.0e-01 .* use backend 'xla'",
    ):
        triton.self_test(3, True)
    triton.self_test(2, True)
    triton.self_test.cache_clear()


KINDS = [(1, True), (2, True), (2, False), (3, True), (3, False), (4, True)]


@pytest.mark.parametrize(
    ("device", "bases", "tied"),
    [*((DEVICES[0], *kind) for kind in KINDS), *((d, 2, True) for d in DEVICES[1:])],
)
def test_lowers_for_cuda(device, bases, tied):
    for tokens, group, name in (
        (1, "row", "gemv"),
        (16, "row", "gemv"),
        (32, "row", "gemm"),
        (32, 128, "gemm"),
        (257, "row", "decode"),
    ):
        text = lowered(
            device, triton.multiply, packed(64, 640, bases, group, tied, layout="tiles"), tokens
        )
        assert f"ternary_{name}_n{bases}" in text
        assert "triton" in text


def test_the_fold_alone_lets_the_next_kernel_begin_and_on_hopper_alone():
    weight = packed(64, 640, layout="tiles")
    text = {
        device: lowered(device, triton.multiply, weight, 1)
        for device in ("NVIDIA H200", "NVIDIA A10")
    }
    assert text["NVIDIA H200"].count("griddepcontrol.launch_dependents") == 1
    assert "griddepcontrol" not in text["NVIDIA A10"]


@pytest.mark.parametrize("tokens", [1, 32, 300])
def test_kernels_write_the_dtype_that_is_asked_for(tokens):
    """No kernel of XLA's for it."""
    text = lowered(
        "NVIDIA H200", triton.multiply, packed(64, 640, layout="tiles"), tokens, jnp.bfloat16
    )
    assert not re.search(r"stablehlo.convert .*f32>\) -> tensor<.*bf16>", text)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_other_activations_lower_for_cuda(dtype):
    for tokens in (1, 16, 32, 300):
        lowered("NVIDIA H200", triton.multiply, packed(50, 333, group="row"), tokens, dtype)


def test_wide_rows_are_handed_over_as_they_lie():
    """No operation makes a copy of the codes: the kernel's operand is the argument, reshaped."""
    text = lowered("NVIDIA H200", triton.multiply, packed(64, 4096), 1)
    assert text.count("tensor<64x412xui32>") > 0
    assert "stablehlo.bitcast_convert" not in text
