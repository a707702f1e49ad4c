"""Packs a matrix and multiplies by it, with jax and numpy alone: kernels_alone.py [ROWS INPUTS].

On an NVIDIA GPU the product runs on the Triton kernels, elsewhere on XLA.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from atd.kernels import matmul as kernels
from atd.weights import Packed, PackedType, TernaryType, bits_per_weight
from atd.weights.layouts import LAYOUTS

rows, inputs = map(int, sys.argv[1:] or (256, 640))
rng = np.random.default_rng(0)

# A weight: N = 2 bases, w = u (3 t_0 + t_1) with one scale u per row.
trits = rng.integers(-1, 2, (rows, inputs, 2), dtype=np.int8)
scales = rng.uniform(0.01, 0.02, (rows, 1, 1)).astype(np.float16)
type = PackedType(TernaryType((rows, inputs), 2, "row", True, "f16"), "aligned")
weight = Packed(LAYOUTS["aligned"].pack(trits), scales, type)
print(f"{type}: {bits_per_weight(type):.2f} bits per weight")

x = jnp.asarray(rng.standard_normal((1, inputs)), jnp.float32)
y = jax.jit(lambda x: kernels.matmul(x, weight))(x)
exact = np.asarray(x, np.float64) @ weight.dequantize(np.float64).T
print(
    f"largest error {abs(np.asarray(y) - exact).max():.1e} of values up to {abs(exact).max():.2f}"
)
