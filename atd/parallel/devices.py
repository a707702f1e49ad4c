"""The devices that one model runs on, as a mesh with the axes "data" and "model".

    model   devices that have shares of each weight and of the heads, caches included
            (`atd.parallel.partition`)
    data    devices that have the same weights, and sequences of their own

What runs is an ordinary function of one device, by `jax.shard_map`. Sequences are spread over the
data axis where its size divides their number, and run on all of its devices otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atd.errors import BadInput

DATA, MODEL = "data", "model"
WHOLE, SHARES = PartitionSpec(), PartitionSpec(MODEL)  # of weights; shares lie along axis 0
ROWS, CACHE = "rows", "cache"  # kinds of operands: [sequences, ...], [sequences, KV heads, ...]


@dataclass(frozen=True)
class Devices:
    """A mesh [data, model]."""

    mesh: Mesh

    @property
    def data(self) -> int:
        """How many devices have sequences of their own."""
        return self.mesh.shape[DATA]

    @property
    def model(self) -> int:
        """How many devices share the weights."""
        return self.mesh.shape[MODEL]

    def sharding(self, kind: str, rows: int) -> NamedSharding:
        """Returns where operands of this kind lie, of this many sequences."""
        return NamedSharding(self.mesh, self._spec(kind, rows))

    def _spec(self, kind: Any, rows: int) -> Any:
        """The PartitionSpec of a kind, or what it is already."""
        if kind not in (ROWS, CACHE):
            return kind
        first = DATA if rows % self.data == 0 else None
        return PartitionSpec(first, MODEL) if kind == CACHE else PartitionSpec(first)

    def over(self, function: Callable, kinds: Sequence[Any], results: Any) -> Callable:
        """Returns the function, run by each device on what it has of the operands.

        Args:
            function: of one device.
            kinds: of its operands: ROWS, CACHE, or a tree of PartitionSpecs. The second is of kind
                ROWS, and its first axis says how many sequences there are.
            results: kinds of what it returns, one or a tuple.
        """

        def run(*operands):
            rows = operands[1].shape[0]
            specs = tuple(self._spec(kind, rows) for kind in kinds)
            several = isinstance(results, tuple)
            out = tuple(self._spec(kind, rows) for kind in results) if several else results
            mapped = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=specs,
                out_specs=out if several else self._spec(results, rows),
                check_vma=False,  # kernels say nothing of how their results vary
            )
            return mapped(*operands)

        return run

    def placed(self, shares: Sequence[Any]) -> Any:
        """Returns a pytree of arrays on the devices: shares along axis 0, or one that all have.

        Args:
            shares: alike but for the values, one for each device of the model axis; or a single
                one.
        """
        spec = WHOLE if len(shares) == 1 else SHARES

        def place(*parts):
            rows, *rest = parts[0].shape

            def of_device(index: Any):  # slices, one per axis
                return parts[(index[0].start or 0) // rows]

            sharding = NamedSharding(self.mesh, spec)
            return jax.make_array_from_callback(
                (rows * len(parts), *rest), sharding, of_device, dtype=parts[0].dtype
            )

        return jax.tree.map(place, *shares)


def devices_of(mesh: Mesh) -> Devices:
    """Returns the devices of a user's mesh, in the order of its axes.

    Raises:
        BadInput: it has axes other than "data" and "model", or none.
    """
    names = tuple(mesh.axis_names)
    if not names or set(names) - {DATA, MODEL}:
        unknown = [repr(name) for name in names if name not in (DATA, MODEL)]
        raise BadInput(
            f"the mesh has {f'the axes {", ".join(unknown)}' if unknown else 'no axis'}; a model "
            f"runs on the axes {MODEL!r} (shares of its weights) and {DATA!r} (sequences)"
        )
    order = np.asarray(mesh.devices)
    if names == (MODEL, DATA):
        order = order.T
    shape = mesh.shape.get(DATA, 1), mesh.shape.get(MODEL, 1)
    return Devices(Mesh(order.reshape(shape), (DATA, MODEL)))


def make_mesh(tensor_parallel: int = 1, devices: int | None = None) -> Mesh | None:
    """Returns a mesh of the first devices of this process; None where one device is meant.

    Args:
        tensor_parallel: devices that share the weights.
        devices: all of them; None: as many as share the weights.

    Raises:
        BadInput: there are fewer devices, or one number does not divide the other.
    """
    count = tensor_parallel if devices is None else devices
    if count % tensor_parallel:
        raise BadInput(
            f"--devices {count} is no multiple of --tensor-parallel {tensor_parallel}: each "
            "sequence runs on that many devices"
        )
    here = process_devices()
    if count > len(here):
        kinds = ", ".join(sorted({device.device_kind for device in here}))
        raise BadInput(
            f"{count} devices were asked for, and this process has {len(here)} ({kinds})"
        )
    if count == 1:
        return None
    return Mesh(np.asarray(here[:count]).reshape(-1, tensor_parallel), (DATA, MODEL))


def process_devices() -> list[Any]:
    """Returns the devices of this process: those of the kind that jax computes on by default."""
    chosen = jax.config.jax_default_device
    return jax.local_devices(backend=None if chosen is None else chosen.platform)
