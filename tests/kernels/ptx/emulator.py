"""Runs the PTX of a kernel on a CPU: all threads of many blocks in step, each register a numpy
array [blocks, threads].

What compilers make of Pallas-Triton kernels, not all of PTX: an instruction that is not known here
raises with its line, and so does an access outside of an array or not aligned. All threads of a
block must branch the same way; blocks may part. Threads run in step, so a missing barrier goes
unnoticed; what nobody wrote is poison.

Parts: text.py reads, machine.py holds registers and memory, arithmetic.py and memory.py are the
opcodes. pallas.py runs Pallas kernels this way.
"""

from collections.abc import Sequence

import numpy as np

import tests.kernels.ptx.arithmetic
import tests.kernels.ptx.memory  # noqa: F401 -- they enter their opcodes
from tests.kernels.ptx.machine import POISON, Blocks, Machine
from tests.kernels.ptx.text import EmulationError, Parser

__all__ = ["POISON", "EmulationError", "run_ptx"]
THREADS_AT_A_TIME = 1 << 15


def run_ptx(
    ptx: str,
    grid: Sequence[int],
    arrays: Sequence[np.ndarray],
    *,
    kernel: str | None = None,
    shared_bytes: int = 48 << 10,
) -> None:
    """Launches a kernel.

    Args:
        ptx: with the kernel.
        grid: of blocks.
        arrays: the kernel's parameters in order, inputs and outputs, which are written in place.
        kernel: its name, where there is more than one.
        shared_bytes: what the launch adds to the shared memory that the PTX declares.
    """
    program = Parser(ptx, kernel).program
    if len(arrays) != len(program.parameters):
        raise EmulationError(
            f"{program.name} has {len(program.parameters)} parameters, not {len(arrays)}"
        )
    if any(not array.flags.c_contiguous for array in arrays):
        raise EmulationError("arrays must be contiguous")
    memory = [array.reshape(-1).view(np.uint8) for array in arrays]
    sizes = (*grid, 1, 1)[:3]
    indices = np.array(
        [(x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])],
        np.uint32,
    )
    at_a_time = max(1, THREADS_AT_A_TIME // program.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(indices), at_a_time):
            some = indices[first : first + at_a_time]
            shared = np.full(
                (len(some), program.declared_shared_bytes + -(-shared_bytes // 16) * 16),
                POISON,
                np.uint8,
            )
            waiting = [Blocks(some, 0, {}, shared)]
            while waiting:
                waiting += Machine(program, memory, sizes, waiting.pop()).run()
