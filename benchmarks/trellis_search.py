"""Instructions per row of the kernel that searches trellis codes, compiled without a GPU, and the
time of a column that they allow.

    make gpu-check && JAX_PLATFORMS=cpu PYTHONPATH=. .venv-gpu-check/bin/python
    benchmarks/trellis_search.py [--device H200] [--rows 128]

The time is modelled, not measured: rows come one after the other, and each takes its instructions,
one per cycle and scheduler, LATENCY cycles in which costs go through the L1 and threads wait for
one another, and RETURN cycles on the way back. As long as segments are no more than
multiprocessors, their number does not matter.
"""

import argparse

import jax
import jax.numpy as jnp

from atd.decomposition.trellis import phases
from atd.decomposition.trellis_codes import TABLE
from atd.decomposition.trellis_kernel import best_way, name, warps
from atd.kernels.tuning import aot

SCHEDULERS = 4  # of a multiprocessor
LATENCY, RETURN = 100, 50  # cycles
CLOCK = {"H200": 1.75e9, "A10": 1.5e9}  # Hz under load


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=sorted(CLOCK), default="H200")
    parser.add_argument("--rows", type=int, default=128, help="rows per segment")
    arguments = parser.parse_args()
    device, clock = aot.DEVICES[arguments.device], CLOCK[arguments.device]
    print(f"{device.name}, jax {jax.__version__}: times are modelled, nothing has run\n")
    print("| N | kind | states | warps | instructions per row | registers | spills | µs |")
    print("|---|---|---|---|---|---|---|---|")
    for known in TABLE:
        steps = phases(known.code)
        rows = jax.ShapeDtypeStruct((-(-arguments.rows // len(steps)) * len(steps), 1), jnp.float32)
        compiled = aot.compile_for(
            arguments.device,
            lambda target, weight, seam, steps=steps: best_way(target, weight, seam, steps),
            *(rows, rows, jax.ShapeDtypeStruct((1,), jnp.int32)),
            kernel=name(steps),
        )
        loop = aot.main_loop_instructions(compiled.sass)
        instructions = loop.total() / loop["BAR.SYNC.DEFER_BLOCKING"]  # one barrier per row
        issued = instructions * -(-warps(steps) // SCHEDULERS)
        time = rows.shape[0] * (issued + LATENCY + RETURN) / clock
        row = [
            f"{known.bases:g}",
            known.kind,
            max(step.behind for step in steps),
            warps(steps),
            f"{instructions:.0f}",
            compiled.registers,
            compiled.spill_bytes,
            f"{1e6 * time:.0f}",
        ]
        print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
