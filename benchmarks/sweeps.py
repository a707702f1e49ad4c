"""What a sweep over the columns of a matrix takes on a GPU, without one: kernels that are launched,
and a model of the time.

    make gpu-check && JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false PYTHONPATH=.
    .venv-gpu-check/bin/python benchmarks/sweeps.py [--codes]

Kernels are counted in programs compiled for an H200: column by column, and with one kernel for a
block of columns. The time is modelled, nothing has run: LAUNCH seconds for each kernel, and for
those that take longer the instructions of their warps (one per cycle and scheduler) and latencies.
Matrix products are those of all columns with each other, at the float32 peak.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp

from atd.decomposition import error_feedback, level_walks, trellis_feedback, trellis_walks
from atd.decomposition.sweeps import BLOCK
from atd.decomposition.trellis import SEAM_ROWS, phases
from atd.decomposition.trellis_codes import TABLE, known_code
from atd.decomposition.trellis_kernel import best_way, warps
from atd.decomposition.walk_kernel import AT_A_TIME
from atd.kernels.tuning import aot
from atd.weights.codes import Code

DEVICE, CLOCK, SCHEDULERS = "H200", 1.75e9, 4
LAUNCH, FLOPS = 3e-6, 67e12  # seconds per kernel; of float32
L1, L2, ADD = 40, 280, 4  # cycles until a value is there
ROW, RETURN = 100, 50  # cycles per row of a search, there and back, beside its instructions
SEGMENT = 128  # rows
BARRIER = "BAR.SYNC.DEFER_BLOCKING"
KINDS = ("tied", "free", "code", "code, first visit")  # of N = 2
SHAPES = (  # of a block of Llama-3-8B: how many, rows, inputs
    ("q, o", 2, 4096, 4096),
    ("k, v", 2, 1024, 4096),
    ("gate, up", 2, 14336, 4096),
    ("down", 1, 4096, 14336),
)
shape = jax.ShapeDtypeStruct


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codes", action="store_true", help="registers of all codes instead")
    arguments = parser.parse_args()
    print(f"{aot.DEVICES[DEVICE].name}, jax {jax.__version__}: times are modelled\n")
    if arguments.codes:
        print_codes()
    else:
        print_sweeps()


def print_sweeps() -> None:
    """Prints launches and registers of each kind, and the modelled times of a model's matrices."""
    print("| N = 2 | kernels by column | by block | registers | spills | µs of the walk |")
    print("|---|---|---|---|---|---|")
    found = {}
    for kind in KINDS:
        before, after = (kernels_of_a_block(kind, in_one) for in_one in (False, True))
        compiled = walk_of(kind)
        found[kind] = before, after, walk_seconds(kind, compiled), search_seconds(kind, compiled)
        row = kind, before, after, compiled.registers, compiled.spill_bytes
        print(f"| {' | '.join(map(str, row))} | {1e6 * found[kind][2]:.0f} |")
    print(f"\n| ms, each | rows, inputs | products | {' | '.join(KINDS)} |")
    print("|---|---|---|" + "---|" * len(KINDS))
    totals = [[0.0, 0.0] for _ in ("products", *KINDS)]
    for name, count, rows, inputs in SHAPES:
        blocks, products = inputs / BLOCK, 2 * inputs**2 * rows / FLOPS
        times = [(products, products)]
        for before, after, walk, search in found.values():
            was = before * LAUNCH + BLOCK * max(0, search - LAUNCH)
            times.append((blocks * was, blocks * (after * LAUNCH + walk)))
        print(row_of(name, f"{rows}, {inputs}", times))
        totals = [
            [a + count * b for a, b in zip(*both, strict=True)]
            for both in zip(totals, times, strict=True)
        ]
    print(row_of("all seven", "", totals))


def print_codes() -> None:
    """Prints the registers and spilled bytes of the walks of all codes."""
    print("| N | kind | registers | spills | registers, first visit | spills |")
    print("|---|---|---|---|---|---|")
    for known in TABLE:
        walks = (compiled_walk_of(known.code, keep) for keep in (True, False))
        cells = [f"{known.bases:g}", known.kind]
        cells += [f"{walk.registers} | {walk.spill_bytes}" for walk in walks]
        print(f"| {' | '.join(cells)} |", flush=True)


def row_of(name: str, size: str, times) -> str:
    """Returns a row of the table, of seconds column by column and by block."""
    (products, _), *times = times
    cells = [f"{1e3 * before:.0f} → {1e3 * after:.0f}" for before, after in times]
    return f"| {' | '.join([name, size, f'{1e3 * products:.1f}', *cells])} |"


def kernels_of_a_block(kind: str, in_one_kernel: bool) -> int:
    """Returns the kernels that are launched for a block of columns."""
    inputs, rows = 2 * BLOCK, 4 * SEGMENT
    columns, matrix = shape((inputs, rows), jnp.float32), shape((inputs, inputs), jnp.float32)
    if "code" in kind:
        by_column = partial(trellis_walks.column_by_column, search=best_way)
        options = {"code": known_code(2), "length": SEGMENT}
        options["walks"] = trellis_walks.in_one_kernel if in_one_kernel else by_column
        more = shape((rows,), jnp.float32), shape((inputs, rows // SEGMENT), jnp.int32)

        def of_code(target, matrix, scale, seams):
            known = None if "first" in kind else seams
            given = {"matrix": matrix, "scale": scale} | options
            return trellis_feedback.sweep(target, target, known, **given)

        sweep = of_code
    else:
        options = {"bases": 2, "size": inputs, "tied": kind == "tied"}
        walks = level_walks.in_one_kernel if in_one_kernel else level_walks.column_by_column
        scales = shape((rows, 1, 1 if kind == "tied" else 2), jnp.float32)
        more = scales, shape((inputs,), jnp.int32)

        def of_levels(target, matrix, scales, order):
            given = {"matrix": matrix, "scales": scales, "order": order, "walks": walks} | options
            return error_feedback._sweep(target, target, **given)

        sweep = of_levels
    program = aot.program_for(DEVICE, sweep, columns, matrix, *more)
    loops = dict(aot.launches(program.as_text() or ""))
    return loops[inputs // BLOCK] + BLOCK * loops.get(BLOCK, 0)


def walk_of(kind: str) -> aot.Compiled:
    """Compiles the kernel that walks through a block."""
    if "code" in kind:
        return compiled_walk_of(known_code(2), "first" not in kind)
    rows = 32 * SEGMENT
    columns, within = shape((BLOCK, rows), jnp.float32), shape((BLOCK, BLOCK), jnp.float32)
    count, top = 1 if kind == "tied" else 5, level_walks.top(2, kind == "tied")
    levels, group = shape((1, count, rows), jnp.float32), shape((BLOCK,), jnp.int32)

    def walk(corrected, within, old, levels, group):
        return level_walks.in_one_kernel(levels, group, top)(corrected, within, old, (), 0)[0]

    operands, name = (columns, within, columns, levels, group), level_walks.name(count, top)
    return aot.compile_for(DEVICE, walk, *operands, kernel=name)


def compiled_walk_of(code: Code, keep: bool) -> aot.Compiled:
    """Compiles the kernel that walks through a block with a code; `keep`: seams are known."""
    length = SEGMENT // code.period * code.period
    rows = 32 * length
    columns, within = shape((BLOCK, rows), jnp.float32), shape((BLOCK, BLOCK), jnp.float32)
    scale, seams = shape((rows,), jnp.float32), shape((BLOCK, 32), jnp.int32)

    def walk(corrected, within, old, scale, seams):
        walk = trellis_walks.in_one_kernel(scale, code, length, None, keep)
        return walk(corrected, within, old, (seams, None), 0)[0]

    operands, name = (columns, within, columns, scale, seams), trellis_walks.name(phases(code))
    return aot.compile_for(DEVICE, walk, *operands, kernel=name)


def walk_seconds(kind: str, compiled: aot.Compiled) -> float:
    """Models the time of a block."""
    inner = aot.inner_loops_instructions(compiled.sass)
    turn = next(loop.total() for loop in inner if loop["FFMA"] >= AT_A_TIME)
    rest = aot.main_loop_instructions(compiled.sass).total() - sum(loop.total() for loop in inner)
    turns = sum(-(-j // AT_A_TIME) for j in range(BLOCK))  # over earlier columns
    each = _warps_per_scheduler(kind)
    cycles = turns * (turn * each + L1 + AT_A_TIME * ADD) + BLOCK * (rest * each + L2 + 4 * L1)
    return cycles / CLOCK + BLOCK * search_seconds(kind, compiled)


def search_seconds(kind: str, compiled: aot.Compiled) -> float:
    """Models the time of the search of a column; 0 where there is none."""
    if "code" not in kind:
        return 0.0
    *_, loop = (x for x in aot.inner_loops_instructions(compiled.sass) if x[BARRIER])
    row = loop.total() / loop[BARRIER] * _warps_per_scheduler(kind) + ROW
    there, back = (2 * SEAM_ROWS, SEAM_ROWS) if "first" in kind else (0, 0)
    return ((SEGMENT + there) * row + (SEGMENT + back) * RETURN) / CLOCK


def _warps_per_scheduler(kind: str) -> int:
    return -(-warps(phases(known_code(2))) // SCHEDULERS) if "code" in kind else 1


if __name__ == "__main__":
    main()
