"""The XLA backend: dense matrices of 16 bits, rows of tables, memory. Its numbers: test_matmul.py.

Of dense matrices of 16 bits a CPU keeps the activations in float32; a GPU multiplies in the
matrix's dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.kernels import matmul as kernels
from atd.kernels import xla
from atd.weights import Dense
from atd.weights.layouts import LAYOUTS
from tests.kernels.matrices import pack, ternary


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_on_a_gpu_it_is_one_product_of_16_bits_summed_in_float32(dtype, monkeypatch):
    random = np.random.default_rng(0)
    weight = Dense(jnp.asarray(random.standard_normal((48, 4096)), dtype))
    x = jnp.asarray(random.standard_normal((3, 4096)), jnp.float32)
    in_32_bits = xla.matmul(x, weight)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = str(jax.make_jaxpr(xla.matmul)(x, weight))
    assert text.count("dot_general") == 1
    assert "preferred_element_type=float32" in text
    y = xla.matmul(x, weight)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(
        y, xla.matmul(x.astype(dtype).astype(jnp.float32), weight), rtol=1e-4, atol=1e-3
    )
    assert 0 < jnp.abs(y - in_32_bits).max() < 1


def test_a_matrix_of_float32_keeps_all_bits_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = str(
        jax.make_jaxpr(xla.matmul)(jnp.zeros((1, 64)), Dense(jnp.zeros((8, 64), jnp.float32)))
    )
    assert "HIGHEST" in text


@pytest.mark.exact
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [32, "row", "tensor"])
def test_rows_of_packed_tables(layout, group):
    weight = ternary(20, 131, LAYOUTS[layout].only_bases or 2, group)
    rows = jnp.array([[3, 0, 19], [7, 7, 1]])
    taken = jax.jit(kernels.take_rows)(pack(weight, layout), rows)
    np.testing.assert_array_equal(taken, weight.dequantize()[rows])


@pytest.mark.exact
def test_rows_of_dense_and_ternary_tables():
    weight = ternary(20, 131)
    rows, dense = jnp.array([5, 2]), weight.dequantize()
    for table in (weight, Dense(dense)):
        np.testing.assert_array_equal(kernels.take_rows(table, rows), dense[rows])


def test_packed_weights_are_not_unpacked_whole():
    """No buffer of the compiled multiplication is as large as the dequantized matrix."""
    weight = pack(ternary(4096, 1024), "interleaved")
    compiled = jax.jit(kernels.matmul).lower(jnp.zeros((1, 1024)), weight).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4096 * 1024 * 4 * 0.8
