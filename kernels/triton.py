"""The Triton backend: packed matrices on NVIDIA GPUs of compute capability 8.0 or newer.

    few tokens      `triton_gemv`   int8 tensor cores on prefixes; a scale a row (or one for all)
    some, groups    `triton_gemm`   tiles decoded in registers
    many            decoded once into 16 bits, then XLA's own matrix product

How many is few, and the shapes of tiles: `tuning`. All results are deterministic: few tokens add integers, the others
add up in a fixed order. Scales, SwiGLU, residual sums and conversions that follow a product of few tokens are XLA's, one
loop over the outputs that it fuses by itself.
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atd.kernels import prefixes, triton_gemm, triton_gemv, tuning, xla
from atd.kernels.tuning import Settings
from atd.layout import LAYOUTS, words_of
from atd.weights import Packed, PackedType, Ternary, TernaryType, Weight

LEAST_CAPABILITY = (8, 0)
LAYOUT = "words"  # in which weights are read as they lie
READABLE = ("words", "aligned", "interleaved")  # the others are copied into it, each time


@dataclass(frozen=True)
class Triton:
    """A backend of `atd.kernels.matmul`. interpret: run on the CPU, by jax, with the twin of the assembly. settings: instead
    of those of `tuning`."""

    interpret: bool = False
    settings: Settings | None = None

    def supports(self, x: jax.Array, weight: Weight) -> str | None:
        """Why it cannot multiply these, or None."""
        return (None if self.interpret else device_refuses()) or refuses(x.dtype, weight.type)

    def matmul(self, x: jax.Array, weight: Weight) -> jax.Array:
        """x [M, in] times weight [out, in] -> [M, out] in x's dtype. Raises RuntimeError where the device's own results
        are not those of the XLA backend (`self_test`)."""
        assert isinstance(weight, Packed)
        if not self.interpret and jax.default_backend() == "gpu":
            self_test()
        return multiply(x, weight, self.settings, self.interpret)


def multiply(x: jax.Array, weight: Packed, settings: Settings | None = None, interpret: bool = False) -> jax.Array:
    """`Triton.matmul` without the self-test."""
    settings = settings or tuning.settings(device_kind(), weight.type.ternary, x.shape[0])
    held = prepare(weight)
    assert isinstance(held, Packed)
    words, scales, type = jnp.asarray(held.codes), jnp.asarray(held.scales), held.type.ternary
    match path(settings, type, x.shape[0]):
        case "gemv":
            y = _gemv(x, words, scales, type, settings, interpret)
        case "gemm":
            y = triton_gemm.matmul(x, words, scales, type, settings.tiles, interpret=interpret)
        case _:
            y = _decode_once(x, weight)
    return y.astype(x.dtype)


def refuses(dtype, type) -> str | None:
    """Why these kernels cannot multiply activations of a dtype by a weight of a type, or None."""
    if not isinstance(type, PackedType) or type.layout not in READABLE:
        return f"it multiplies weights packed in layout {', '.join(READABLE)}; repack, or use backend 'xla'"
    if type.ternary.bases > prefixes.MAX_BASES:
        return f"it multiplies up to {prefixes.MAX_BASES} bases, not {type.ternary.bases}; backend 'xla' multiplies any"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes activations in float32, bfloat16 or float16, not {dtype}"
    return None


def device_refuses() -> str | None:
    """Why this process's device cannot run them, or None."""
    device = jax.devices()[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return f"it needs an NVIDIA GPU and this process runs on {device.platform}; backend 'xla' runs there"
    capability = tuple(int(n) for n in str(device.compute_capability).split("."))
    if capability < LEAST_CAPABILITY:
        return (
            f"{device.device_kind} has compute capability {device.compute_capability} and Triton needs 8.0 (RTX 30xx, "
            "A10, A100 or newer); backend 'xla' runs there"
        )
    return None


def device_kind() -> str:
    """The device's name as in `tuning`: "NVIDIA H200"; "cpu" where there is no GPU."""
    return jax.devices()[0].device_kind


def path(settings: Settings, type: TernaryType, tokens: int) -> str:
    """Which way so many tokens go: gemv, gemm or decode."""
    if tokens <= settings.gemv_tokens and type.scales_shape[1] == 1:
        return "gemv"
    return "gemm" if tokens <= settings.gemm_tokens else "decode"


def prepare(weight: Weight) -> Weight:
    """The weight as the kernels read it where it lies, or as it is where they do not read it at all."""
    if refuses(jnp.dtype(jnp.float32), weight.type) or not isinstance(weight, Packed) or weight.type.layout == LAYOUT:
        return weight
    ternary = weight.type.ternary
    return Packed(words_of(weight.codes, ternary.shape[1], ternary.bases), weight.scales, PackedType(ternary, LAYOUT))


def _gemv(x, words, scales, type: TernaryType, settings: Settings, interpret: bool) -> jax.Array:
    plan = prefixes.plan(type.bases, type.tied)
    most = triton_gemv.MAX_COLUMNS // prefixes.columns(plan, 1)  # tokens of a call
    results = []
    for start in range(0, x.shape[0], most):
        coefficients, largest = prefixes.fold(plan, x[start : start + most], plan.steps(words.shape[1]))
        products = triton_gemv.products(
            plan, coefficients, words, warps=settings.warps, row_blocks=settings.row_blocks, interpret=interpret
        )
        results.append(prefixes.join(plan, products, coefficients.shape[0], largest))  # [M, sums, out]
    sums = jnp.concatenate(results)
    return jnp.einsum("mfo,of->mo", sums, scales[:, 0].astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _decode_once(x: jax.Array, weight: Packed) -> jax.Array:
    """x W^T in float32, W [out, in] decoded into x's 16 bits, or into two bfloat16 parts where x is float32."""
    dense = weight.dequantize(jnp.float32)
    if x.dtype != jnp.float32:
        return _product(x, dense.astype(x.dtype))
    (x_high, x_low), (high, low) = triton_gemm.split(x), triton_gemm.split(dense)
    return _product(x_high, high) + (_product(x_high, low) + _product(x_low, high))


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


@cache
def self_test() -> None:
    """Multiplies small matrices on this device and compares with XLA, once a process. Raises RuntimeError if they differ.

    The kernels rely on which thread holds which element, which Triton keeps but does not promise.
    """
    with jax.ensure_compile_time_eval():
        for bases in range(1, prefixes.MAX_BASES + 1):
            for tied in (True, False):
                if (worst := largest_difference(bases, tied)) > 1e-3:
                    raise RuntimeError(
                        f"backend 'triton' computes wrong results on {device_kind()} with jax {jax.__version__}: N = {bases}, "
                        f"{'tied' if tied else 'free'}, off by {worst:.1e} of the result's size; use backend 'xla'"
                    )


def largest_difference(bases: int, tied: bool, *, interpret: bool = False) -> float:
    """Between the gemv kernel and XLA, on random numbers, over the root mean square of XLA's result."""
    random = np.random.default_rng(0)
    ternary = TernaryType((80, 1000), bases, "row", tied, "f16")
    trits = random.integers(-1, 2, (*ternary.shape, bases)).astype(np.int8)
    scales = jnp.asarray(random.uniform(0.5, 1, ternary.scales_shape), jnp.float16)
    packed = Packed(jnp.asarray(LAYOUTS[LAYOUT].pack(trits)), scales, PackedType(ternary, LAYOUT))
    x = jnp.asarray(random.standard_normal((2, 1000)), jnp.float32)
    wanted = xla.matmul(x, Ternary(jnp.asarray(trits), scales, ternary))
    found = multiply(x, packed, Settings(gemv_tokens=2), interpret)
    return float(jnp.abs(found - wanted).max() / jnp.sqrt(jnp.mean(wanted**2)))
