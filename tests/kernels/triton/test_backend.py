"""The Triton backend without a GPU: choices of way, shapes, exactness, self-test, lowering for
CUDA.

Its numbers beside those of other backends: test_matmul.py.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.kernels import packed as packed_backends
from atd.kernels import prefixes, settings
from atd.kernels.settings import Settings, Shape, Tiles
from atd.kernels.triton import geometry, ptx, trits
from atd.kernels.triton.backend import Triton, way_of
from atd.weights import Packed, PackedType, TernaryType
from atd.weights.layouts import LAYOUTS
from tests.kernels.matrices import activations, lowered, packed, unoptimized

DEVICES = ["NVIDIA H200", "NVIDIA A10", "NVIDIA L4"]


def interpreted(x, weight, settings=None):
    """In interpret mode, compiled in a hurry."""
    backend = Triton(interpret=True, settings=settings)
    return unoptimized(lambda x, w: backend.multiply(x, w))(x, weight)


def sixteen_bits(tokens: int, inputs: int):
    """Activations float32 that 16 bits hold."""
    return activations(tokens, inputs, jnp.bfloat16).astype(jnp.float32)


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(np.asarray(wanted)).max())


# --- ways and shapes --------------------------------------------------------------------------


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
    assert way_of(settings.choose("no such GPU", type, tokens), type, tokens) == way


WAYS = {
    "gemv": Settings(),
    "gemm": Settings(gemv_tokens=0),
    "decode": Settings(gemv_tokens=0, gemm_tokens=0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("bases", "group", "tied"),
    [
        (2, "row", True),
        pytest.param(2, 128, False, marks=pytest.mark.slow),
        pytest.param(3, 160, True, marks=pytest.mark.slow),
    ],
)
def test_all_ways_agree(way, bases, group, tied):
    weight, x = packed(40, 700, bases, group, tied), sixteen_bits(3, 700)
    table = weight.dequantize()
    if way != "gemv" and group != "row":  # where weights are rounded to 16 bits
        table = table.astype(jnp.bfloat16).astype(jnp.float32)
    assert_close(interpreted(x, weight, WAYS[way]), x @ table.T)


def test_decoding_goes_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(packed_backends, "CHUNK_BYTES", 0)  # as few rows as a block has
    weight, x = packed(28, 700, 1), sixteen_bits(3, 700)
    assert_close(interpreted(x, weight, WAYS["decode"]), x @ weight.dequantize().T)


SHAPES = [
    Settings(Shape(warps=4, row_warps=4, unroll=2)),
    Settings(Shape(warps=8, row_warps=2, row_blocks=2)),
    Settings(gemv_tokens=0, tiles=Tiles(16, 16, 16, 2, 1)),
    Settings(gemv_tokens=0, tiles=Tiles(128, 64, 64, 8, 3)),
]
MORE_SHAPES = [
    Settings(Shape(warps=1)),
    Settings(Shape(warps=4, row_warps=4, unroll=4)),
    Settings(Shape(warps=8, row_blocks=2)),
    Settings(Shape(warps=2, row_blocks=4, unroll=2)),
    Settings(Shape(warps=4, row_blocks=2, unroll=2)),
]


@pytest.mark.parametrize(
    ("bases", "shape"),
    [
        (1, SHAPES[0]),
        (1, SHAPES[2]),
        *(pytest.param(1, s, marks=pytest.mark.slow) for s in SHAPES[1::2] + MORE_SHAPES),
        *(pytest.param(2, shape, marks=pytest.mark.slow) for shape in SHAPES + MORE_SHAPES),
    ],
)
def test_shapes_of_tiles_change_nothing(bases, shape):
    weight, x = packed(75, 700, bases), sixteen_bits(5 if shape.gemv_tokens == 0 else 3, 700)
    assert_close(interpreted(x, weight, shape), x @ weight.dequantize().T)


@pytest.mark.exact
@pytest.mark.parametrize(
    ("layout", "inputs"),
    [
        ("aligned", 300),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("words", 300),
                ("interleaved", 300),
                ("aligned", 4096),
                ("interleaved", 4096),
            )
        ),
    ],
)
def test_stored_layouts_are_read(layout, inputs):
    x = activations(1, inputs)
    found, wanted = (
        interpreted(x, packed(20, inputs, layout=name)) for name in (layout, Triton.layout)
    )
    np.testing.assert_array_equal(found, wanted)


def test_a_row_too_short_for_all_the_groups_that_a_step_can_touch():
    """One step touches two groups of 100, later ones three: the padding must not count them
    otherwise."""
    weight, x = packed(20, 110, group=100), activations(1, 110)
    assert_close(interpreted(x, weight, Settings(Shape(warps=4))), x @ weight.dequantize().T)


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_kernels_find_words_where_tiles_have_them(bases):
    words, tiles = (
        np.asarray(packed(40, 1300, bases, layout=layout).codes) for layout in ("words", "tiles")
    )
    row, word = (jnp.asarray(i, jnp.int32) for i in np.indices(words.shape))
    at = geometry.word_at(row, word, bases, tiles.shape[1])
    np.testing.assert_array_equal(tiles.reshape(-1)[np.asarray(at)], words)


def test_sixteen_tokens_are_fixed_point_and_exact():
    """Integers of which the largest is the limit stay what they are, in columns of all bytes
    together and apart."""
    limit = prefixes.plan(2, True).limit
    type = PackedType(TernaryType((40, 700), 2, "row", True, "f16"), "tiles")
    random = np.random.default_rng(0)
    x = random.integers(-99, 100, (16, 700))
    x[:, 5] = limit
    values = random.integers(-1, 2, (40, 700, 2)).astype(np.int8)
    assert isinstance(type.ternary, TernaryType)
    scales = np.ones(type.ternary.scales_shape, np.float16)
    weight = Packed(jnp.asarray(LAYOUTS["tiles"].pack(values)), jnp.asarray(scales), type)
    wanted = x @ np.asarray(weight.dequantize()).astype(int).T
    settings = Settings(Shape(warps=4, row_warps=2, row_blocks=2))
    assert way_of(settings, type.ternary, 16) == "gemv"
    for tokens in (2, 16):
        found = interpreted(jnp.asarray(x[:tokens], jnp.float32), weight, settings)
        # Of 2^22: of float32 alone.
        np.testing.assert_allclose(found, wanted[:tokens], rtol=1e-6, atol=0.1)


def test_gates_that_end_within_a_group_of_rows_are_left_to_others():
    backend, weight, x = Triton(interpret=True), packed(48, 64, group=128), jnp.zeros((1, 64))
    assert backend.fuses(x, weight)
    assert not backend.fuses(x, weight, gated=True)


SELF_TESTED = [(1, True), (2, False), (3, True)]


@pytest.fixture
def in_a_hurry():
    """Compiles without optimisation what the test does not compile itself."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.parametrize(("bases", "tied"), SELF_TESTED)
def test_self_test_of_right_kernels_finds_little(bases, tied, in_a_hurry):
    """That it lets them pass is tested below."""
    assert Triton(interpret=True).largest_difference(bases, tied) < 1e-4


@pytest.mark.parametrize(
    ("bases", "tied"),
    [SELF_TESTED[0], *(pytest.param(*kind, marks=pytest.mark.slow) for kind in SELF_TESTED[1:])],
)
def test_self_test_sees_a_wrong_kernel(bases, tied, monkeypatch, in_a_hurry):
    backend, right = Triton(interpret=True), ptx.multiply_twin
    with monkeypatch.context() as patch:
        patch.setattr(ptx, "multiply_twin", lambda words, x, sums: right(words[::-1], x, sums))
        assert backend.largest_difference(bases, tied) > 0.1
    of_tiles = trits.twin
    monkeypatch.setattr(trits, "twin", lambda digits, number: of_tiles(digits, number) + 1)
    assert backend.largest_difference(bases, tied) > 0.1


@dataclass(frozen=True)
class Interpreted(Triton):
    interpret: bool = True


def test_the_self_test_runs_kernels_while_a_program_is_traced(in_a_hurry):
    """As on a GPU, where the first product of a model asks for it: nothing of that trace may reach
    its kernels."""

    @jax.jit
    def model(x):
        packed_backends.self_test(Interpreted, 1, True)
        return x

    assert model(1.0) == 1.0


# --- for CUDA ---------------------------------------------------------------------------------


KINDS = [(1, True), (3, True), (3, False), (4, True)]


@pytest.mark.parametrize(
    ("device", "bases", "tied"),
    [
        (DEVICES[0], 2, True),
        (DEVICES[0], 2, False),
        (DEVICES[1], 1, True),
        *(pytest.param(DEVICES[0], *kind, marks=pytest.mark.slow) for kind in KINDS),
        *(pytest.param(device, 2, True, marks=pytest.mark.slow) for device in DEVICES[1:]),
    ],
)
def test_lowers_for_cuda(device, bases, tied):
    few = 16 if tied or bases < 3 else 10  # three sums: beyond, tiles are faster
    for tokens, group, name in (
        (1, "row", "gemv"),
        (few, "row", "gemv"),
        (32, "row", "gemm"),
        (32, 128, "gemm"),
        (257, "row", "decode"),
    ):
        weight = packed(64, 640, bases, group, tied, layout="tiles")
        text = lowered(device, Triton().multiply, weight, tokens)
        assert f"ternary_{name}_n{bases}" in text
        assert "triton" in text


def test_the_fold_alone_lets_the_next_kernel_begin_and_on_hopper_alone():
    weight = packed(64, 640, layout="tiles")
    hopper, ampere = (lowered(device, Triton().multiply, weight, 1) for device in DEVICES[:2])
    assert hopper.count("griddepcontrol.launch_dependents") == 1
    assert "griddepcontrol" not in ampere


@pytest.mark.parametrize("tokens", [1, 32, 300])
def test_kernels_write_the_dtype_that_is_asked_for(tokens):
    """No kernel of XLA's for it."""
    weight = packed(64, 640, layout="tiles")
    text = lowered("NVIDIA H200", Triton().multiply, weight, tokens, jnp.bfloat16)
    assert not re.search(r"stablehlo.convert .*f32>\) -> tensor<.*bf16>", text)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_other_activations_lower_for_cuda(dtype):
    for tokens in (1, 16, 32, 300):
        lowered("NVIDIA H200", Triton().multiply, packed(50, 333), tokens, dtype)


def test_wide_rows_are_handed_over_as_they_lie():
    """No operation makes a copy of the codes: the kernel's operand is the argument, reshaped."""
    weight = packed(64, 4096, layout="tiles")
    text = lowered("NVIDIA H200", Triton().multiply, weight, 1)
    assert "tensor<4x26x2x128xui32>" in text
    assert not re.search(r"stablehlo\.(pad|concatenate|transpose|bitcast_convert).*ui32", text)
