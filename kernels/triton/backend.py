"""The Triton backend: packed matrices on NVIDIA GPUs of compute capability 8.0 or newer.

    few tokens      `triton_gemv`     int8 tensor cores on prefixes; fastest with one scale a row, for which scales wait to the end
    some            `triton_gemm`     tiles decoded in registers
    many            `triton_decode`   decoded once into 16 bits, then XLA's own matrix product

How many is few, and the shapes of tiles: `settings`. All results are deterministic: everything adds up in a fixed order. For
few tokens a product is two kernels: a norm is computed where the activations are folded, and SwiGLU or a residual where the
results are written.
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from atd.kernels import packed, prefixes
from atd.kernels import settings as tuning
from atd.kernels.packed import device_kind, prepare
from atd.kernels.settings import Settings
from atd.kernels.triton import decode as triton_decode
from atd.kernels.triton import fold as triton_fold
from atd.kernels.triton import gemm as triton_gemm
from atd.kernels.triton import gemv as triton_gemv
from atd.kernels.triton.fold import Norm
from atd.weights import Packed, TernaryType, Weight
from atd.weights.layouts import LAYOUTS

LEAST_CAPABILITY = (8, 0)
LAYOUT = "tiles"  # in which weights are read as they lie


@dataclass(frozen=True)
class Triton(packed.Backend):
    """A backend of `atd.kernels.matmul`. settings: instead of those of `settings`."""

    settings: Settings | None = None
    layout = LAYOUT

    def device_refuses(self) -> str | None:
        return None if self.interpret else device_refuses()

    def fuses(self, x: jax.Array, weight: Weight, gated: bool = False) -> bool:
        """Whether `matmul` takes a norm and a residual, or is gated, for these."""
        type = weight.type.ternary
        if gated and type.shape[0] % (2 * triton_gemv.ROWS):
            return False
        return path(self.settings or _tuned(x, type), type, x.shape[0]) == "gemv"

    def matmul(
        self,
        x: jax.Array,
        weight: Weight,
        norm: Norm | None = None,
        residual: jax.Array | None = None,
        gated: bool = False,
    ) -> jax.Array:
        """x [M, in] times weight [out, in] -> [M, out] in x's dtype. Raises RuntimeError where the device's own results
        are not those of the XLA backend (`self_test`). norm, residual [M, out], gated: see `gemv`; where it `fuses` alone."""
        assert isinstance(weight, Packed)
        if not self.interpret and jax.default_backend() == "gpu":
            self_test(weight.type.ternary.bases, weight.type.ternary.tied)
        return multiply(x, weight, self.settings, self.interpret, norm, residual, gated)


def multiply(
    x: jax.Array,
    weight: Packed,
    settings: Settings | None = None,
    interpret: bool = False,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
) -> jax.Array:
    """`Triton.matmul` without the self-test."""
    settings = settings or _tuned(x, weight.type.ternary)
    held = prepare(weight, LAYOUT)
    assert isinstance(held, Packed)
    codes, scales, type = jnp.asarray(held.codes), jnp.asarray(held.scales), held.type.ternary
    way = path(settings, type, x.shape[0])
    assert way == "gemv" or (norm is None and residual is None and not gated), "see `Triton.fuses`"
    if way == "gemv":
        return gemv(x, codes, scales, type, settings, interpret, norm, residual, gated)
    narrow = (
        x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
    )  # as a dense model's products have them
    if way == "gemm":
        return triton_gemm.matmul(
            narrow, codes, scales, type, settings.tiles, x.dtype, interpret=interpret
        )
    return triton_decode.matmul(narrow, codes, scales, type, x.dtype, interpret=interpret)


def _tuned(x: jax.Array, type: TernaryType) -> Settings:
    return tuning.settings(device_kind(), type, x.shape[0])


def device_refuses() -> str | None:
    """Why this process's device cannot run them, or None."""
    needs = "Triton needs 8.0 (RTX 30xx, A10, A100 or newer); backend 'xla' runs there"
    return packed.capability_refuses(lambda capability: capability >= LEAST_CAPABILITY, needs)


def path(settings: Settings, type: TernaryType, tokens: int) -> str:
    """Which way so many tokens go: gemv, gemm or decode."""
    if tokens <= settings.gemv_tokens and columns(type, 1).sets <= triton_gemv.MOST_SETS:
        return "gemv"
    return "gemm" if tokens <= settings.gemm_tokens else "decode"


def columns(type: TernaryType, tokens: int) -> triton_gemv.Columns:
    """Of the gemv kernel for so many tokens at once."""
    plan = prefixes.plan(type.bases, type.tied)
    return triton_gemv.columns(plan, tokens, steps(type), _group_size(type))


def steps(type: TernaryType) -> int:
    """Of the gemv kernel, that a row takes."""
    return LAYOUTS[LAYOUT].codes_shape(*type.shape, type.bases)[1]


def _group_size(type: TernaryType) -> int | None:
    """None: a scale a row, or one for all."""
    return type.group_size if type.scales_shape[1] > 1 else None


def gemv_name(type: TernaryType, tokens: int) -> str:
    """The kernel's name in traces and dumps, for so many tokens of one call."""
    return triton_gemv.name(prefixes.plan(type.bases, type.tied), columns(type, tokens))


def gemv(
    x,
    codes,
    scales,
    type: TernaryType,
    settings: Settings,
    interpret: bool,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
) -> jax.Array:
    """x [M, in], normed if so asked, times the matrix by `triton_gemv` -> [M, out] in x's dtype, plus the residual; or, of
    gate and up in one matrix, silu(gate) * up [M, out / 2]. As many tokens at a time as have columns."""
    plan, group_size = prefixes.plan(type.bases, type.tied), _group_size(type)
    shape = settings.gemv.paired() if gated else settings.gemv
    most = max(
        m for m in range(1, x.shape[0] + 1) if columns(type, m).sets <= triton_gemv.MOST_SETS
    )
    results = []
    for start in range(0, x.shape[0], most):
        part = x[start : start + most]
        held = columns(type, part.shape[0])
        folded = triton_fold.fold(
            plan, part, shape.padded(codes.shape[1]), held, group_size, norm, interpret=interpret
        )
        added = None if residual is None else residual[start : start + most]
        options = {"gated": gated, "shape": shape, "interpret": interpret}
        results.append(
            triton_gemv.multiply(
                plan,
                folded,
                codes,
                scales,
                type.shape[0],
                held,
                group_size,
                added,
                x.dtype,
                **options,
            )
        )
    return jnp.concatenate(results) if len(results) > 1 else results[0]


@cache
def self_test(bases: int, tied: bool) -> None:
    """Multiplies small matrices of N bases on this device and compares with XLA, once a process. Raises RuntimeError if they
    differ.

    The kernels rely on which thread holds which element, which Triton keeps but does not promise.
    """
    packed.self_test("triton", largest_difference, bases, tied)


def largest_difference(bases: int, tied: bool, *, interpret: bool = False) -> float:
    """Between the kernels of few and of some tokens and XLA: see `packed.largest_difference`."""
    ways = Settings(gemv_tokens=2), Settings(gemv_tokens=0, gemm_tokens=2)
    return max(
        packed.largest_difference(
            lambda x, weight, way=way: multiply(x, weight, way, interpret), bases, tied
        )
        for way in ways
    )
