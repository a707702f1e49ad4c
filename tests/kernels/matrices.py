"""Random matrices and activations for tests of kernels, and compiling: for interpret mode, and for
a GPU that is not here."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from atd.weights import DTYPES, Packed, PackedType, Ternary, TernaryType, Trellis
from atd.weights.layouts import LAYOUTS

# In interpret mode it is compiling that takes long.
unoptimized = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def ternary(
    out, inputs, bases=2, group: int | str = 128, tied=False, dtype="f16", trits=None, scales=None
) -> Ternary:
    """Returns a matrix in numpy, random where nothing is given; a random part of the scales is
    zero."""
    random = np.random.default_rng(0)
    type = TernaryType((out, inputs), bases, group, tied, dtype)
    if trits is None:
        trits = random.integers(-1, 2, (out, inputs, bases))
    if scales is None:
        scales = random.uniform(0.01, 1, type.scales_shape)
        scales = scales * (random.random(type.scales_shape) > 0.05)
    trits = np.broadcast_to(trits, (out, inputs, bases)).astype(np.int8)
    return Ternary(trits, np.broadcast_to(scales, type.scales_shape).astype(DTYPES[dtype]), type)


def pack(weight: Ternary | Trellis, layout: str) -> Packed:
    codes = jnp.asarray(LAYOUTS[layout].pack(weight.trits))
    return Packed(codes, jnp.asarray(weight.scales), PackedType(weight.type, layout))


def packed(out, inputs, bases=2, group: int | str = "row", tied=True, layout="words") -> Packed:
    """Returns a random matrix in a layout, for jax."""
    return pack(ternary(out, inputs, bases, group, tied), layout)


def activations(tokens, inputs, dtype=jnp.float32, seed=1) -> jax.Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.standard_normal((tokens, inputs)), jnp.float32).astype(dtype)


def lowered(
    device: str, multiply: Callable, weight: Packed, tokens: int, dtype=jnp.bfloat16
) -> str:
    """Returns multiply(x, weight) for a device such as "NVIDIA H200", as StableHLO."""
    x = jax.ShapeDtypeStruct((tokens, weight.type.shape[1]), dtype)
    return lowered_for(device, multiply, x, weight)


def lowered_for(device: str, function: Callable, *arguments) -> str:
    described = AbstractDevice(device_kind=device, num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
