"""How weights lie in memory: as the backend that multiplies by them wants them."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from atd.errors import BadInput
from atd.ir import Graph, WeightRef
from atd.kernels.matmul import PACKED
from atd.models.ops import Weights
from atd.parallel.cuts import Cut, shares
from atd.parallel.devices import Devices
from atd.parallel.partition import Partition
from atd.progress import Progress, Report
from atd.weights import Dense, DenseType, Weight, WeightType
from atd.weights.values import shapes_of

BACKENDS = ("auto", "xla", "xla-unpacked", *PACKED)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def backend_here(graph: Graph) -> str:
    """Returns what `auto` stands for on this device, for the weights of a graph."""
    if jax.default_backend() == "cpu":
        packed = any(_takes("cpu", ref.type) for _, ref in graph.weights())
        return "cpu" if packed and not PACKED["cpu"].device_refuses() else "xla-unpacked"
    return "xla" if PACKED["triton"].device_refuses() else "triton"


def _takes(backend: str, type: WeightType) -> bool:
    """Whether a backend multiplies by a packed weight of this type."""
    return not PACKED[backend].refuses(jnp.dtype(jnp.float32), type)


def use_device(name: str) -> None:
    """Has jax compute on a device of this process from now on.

    To be called before anything is computed. The environment variable JAX_PLATFORMS no longer
    counts.

    Args:
        name: a platform (cpu, gpu, cuda, rocm, tpu), or one of its devices as platform:number.

    Raises:
        BadInput: there is no such device; says which there are.
    """
    platform, _, number = name.partition(":")
    jax.config.update("jax_platforms", "cpu" if platform == "cpu" else None)
    try:
        devices = {str(i): device for i, device in enumerate(jax.devices(platform or "none"))}
        jax.config.update("jax_default_device", devices[number or "0"])
    except (RuntimeError, KeyError):
        here = [device for p in {jax.default_backend(), "cpu"} for device in jax.devices(p)]
        names = sorted(f"{device.platform}:{device.id} ({device.device_kind})" for device in here)
        raise BadInput(f"there is no device {name!r} here; there is {', '.join(names)}") from None


def check_backend(graph: Graph, backend: str) -> None:
    """Raises BadInput, with all reasons, where a backend takes neither the device nor a weight."""
    if backend not in PACKED:
        return
    if reason := PACKED[backend].device_refuses():
        raise BadInput(f"backend {backend}: {reason}")
    refused: dict[str, list[str]] = {}
    for name, ref in graph.weights():
        reason = PACKED[backend].refuses(jnp.dtype(jnp.float32), ref.type)
        if reason and not isinstance(ref.type, DenseType):
            refused.setdefault(reason, []).append(name)
    if refused:
        told = [
            f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
            for reason, names in refused.items()
        ]
        raise BadInput(f"backend {backend}: {'; '.join(told)}")


def placed_weights(
    graph: Graph,
    backend: str,
    dtype: str,
    progress: Report,
    shapes: bool = False,
    partition: Partition | None = None,
    devices: Devices | None = None,
) -> Iterator[Weights]:
    """Yields the weights of each unit on the device, read one tensor at a time.

    Args:
        backend: one of BACKENDS but `auto`: which weights stay packed, and in which layout.
        dtype: of dense matrices, a key of DTYPES; gains and biases are float32.
        progress: hears of each tensor.
        shapes: whether to yield shapes in place of arrays, and read nothing.
        partition: how weights are cut for several devices.
        devices: these; the shares of a weight lie one after another along axis 0, and its type is
            that of a share.
    """
    placed = partial(_place, backend=backend, dtype=DTYPES[dtype])

    def place(ref: WeightRef, cut: Cut | None) -> Weight:
        if shapes:
            return jax.eval_shape(placed, shapes_of(ref.type))
        if devices is None:
            return placed(ref.load())
        whole = ref.load()
        parts = [whole] if cut is None else shares(whole, cut, devices.model)
        return devices.placed([placed(part) for part in parts])

    cuts = partition.cuts if partition else [{}] * len(graph.units)
    done, total = 0, sum(len(node.weights) for _, node in graph.nodes())
    for block, cuts_here in zip(graph.units, cuts, strict=True):
        weights: Weights = {}
        for node in filter(lambda node: node.weights, block.nodes):
            slots = weights[node.name] = {}
            for slot, ref in sorted(node.weights.items()):
                slots[slot] = place(ref, cuts_here.get(node.name))
                done += 1
                progress(Progress("loading", done, total, "tensors"))
        yield weights


def _place(value: Weight, backend: str, dtype) -> Weight:
    if backend in PACKED:
        value = PACKED[backend].prepare(value)
    weight = jax.tree.map(jnp.asarray, value)
    dtype = jnp.float32 if len(weight.type.shape) < 2 else dtype
    array = value.array if isinstance(value, Dense) else None
    if isinstance(array, jax.Array) and array.dtype == dtype:
        return value  # made on the device, and needs no copy
    if (
        isinstance(weight.type, DenseType)
        or backend == "xla-unpacked"
        or (backend == "cpu" and not _takes(backend, weight.type))  # `auto`: XLA would be slow
    ):
        # Waited for, or tensors that are read faster than they are dequantized would pile up.
        return Dense(jax.block_until_ready(_dequantize(weight, dtype)))
    return weight


@partial(jax.jit, static_argnames="dtype")
def _dequantize(weight: Weight, dtype) -> jax.Array:
    return jnp.asarray(weight.dequantize(dtype))
