"""How tests of products run on every backend of `atd.kernels.matmul`, and how exact each must be.

TAKES says what each backend multiplies. Of the cases of each test those that it has are run.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.kernels import matmul as kernels
from atd.kernels import packed, prefixes, settings
from atd.kernels.cpu.backend import MAX_TOKENS as CPU_TOKENS
from atd.kernels.cpu.backend import parts_of
from atd.kernels.mosaic.backend import MAX_TOKENS
from atd.kernels.trellis import planes_type
from atd.kernels.triton.backend import Triton, way_of
from atd.kernels.tuning import aot
from atd.weights import Packed, TrellisType
from tests.kernels import matrices
from tests.kernels.matrices import pack, unoptimized

EPSILON = float(np.finfo(np.float32).eps)
OUT, INPUTS = 44, 323  # no multiple of a cell of any layout, nor of a group; a last tile of 12 rows


@dataclass(frozen=True)
class Takes:
    """What a backend multiplies.

    Attributes:
        groups: kinds of scales, of "tensor", "row" and "groups".
        dtypes: of activations.
    """

    layouts: tuple[str, ...]
    bases: tuple[int, ...]
    groups: tuple[str, ...]
    dtypes: tuple[str, ...]


TAKES = {
    "xla": Takes(
        layouts=("interleaved", "aligned", "words", "tiles", "bit-ttt", "hf-bitnet", "tq2_0"),
        bases=(1, 2, 3, 4, 5),
        groups=("tensor", "row", "groups"),
        dtypes=("float32", "bfloat16", "float16", "int32"),
    ),
    "triton": Takes(
        layouts=("interleaved", "aligned", "words", "tiles"),
        bases=(1, 2, 3, 4),
        groups=("tensor", "row", "groups"),
        dtypes=("float32", "bfloat16", "float16"),
    ),
    "cpu": Takes(
        layouts=("interleaved", "aligned", "words", "tiles"),
        bases=(1, 2, 3, 4),
        groups=("tensor", "row", "groups"),
        dtypes=("float32", "bfloat16", "float16"),
    ),
    "mosaic": Takes(
        layouts=("interleaved", "aligned", "words", "tiles"),
        bases=(1, 2, 3, 4),
        groups=("tensor", "row"),
        dtypes=("float32", "bfloat16", "float16"),
    ),
}


def refusal(backend: str, layout: str, bases: int, group: str | int, dtype: str) -> str | None:
    """Returns what TAKES says: None, or a part of the reason why the backend refuses."""
    takes, kind = TAKES[backend.split("-")[0]], "groups" if isinstance(group, int) else group
    if layout not in takes.layouts:
        return "it multiplies weights packed in layout"
    if bases not in takes.bases:
        return f"bases, not {bases}"
    if dtype not in takes.dtypes:
        return f"not {dtype}"
    return None if kind in takes.groups else "one scale per row"


# Kernels that run here, and those that jax's interpreter or the emulator of PTX runs.
ABSENT = {name: backend.device_refuses() for name, backend in kernels.PACKED.items()}
ABSENT["triton-ptx"] = aot.missing()
BACKENDS = ["xla", *(name for name, reason in ABSENT.items() if reason is None)]


class Emulated(Triton):
    """The Triton kernels compiled to PTX for an A10 and run by an emulator: needs the CUDA plugin,
    and no GPU."""

    def device_refuses(self):
        return None


def on_backends(names: str, cases: list, *, slow: list | tuple = (), fused=False, **fixed):
    """Parametrizes a test over the backends that run here and, of its cases, those that each takes.

    The cases give layout (None: the one that the backend reads as it lies), bases, group, tokens
    and others in the order of names; what they do not give is in fixed, or 2 bases and groups of
    128. slow: cases that run with -m slow. fused: only for backends that take more than a product.
    """
    keys = [key for key in names.split(", ") if key]
    params = []
    for name in BACKENDS:
        for case in (*cases, *slow):
            values = {"bases": 2, "group": 128, "layout": None} | fixed
            values |= dict(zip(keys, case, strict=True))
            layout = values["layout"] or own_layout(name)
            if refusal(name, layout, values["bases"], values["group"], "float32"):
                continue
            if fused and not (name.startswith("triton") or (name == "cpu" and one_scale(values))):
                continue
            if values["layout"] == own_layout(name):
                continue  # the same as None
            if values["layout"] and name != "xla":
                continue  # becomes the other layout in front of the kernel: test_packed.py
            if name == "triton-ptx" and values.get("tokens", 1) > 17:
                continue  # takes the emulator minutes
            marks = [pytest.mark.slow] if case in slow else []
            params.append(pytest.param(name, *case, marks=marks))
    return pytest.mark.parametrize(("backend", *keys), params, indirect=["backend"])


def one_scale(values: dict) -> bool:
    """Whether rows have one group of inputs."""
    return isinstance(values["group"], str)


def own_layout(backend: str) -> str:
    """Returns the layout that a backend reads as it lies."""
    layouts = {"xla": "interleaved", "triton": "tiles", "mosaic": "words", "cpu": "aligned"}
    return layouts[backend.split("-")[0]]


def compiled(backend: str, function):
    """Compiles as a whole, in the interpreters without optimisation."""
    return (unoptimized if "interpret" in backend else jax.jit)(function)


@functools.cache
def product_of(backend: str):
    """A function that is compiled once for each of the shapes and types that the tests have in
    common."""
    return compiled(backend, lambda x, w: kernels.matmul(x, w, backend=backend))


def product(backend: str, x, weight) -> np.ndarray:
    return np.asarray(product_of(backend)(jnp.asarray(x), jax.tree.map(jnp.asarray, weight)))


def activations(tokens: int, inputs: int = INPUTS, seed=1) -> np.ndarray:
    return np.asarray(matrices.activations(tokens, inputs, seed=seed))


def rounding_of_x(backend: str, x: np.ndarray, weight) -> np.ndarray:
    """How far a backend's activations may lie from x, which is float32, rounded weights counted in.

    Fixed point for few tokens on kernels, 16 bits for many.
    """
    if backend == "xla":
        return np.zeros_like(x)
    if backend == "cpu":
        bits = 14 if parts_of(weight.type.ternary) == 1 else 18  # of integers, at least
        few = len(x) <= CPU_TOKENS and weight.type.ternary.scales_shape[1] == 1
        return np.abs(x).max(axis=1, keepdims=True) * 2.0**-bits * np.full_like(x, few)
    type, tokens = weight.type.ternary, x.shape[0]
    if isinstance(type, TrellisType):
        type = planes_type(type)
    if "mosaic" in backend:
        few = tokens <= MAX_TOKENS
    else:
        chosen = settings.choose(packed.device_kind(), type, tokens)
        few = way_of(chosen, type, tokens) == "gemv"
    if few:
        limit = prefixes.plan(type.bases, type.tied).limit
        return np.maximum(2**-16 * np.abs(x), np.abs(x).max(axis=1, keepdims=True) / limit)
    return 2.1 * 2**-9 * np.abs(x)


def bound_of(backend: str, x: np.ndarray, weight, table: np.ndarray, ulps=16) -> np.ndarray:
    """The rounding of x and of a float32 sum: some ulps of sum |x w|, which is what is summed."""
    return (ulps * EPSILON * np.abs(x) + rounding_of_x(backend, x, weight)) @ np.abs(table).T


def check(backend: str, x: np.ndarray, weight, dense, terms=None):
    """Compares x times a weight with x times `dense`. `terms`: what is summed, where it is not x
    times `dense`."""
    y = product(backend, x, weight)
    wide, table = x.astype(np.float64), np.asarray(dense).astype(np.float64)
    summed = table if terms is None else np.asarray(terms).astype(np.float64)
    worst = (np.abs(y - wide @ table.T) / (bound_of(backend, wide, weight, summed) + 1e-37)).max()
    assert y.shape == (*x.shape[:-1], table.shape[0])
    assert worst < 1, f"error is {worst:.2g} times the bound"


def packed_for(backend: str, weight, layout: str | None = None) -> Packed:
    return pack(weight, layout or own_layout(backend))
