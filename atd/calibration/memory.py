"""Says what memory a calibrated conversion takes, before it begins.

Of each unit there are its weights, dense and as they become, a batch of its values, and what error
feedback needs next to them for the widest input of n features: second moments, their factor, the
matrices of its sweeps, each [n, n]. The values of the calibration text get what is left
(`atd.calibration.room`).
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import jax

from atd.calibration.room import STREAM
from atd.calibration.streams import BATCH
from atd.errors import BadInput
from atd.ir import Graph

PROCESS = 0.5e9  # Python, jax and compiled programs
WEIGHTS = 3  # float32 copies of a unit's weights: of the dense stream, the quantized one, to write
SQUARES = 8  # matrices float32 [n, n] that exist at a time: 5 to 6 were measured
COPIES = 3  # of these, those that each further device has: its factor, H and the descent's
VALUES = 2  # times what linears put out: all values of a batch in a unit
SHARE = 0.75  # of the memory that is available, where no limit is given


@dataclass(frozen=True)
class Memory:
    """Bytes that a calibrated conversion takes at its peak."""

    work: int  # however much text there is: weights, second moments, a batch of values
    streams: int  # the residual streams of both models; where there is no room they are in files
    inner: int  # what is read again inside a unit; where there is no room it is computed again
    device: int  # of the work, what lies on a device that has memory of its own, at a time

    def left(self, limit: float) -> float:
        """Returns the bytes that are left for values under a limit.

        Raises:
            BadInput: the limit is below what the work takes.
        """
        if limit < self.work:
            raise BadInput(
                f"{limit / 1e9:.1f} GB of memory are too little: weights, second "
                f"moments and a batch of values take {self.work / 1e9:.1f} GB (--memory)"
            )
        return limit - self.work

    def check_device(self) -> None:
        """Raises BadInput where the work does not fit into a device's own memory."""
        there = device_memory()
        if there is not None and there < self.device:
            raise BadInput(
                f"the work on a unit takes {self.device / 1e9:.1f} GB of a device, and jax may "
                f"have {there / 1e9:.1f} GB there: raise XLA_PYTHON_CLIENT_MEM_FRACTION, shorten "
                "the windows (calibration_context), or set JAX_PLATFORMS=cpu"
            )

    def under(self, limit: float) -> str:
        """Returns a line for people: what is taken, and what finds no room under the limit."""
        left = limit - self.work
        own = "" if device_memory() is None else f", {self.device / 1e9:.1f} GB on each device"
        parts = [f"{self.work / 1e9:.1f} GB for the work on a unit{own}"]
        for bytes, what, elsewhere in (
            (self.streams, "for the residual streams", "in files"),
            (self.inner, "for values inside a unit", "computed again"),
        ):
            place = "" if bytes <= left else f", {elsewhere} where there is no room"
            parts.append(f"{bytes / 1e9:.1f} GB {what}{place}")
            left -= bytes
        return f"memory: {'; '.join(parts)}"


def memory(graph: Graph, tokens: int, context: int, devices: int = 1) -> Memory:
    """Returns what calibration on this many tokens of text takes.

    Args:
        graph: the model.
        tokens: of all windows.
        context: tokens per window.
        devices: that batches and rows are spread over. Each beyond the first has a batch, weights
            and matrices of its own, as devices of a CPU have them in the same memory.
    """
    work, device, inner, batch = 0, 0, 0, min(tokens, max(BATCH, context))
    for unit in graph.units:
        linears = [n for n in unit.nodes if n.op == "linear" and "weight" in n.weights]
        outputs = sum(node.weights["weight"].type.shape[0] for node in linears)
        widths = {n.inputs[0]: n.weights["weight"].type.shape[1] for n in linears}
        refs = (ref for node in unit.nodes for ref in node.weights.values())
        weights, widest = sum(prod(ref.type.shape) for ref in refs), max(widths.values(), default=0)
        heads = max((n.attrs["heads"] for n in unit.nodes if n.op == "attention"), default=0)
        values = batch * (VALUES * outputs + heads * context)  # with the scores of attention
        each = weights + COPIES * widest**2 + values
        work = max(work, WEIGHTS * weights + SQUARES * widest**2 + values + (devices - 1) * each)
        device = max(device, each + weights)  # of both streams
        inner = max(inner, sum(widths.values()))
    width = graph.prologue.nodes[0].weights["weight"].type.shape[1]
    streams = 2 * STREAM.itemsize * tokens * width
    return Memory(int(PROCESS + 4 * work), streams, 2 * 4 * tokens * inner, 4 * device)


def device_memory() -> int | None:
    """Returns the bytes that jax may take of a device of this process; None on a CPU, whose devices
    are in the host's memory.
    """
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return None if stats is None else stats.get("bytes_limit")


def available() -> float:
    """Returns the bytes that programs can still have; without a limit where the system does not
    say.
    """
    lines = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").is_file() else ""
    found = [line.split()[1] for line in lines.splitlines() if line.startswith("MemAvailable:")]
    return 1024.0 * int(found[0]) if found else float("inf")
