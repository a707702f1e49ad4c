"""What the backends with kernels for packed weights share.

What they take and in which layout, the ways to multiply that are theirs only in part, and the
self-test. No backend is imported here, and none imports another.
"""

import functools
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from atd.errors import RunFailed
from atd.kernels import prefixes, xla
from atd.weights import Packed, PackedType, Ternary, TernaryType, TrellisType, Weight
from atd.weights.layouts import LAYOUTS, bytes_of, tiles_of, words_of, words_of_tiles

Part = tuple[jax.Array, int]  # values [B, 1, width], and the first feature of those that are meant

# A backend reads one of these layouts as it lies, and copies the others.
READABLE = ("tiles", "words", "aligned", "interleaved")
# Of weights that are decoded at a time: enough for the product, little beside a model.
CHUNK_BYTES = 128 << 20


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm in float32: x / sqrt(mean(x^2) + eps) * gain, of x [M, in] and gain [in]."""

    gain: jax.Array
    eps: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes it outside of any kernel."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=1, keepdims=True)
        return wide * jax.lax.rsqrt(mean_square + self.eps) * self.gain.astype(jnp.float32)


def rounded(x: jax.Array, over: str | None = None) -> jax.Array:
    """Returns x rounded to 8 bits per token, as BitNet's linears read it:

        clip(round(s x), -128, 127) / s,   s = 127 / max(max |x|, 1e-5)

    with the maximum over the last axis, and halves rounded to even. The gradient is that of x.

    Args:
        x: float [..., features].
        over: axis of a mesh whose devices have shares of the features.

    Source: transformers 5.24, `ActQuant` and `BitLinear.activation_quant`.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scale = 127 / jnp.maximum(jax.lax.pmax(largest, over) if over else largest, 1e-5)
    nearest = jnp.clip(jnp.round(wide * scale), -128, 127) / scale
    fixed = jax.lax.stop_gradient
    return fixed(nearest).astype(x.dtype) + (x - fixed(x))


@dataclass(frozen=True)
class Backend:
    """A backend of `atd.kernels.matmul` that has kernels for packed weights.

    A subclass brings `name`, the `layout` in which it reads weights as they lie, the GPUs that it
    `allows`, what it `needs` there, and `multiply`.

    Attributes:
        interpret: whether its kernels run on a CPU, in jax's interpreter, with twins of what that
            does not have.
        rounds: whether `multiply` takes int8, and then rounds activations as `rounded` does.
    """

    interpret: bool = False
    name = ""
    layout = "words"
    needs = ""
    rounds = False

    def allows(self, capability: tuple[int, int]) -> bool:
        """Returns whether the kernels run on a GPU of this compute capability, (8, 0) for 8.0."""
        raise NotImplementedError

    def multiply(self, x: jax.Array, weight: Packed) -> jax.Array:
        """Multiplies as `matmul` does, without a self-test."""
        raise NotImplementedError

    def fuses(self, x: jax.Array, weight: Weight, gated: bool = False) -> bool:
        """Returns whether `matmul` takes a norm and a residual, or is gated, for these."""
        return False

    def attend(
        self,
        q: Part,
        k: Part,
        v: Part,
        positions: jax.Array,
        cache: tuple[jax.Array, ...],
        frequencies: np.ndarray,
        heads: int,
        window: int,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]] | None:
        """Attends to one new token of each sequence in a kernel; None where there is none.

        `atd.models.ops.attention`, `rope` and `update_cache` define the result.

        Args:
            q, k, v: heads side by side, before rope; k and v of kv_heads.
            positions: of the new tokens, int32 [B, 1].
            cache: k and v [B, kv_heads, length, head_dim], which are written in place; of those
                that are codes int8 the scales of k and of v, float32 [B, kv_heads, length], too.
            frequencies: angles per position, float32 [head_dim / 2].
            heads: of queries.
            window: places that a token attends to, its own included; 0: all up to its own.

        Returns:
            ([B, 1, heads x head_dim] in q's dtype, the cache with the new k and v).
        """
        return None

    def matmul(self, x: jax.Array, weight: Weight, **fused) -> jax.Array:
        """Multiplies x [M, in] by weight [out, in] -> [M, out] in x's dtype.

        Args:
            fused: what else `multiply` of the backend takes.

        Raises:
            RunFailed: this device's results are not those of the XLA backend (`self_test`).
        """
        assert isinstance(weight, Packed)
        type = weight.type.ternary
        if not self.interpret and jax.default_backend() == "gpu":
            self_test(self.__class__, type.bases, isinstance(type, TernaryType) and type.tied)
        return self.multiply(x, weight, **fused)

    def device_refuses(self) -> str | None:
        """Returns why the kernels cannot run on this process's device, or None."""
        if self.interpret:
            return None
        device = jax.devices()[0]
        if device.platform != "gpu" or not hasattr(device, "compute_capability"):
            return (
                f"it needs an NVIDIA GPU and this process runs on {device.platform}; "
                "backend 'xla' runs there"
            )
        major, minor = (int(n) for n in str(device.compute_capability).split("."))
        if self.allows((major, minor)):
            return None
        capability = device.compute_capability
        return f"{device.device_kind} has compute capability {capability} and {self.needs}"

    def refuses(self, dtype, type) -> str | None:
        """Returns why a product with activations of a dtype is none of its, or None."""
        if not isinstance(type, PackedType) or type.layout not in READABLE:
            return (
                f"it multiplies weights packed in layout {', '.join(READABLE)}; repack, or use "
                "backend 'xla'"
            )
        coded = isinstance(type.ternary, TrellisType)
        most = prefixes.MAX_PLANES if coded else prefixes.MAX_BASES
        if type.ternary.bases > most:
            return (
                f"it multiplies up to {most} {'planes of a trellis code' if coded else 'bases'}, "
                f"not {type.ternary.bases}; backend 'xla' multiplies any"
            )
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"it takes activations in float32, bfloat16 or float16, not {dtype}"
        return None

    def supports(self, x: jax.Array, weight: Weight) -> str | None:
        """Returns why x cannot be multiplied by the weight here, or None."""
        return self.device_refuses() or self.refuses(x.dtype, weight.type)

    def prepare(self, weight: Weight) -> Weight:
        """Returns the weight in `layout`, or as it is where the backend does not take it."""
        if self.refuses(jnp.dtype(jnp.float32), weight.type) or not isinstance(weight, Packed):
            return weight
        return prepare(weight, self.layout)

    def largest_difference(self, bases: int, tied: bool) -> float:
        """Returns the difference from XLA of a small product: the function of this name."""
        return largest_difference(self.multiply, bases, tied)


def device_kind() -> str:
    """Returns the device's name as in `settings`: "NVIDIA H200"; "cpu" where there is no GPU."""
    return jax.devices()[0].device_kind


def prepare(weight: Packed, layout: str) -> Packed:
    """Returns a weight in one of the READABLE layouts as one in `words` or `tiles`, or in bytes.

    Those lie as the bytes of `aligned` do, in rows that may be padded to whole 16 bytes or not.
    """
    if weight.type.layout == layout or {weight.type.layout, layout} == {"interleaved", "aligned"}:
        return weight
    ternary, codes = weight.type.ternary, weight.codes
    match weight.type.layout:
        case "tiles":
            words = words_of_tiles(codes, *ternary.trits_shape)
        case "words":
            words = codes
        case _:
            words = words_of(codes, ternary.shape[1], ternary.bases)
    match layout:
        case "tiles":
            codes = tiles_of(words, ternary.bases)
        case "aligned":
            codes = bytes_of(words, ternary.bases)
        case _:
            codes = words
    return Packed(codes, weight.scales, PackedType(ternary, layout))


# --- ways to multiply -------------------------------------------------------------------------


def by_prefixes(
    x: jax.Array,
    plan: prefixes.Plan,
    row_words: int,
    products: Callable[[jax.Array], jax.Array],
    most_columns: int,
) -> jax.Array:
    """Multiplies x [M, in] by the bases of a matrix, without their scales.

    Args:
        plan: of the weights.
        row_words: 32-bit words of a row, in layout `words`.
        products: coefficients of `prefixes.fold` -> int32 [columns, out], of so few tokens that
            they have at most
            most_columns columns.

    Returns:
        float32 [M, sums, out]: one sum of tied weights, one per base of free ones.
    """
    most = most_columns // prefixes.columns(plan, 1)  # tokens of a call
    results = []
    for start in range(0, x.shape[0], most):
        part, steps = x[start : start + most], plan.steps(row_words)
        coefficients, largest = prefixes.fold(plan, part, steps)
        found = products(coefficients)
        results.append(prefixes.join(plan, found, coefficients.shape[0], largest))
    return jnp.concatenate(results)


def scaled(sums: jax.Array, scales: jax.Array) -> jax.Array:
    """Adds the products of the bases, each by its scales.

    Args:
        sums: float32 [M, sums, out].
        scales: [out or 1, 1, sums].

    Returns:
        float32 [M, out].
    """
    wide = scales[:, 0].astype(jnp.float32)
    return functools.reduce(operator.add, [sums[:, f] * wide[:, f] for f in range(sums.shape[1])])


def can_be_exact(type: TernaryType) -> bool:
    """Returns whether each row is integers, which 16 bits hold, times one scale."""
    return type.tied and type.scales_shape[1] == 1


def narrowed(x: jax.Array) -> jax.Array:
    """Returns activations in 16 bits, as a dense model has them: float32 becomes bfloat16."""
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


def decode_once(x: jax.Array, weight: Packed) -> jax.Array:
    """Multiplies x [M, in] by weight [out, in] in x's 16 bits -> float32 [M, out].

    As a dense model does; in bfloat16 where x is float32. Tied weights with one scale per row are
    decoded into integers, which 16 bits hold exactly.
    """
    ternary, scales = weight.type.ternary, jnp.asarray(weight.scales)
    integers = isinstance(ternary, TernaryType) and can_be_exact(ternary)
    held = replace(weight, scales=jnp.ones_like(scales)) if integers else weight
    narrow = narrowed(x)
    y = xla.tensor_cores(narrow, jnp.asarray(held.dequantize(jnp.float32)).astype(narrow.dtype))
    return y * scales[:, 0, 0].astype(jnp.float32) if integers else y


# --- self-test --------------------------------------------------------------------------------


@functools.cache
def self_test(kind: type[Backend], bases: int, tied: bool) -> None:
    """Multiplies small matrices of N bases on this device and compares with XLA, once per process.

    The kernels rely on which thread holds which element, which their compilers keep but do not
    promise. The comparison runs in a thread of its own, which knows nothing of the program that is
    being traced here: within that trace kernels cannot run.

    Raises:
        RunFailed: the results are not those of XLA.
    """
    backend = kind()
    with ThreadPoolExecutor(1) as apart:
        worst = apart.submit(backend.largest_difference, bases, tied).result()
    if not worst <= 1e-3:  # NaN as well
        raise RunFailed(
            f"backend {backend.name!r} computes wrong results on {device_kind()} with jax "
            f"{jax.__version__}: N = {bases}, {'tied' if tied else 'free'}, off by {worst:.1e} of "
            "the result's size; use backend 'xla'"
        )


def largest_difference(
    multiply: Callable[[jax.Array, Packed], jax.Array], bases: int, tied: bool
) -> float:
    """Returns the largest difference of a product of two tokens, on random numbers, from XLA's.

    In units of the root mean square of XLA's result.
    """
    random = np.random.default_rng(0)
    ternary = TernaryType((80, 1000), bases, "row", tied, "f16")
    trits = random.integers(-1, 2, (*ternary.shape, bases)).astype(np.int8)
    scales = jnp.asarray(random.uniform(0.5, 1, ternary.scales_shape), jnp.float16)
    codes = jnp.asarray(LAYOUTS["aligned"].pack(trits))
    packed = Packed(codes, scales, PackedType(ternary, "aligned"))
    x = random.standard_normal((2, 1000))
    x = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)  # some ways take 16 bits
    wanted = jax.jit(xla.matmul)(x, Ternary(jnp.asarray(trits), scales, ternary))
    # A function of its own, so never one from a cache.
    found = jax.jit(lambda x, packed: multiply(x, packed))(x, packed)
    return float(jnp.abs(found - wanted).max() / jnp.sqrt(jnp.mean(wanted**2)))
