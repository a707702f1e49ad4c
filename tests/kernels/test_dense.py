"""Dense matrices of 16 bits: a CPU keeps the activations in float32, a GPU multiplies in the matrix's dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.kernels import xla
from atd.weights import Dense


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
