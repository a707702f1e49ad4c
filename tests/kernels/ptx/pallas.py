"""Pallas-Triton kernels run as PTX on a machine without a GPU: compiled ahead of time, then
emulated."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from atd.kernels.tuning.aot import compile_for
from tests.kernels.ptx.emulator import POISON, run_ptx

PALLAS_CALL = pl.pallas_call


def emulated_pallas_call(device: str) -> Callable:
    """Returns what is to be put in the place of `pl.pallas_call`.

    It compiles each kernel for aot.DEVICES[device] and runs its PTX in the emulator, under jit as
    well. What a kernel does not write is poison.
    """

    def pallas_call(kernel: Callable, out_shape, **options) -> Callable:
        call = PALLAS_CALL(kernel, out_shape, **options)
        outputs, tree = jax.tree.flatten(out_shape)

        def emulate(*arguments):
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(jnp.asarray, arguments)]
            with ThreadPoolExecutor(1) as elsewhere:  # no mesh may be set where jit traces
                compiled = elsewhere.submit(compile_for, device, call, *shapes).result()

            def run(*inputs):
                results = [poisoned(x) for x in outputs]
                arrays = [np.ascontiguousarray(x) for x in inputs] + results
                run_ptx(compiled.ptx, compiled.grid, arrays, shared_bytes=compiled.shared_bytes)
                return jax.tree.unflatten(tree, results)

            return jax.pure_callback(run, out_shape, *arguments)

        return emulate

    return pallas_call


def poisoned(x: jax.ShapeDtypeStruct) -> np.ndarray:
    """Returns an array that nobody has written."""
    elements = np.full(x.shape, POISON, np.uint8).repeat(x.dtype.itemsize).view(x.dtype)
    return elements.reshape(x.shape)
