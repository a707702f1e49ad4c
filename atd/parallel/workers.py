"""Spreads tasks over the devices of a conversion, those of all its processes.

A task is a function that one device runs, as it would if it were the only one: programs and shapes
are the same for any number of devices, and results come back in the order of the tasks. So the
bytes of a conversion are those that one device makes, on devices of one kind.

Which devices these are is set around the work, as `jax.default_device` is:

    with working(mesh):
        results = spread(task, items)
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from atd.errors import AtdError, BadInput
from atd.parallel.devices import MODEL, devices_of
from atd.parallel.hosts import hosts, in_turns


@dataclass(frozen=True)
class Workers:
    """Devices that take tasks; none of them named: the one that jax computes on by default."""

    devices: tuple[Any, ...] = ()

    @property
    def count(self) -> int:
        """How many devices there are in this process."""
        return max(1, len(self.devices))

    @property
    def of_all(self) -> int:
        """How many devices there are in all processes."""
        return self.count * hosts().count


_current: ContextVar[Workers | None] = ContextVar("workers", default=None)
_task = threading.local()  # .device: that of the task which this thread runs


def workers() -> Workers:
    """Returns the devices that tasks are spread over here."""
    return _current.get() or Workers()


@contextmanager
def working(mesh: Mesh | None) -> Iterator[None]:
    """Spreads tasks over the devices of a mesh while it is open.

    Args:
        mesh: devices of this process, with the axis "data"; None: the default one.

    Raises:
        BadInput: as `check_mesh` does.
    """
    token = _current.set(Workers(check_mesh(mesh)))
    try:
        yield
    finally:
        _current.reset(token)


def check_mesh(mesh: Mesh | None) -> tuple[Any, ...]:
    """Returns the devices of a mesh, each of which does what a device alone does.

    Raises:
        BadInput: the mesh has another axis than "data", or several devices share a model.
    """
    if mesh is None:
        return ()
    devices = devices_of(mesh)
    if devices.model > 1:
        raise BadInput(
            f"the axis {MODEL!r} of the mesh has {devices.model} devices; each device of a "
            "conversion works by itself: give a mesh with the axis 'data' alone"
        )
    return tuple(devices.mesh.devices.flat)


Arrays = tuple[np.ndarray, ...]


def spread[T](task: Callable[[T], Arrays], items: Sequence[T]) -> Iterator[Arrays]:
    """Runs a task on each item, in the processes and on their devices in turn; yields the results
    in order.
    """
    here = hosts()
    if here.count == 1:
        yield from spread_here(task, items)
    else:
        yield from together(task, items[here.process_id :: here.count])


def together[T](task: Callable[[T], Arrays], items: Sequence[T]) -> list[Arrays]:
    """Runs a task on each of this process's items, and returns the results of all processes.

    All have to call it. The items of a process are each `hosts().count`-th of the work's.
    """
    try:
        results, error = [*spread_here(task, items)], None
    except AtdError as raised:
        results, error = [], raised
    return in_turns(results, error)


def spread_here[T, R](task: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Runs a task on each item, on the devices of this process in turn, and yields the results in
    order.

    A device of a CPU takes as many at a time as there are cores.
    """
    devices = workers().devices

    def on_device(i: int, item: T) -> R:
        if not devices:
            return task(item)
        _task.device = devices[i % len(devices)]
        with jax.default_device(_task.device):
            return task(item)

    if len(items) < 2 and not devices:
        yield from map(task, items)
        return
    with ThreadPoolExecutor(max(os.cpu_count() or 1, len(devices))) as threads:
        yield from threads.map(on_device, range(len(items)), items)


def on_each_device[T](operands: T) -> Callable[[], T]:
    """Returns a function that tasks call for a pytree of arrays on their own device.

    A device gets its copy when its first task asks.
    """
    if not workers().devices:
        return lambda: operands
    copies: dict[Any, T] = {}
    lock = threading.Lock()

    def here() -> T:
        with lock:
            if _task.device not in copies:
                copies[_task.device] = jax.device_put(operands, _task.device)
            return copies[_task.device]

    return here
