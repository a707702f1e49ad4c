"""What the backends with kernels for packed weights share: what they take and in which layout, the ways to multiply that
are theirs only in part, and the self-test. No backend is imported here, and none imports another.
"""

import functools
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from atd.kernels import prefixes, xla
from atd.weights import Packed, PackedType, Ternary, TernaryType, Weight
from atd.weights.layouts import LAYOUTS, tiles_of, words_of, words_of_tiles

READABLE = (
    "tiles",
    "words",
    "aligned",
    "interleaved",
)  # one of which a backend reads as it lies; the others it copies


@dataclass(frozen=True)
class Backend:
    """A backend of `atd.kernels.matmul` that has kernels for packed weights; `matmul` and `device_refuses` are its own.

    interpret: run on the CPU, by jax, with twins of what its interpreter does not have.
    """

    interpret: bool = False
    layout = "words"  # in which weights are read as they lie

    def device_refuses(self) -> str | None:
        """Why it cannot run on this process's device, or None."""
        raise NotImplementedError

    def refuses(self, dtype, type) -> str | None:
        """Why it cannot multiply activations of a dtype by a weight of a type, on any device, or None."""
        return refuses(dtype, type)

    def supports(self, x: jax.Array, weight: Weight) -> str | None:
        """Why it cannot multiply these here, or None."""
        return self.device_refuses() or self.refuses(x.dtype, weight.type)

    def prepare(self, weight: Weight) -> Weight:
        """The weight as it is read where it lies, or as it is where it is not read at all."""
        return prepare(weight, self.layout)


def refuses(dtype, type) -> str | None:
    """Why such kernels cannot multiply activations of a dtype by a weight of a type, or None."""
    if not isinstance(type, PackedType) or type.layout not in READABLE:
        return f"it multiplies weights packed in layout {', '.join(READABLE)}; repack, or use backend 'xla'"
    if type.ternary.bases > prefixes.MAX_BASES:
        return f"it multiplies up to {prefixes.MAX_BASES} bases, not {type.ternary.bases}; backend 'xla' multiplies any"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes activations in float32, bfloat16 or float16, not {dtype}"
    return None


def capability_refuses(allows: Callable[[tuple[int, int]], bool], needs: str) -> str | None:
    """Why kernels that run where `allows` the compute capability cannot on this process's device, or None."""
    device = jax.devices()[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return f"it needs an NVIDIA GPU and this process runs on {device.platform}; backend 'xla' runs there"
    major, minor = (int(n) for n in str(device.compute_capability).split("."))
    if not allows((major, minor)):
        return (
            f"{device.device_kind} has compute capability {device.compute_capability} and {needs}"
        )
    return None


def device_kind() -> str:
    """The device's name as in `settings`: "NVIDIA H200"; "cpu" where there is no GPU."""
    return jax.devices()[0].device_kind


def prepare(weight: Weight, layout: str) -> Weight:
    """The weight in the layout in which it is read where it lies, or as it is where it is not read at all."""
    if (
        refuses(jnp.dtype(jnp.float32), weight.type)
        or not isinstance(weight, Packed)
        or weight.type.layout == layout
    ):
        return weight
    ternary, codes = weight.type.ternary, weight.codes
    match weight.type.layout:
        case "tiles":
            words = words_of_tiles(codes, ternary.shape[1], ternary.bases)[: ternary.shape[0]]
        case "words":
            words = codes
        case _:
            words = words_of(codes, ternary.shape[1], ternary.bases)
    return Packed(
        tiles_of(words, ternary.bases) if layout == "tiles" else words,
        weight.scales,
        PackedType(ternary, layout),
    )


# --- ways to multiply -------------------------------------------------------------------------------------------------


def by_prefixes(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    type: TernaryType,
    products: Callable[[jax.Array], jax.Array],
    most_columns: int,
) -> jax.Array:
    """x [M, in] times a matrix with a scale a row, or one for all -> float32 [M, out], by a kernel that multiplies prefixes:

    products(coefficients of `prefixes.fold`, of so few tokens that they have at most most_columns columns)
      -> int32 [columns, out].
    """
    plan = prefixes.plan(type.bases, type.tied)
    most = most_columns // prefixes.columns(plan, 1)  # tokens of a call
    results = []
    for start in range(0, x.shape[0], most):
        coefficients, largest = prefixes.fold(
            plan, x[start : start + most], plan.steps(words.shape[1])
        )
        found = products(coefficients)
        results.append(prefixes.join(plan, found, coefficients.shape[0], largest))  # [M, sums, out]
    return scaled(jnp.concatenate(results), scales)


def scaled(sums: jax.Array, scales: jax.Array) -> jax.Array:
    """sums float32 [M, sums, out] by scales [rows or 1, 1, sums] -> [M, out]. Products and sums that XLA fuses into what follows."""
    wide = scales[:, 0].astype(jnp.float32)  # [rows, sums]
    return functools.reduce(operator.add, [sums[:, f] * wide[:, f] for f in range(sums.shape[1])])


def can_be_exact(type: TernaryType) -> bool:
    """Whether a row is integers, which 16 bits hold, times one scale."""
    return type.tied and type.scales_shape[1] == 1


def decode_once(x: jax.Array, weight: Packed) -> jax.Array:
    """x W^T in float32, x and W [out, in] in x's 16 bits, bfloat16 where x is float32: as a dense model's products have them.

    Tied weights with a scale a row are decoded into integers, which 16 bits hold exactly.
    """
    ternary, scales = weight.type.ternary, jnp.asarray(weight.scales)
    integers = can_be_exact(ternary)
    held = replace(weight, scales=jnp.ones_like(scales)) if integers else weight
    narrow = x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
    y = xla.tensor_cores(narrow, jnp.asarray(held.dequantize(jnp.float32)).astype(narrow.dtype))
    return y * scales[:, 0, 0].astype(jnp.float32) if integers else y


# --- self-test --------------------------------------------------------------------------------------------------------


def self_test(
    backend: str, difference: Callable[[int, bool], float], bases: int, tied: bool
) -> None:
    """Raises RuntimeError where difference(bases, tied) is that of a kernel which computes something else.

    In a thread of its own, which knows nothing of the program that is being traced here: within that trace kernels cannot run.
    """
    with ThreadPoolExecutor(1) as apart:
        worst = apart.submit(difference, bases, tied).result()
    if not worst <= 1e-3:  # NaN as well
        raise RuntimeError(
            f"backend {backend!r} computes wrong results on {device_kind()} with jax {jax.__version__}: "
            f"N = {bases}, {'tied' if tied else 'free'}, off by {worst:.1e} of the result's size; use backend 'xla'"
        )


def largest_difference(
    multiply: Callable[[jax.Array, Packed], jax.Array], bases: int, tied: bool
) -> float:
    """Between a product of two tokens and XLA's, on random numbers, over the root mean square of XLA's result."""
    random = np.random.default_rng(0)
    ternary = TernaryType((80, 1000), bases, "row", tied, "f16")
    trits = random.integers(-1, 2, (*ternary.shape, bases)).astype(np.int8)
    scales = jnp.asarray(random.uniform(0.5, 1, ternary.scales_shape), jnp.float16)
    packed = Packed(
        jnp.asarray(LAYOUTS["aligned"].pack(trits)), scales, PackedType(ternary, "aligned")
    )
    x = jnp.asarray(random.standard_normal((2, 1000)), jnp.bfloat16).astype(
        jnp.float32
    )  # some ways take 16 bits
    wanted = jax.jit(xla.matmul)(x, Ternary(jnp.asarray(trits), scales, ternary))
    found = jax.jit(lambda x, packed: multiply(x, packed))(
        x, packed
    )  # a function of its own, so never one from a cache
    return float(jnp.abs(found - wanted).max() / jnp.sqrt(jnp.mean(wanted**2)))
