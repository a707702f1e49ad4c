"""Random matrices and activations for tests of GPU kernels, and compiling: for interpret mode, and for a GPU that is not here."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from atd.weights import Packed, PackedType, TernaryType
from atd.weights.layouts import LAYOUTS

# In interpret mode it is compiling that takes long.
unoptimized = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def packed(
    out, inputs, bases=2, group: int | str = "row", tied=True, layout="words", seed=0
) -> Packed:
    random = np.random.default_rng(seed)
    type = TernaryType((out, inputs), bases, group, tied, "f16")
    trits = random.integers(-1, 2, (out, inputs, bases)).astype(np.int8)
    scales = random.uniform(0.1, 1, type.scales_shape).astype(np.float16)
    return Packed(
        jnp.asarray(LAYOUTS[layout].pack(trits)), jnp.asarray(scales), PackedType(type, layout)
    )


def activations(tokens, inputs, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).standard_normal((tokens, inputs)), dtype)


def lowered(
    device: str, multiply: Callable, weight: Packed, tokens: int, dtype=jnp.bfloat16
) -> str:
    """multiply(x, weight) for a device such as "NVIDIA H200", as StableHLO."""
    return lowered_for(
        device, multiply, jax.ShapeDtypeStruct((tokens, weight.type.shape[1]), dtype), weight
    )


def lowered_for(device: str, function: Callable, *arguments) -> str:
    mesh = AbstractMesh(
        (), (), abstract_device=AbstractDevice(device_kind=device, num_cores=None, platform="gpu")
    )
    with use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
