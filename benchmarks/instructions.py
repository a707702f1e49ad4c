"""Instructions per weight of the Triton kernels, compiled without a GPU, and the speed that they
allow for one token.

    make gpu-check && JAX_PLATFORMS=cpu PYTHONPATH=. .venv-gpu-check/bin/python
    benchmarks/instructions.py [--device H200]

The speed is modelled, not measured: a kernel is bound by its bytes (codes and scales at the
bandwidth that a copy reaches) or by its instructions (4 warps per cycle and multiprocessor),
whichever takes longer; bf16 by its bytes. The matrix is Llama-3-8B's 14336 x 4096 by default.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp

from atd.decomposition.options import trellis_type
from atd.decomposition.trellis_codes import known_code
from atd.kernels.settings import heuristic
from atd.kernels.trellis import planes_type
from atd.kernels.triton import decode, gemm, gemv
from atd.kernels.triton.backend import way_of
from atd.kernels.triton.gemm import Units
from atd.kernels.triton.geometry import Geometry
from atd.kernels.tuning import aot
from atd.weights import PackedType, TernaryType, TrellisType, bits_per_weight

CASES = [
    (n, tied, group)
    for group in ("row", 128)
    for n in (1, 2, 3)
    for tied in (True, False)
    if tied or n > 1
]
CODED = (1.25, 1.5, 1.75, 2, 2.5, 3)  # N of trellis codes
COPY = {"H200": 4.3e12, "H100": 3.0e12, "A10": 5.1e11, "L4": 2.6e11}  # bytes/s that a copy reaches
CLOCK = {"H200": 1.75e9, "H100": 1.75e9, "A10": 1.5e9, "L4": 1.6e9}  # Hz under load


def instructions(device: str, type: TernaryType | TrellisType) -> tuple[float, aot.Compiled]:
    """Returns (instructions of a thread in the main loop per weight that it multiplies, machine
    code)."""
    planes, period = isinstance(type, TrellisType), 1
    if isinstance(type, TrellisType):
        type, period = planes_type(type), type.code.period
    g = Geometry(type, 1, heuristic(type, 1).gemv, planes=planes)
    operands = (
        jax.ShapeDtypeStruct((1, type.shape[1]), jnp.bfloat16),
        jax.ShapeDtypeStruct(PackedType(type, "tiles").codes_shape, jnp.uint32),
        jax.ShapeDtypeStruct(type.scales_shape, jnp.float16),
    )
    function = partial(gemv.matmul, type=type, shape=g.shape, planes=planes)
    compiled = aot.compile_for(device, function, *operands, kernel=g.name)
    weights = 2 * g.shape.row_blocks * g.shape.unroll * g.plan.piece_params * period
    return aot.main_loop_instructions(compiled.sass).total() / weights, compiled


def of_many_tokens(device: str, type: TrellisType) -> list[str]:
    """Returns instructions per weight of tiles of 32 tokens, and of decoding, as text."""
    planes, period = planes_type(type), type.code.period
    of, tiles = Units(planes), heuristic(planes, 32).tiles
    rows = decode.Geometry(of, 0, planes.shape[0], type)
    codes = jax.ShapeDtypeStruct(PackedType(type, "tiles").codes_shape, jnp.uint32)
    scales = jax.ShapeDtypeStruct(type.scales_shape, jnp.float16)
    kernels = (
        (
            f"ternary_gemm_n{type.bases}",
            lambda codes, scales, x: gemm.matmul(x, codes, scales, planes, tiles, apart=True),
            [jax.ShapeDtypeStruct((32, type.shape[1]), jnp.bfloat16)],
            tiles.rows * tiles.units / (32 * tiles.warps),
        ),
        (
            f"ternary_decode_n{type.bases}",
            lambda codes, scales: decode.decoded(rows, codes, scales, jnp.bfloat16),
            [],
            decode.ROWS * decode.UNITS / (32 * decode.WARPS),
        ),
    )
    found = []
    for name, function, others, units in kernels:
        compiled = aot.compile_for(device, function, codes, scales, *others, kernel=name)
        count = aot.main_loop_instructions(compiled.sass).total() / (units * of.params * period)
        found += [f"{count:.2f}", f"{compiled.registers}", f"{compiled.spill_bytes}"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=sorted(COPY), default="H200")
    parser.add_argument("--shape", type=int, nargs=2, default=(14336, 4096), metavar=("OUT", "IN"))
    arguments = parser.parse_args()
    device = aot.DEVICES[arguments.device]
    # Instructions of threads per second.
    issued = 4 * 32 * device.multiprocessors * CLOCK[arguments.device]
    copied = COPY[arguments.device]
    out, inputs = arguments.shape
    print(f"{device.name}, {out} x {inputs}, jax {jax.__version__}: modelled, nothing has run\n")
    print(
        "| N | scales | group | bits | instructions per weight | registers | spills | bound by "
        "| modelled, x bf16 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    types = [TernaryType((out, inputs), n, group, tied, "f16") for n, tied, group in CASES]
    codes = [trellis_type((out, inputs), known_code(n), "f16") for n in CODED]
    for type in (*types, *codes):
        assert type is not None
        if isinstance(type, TernaryType) and way_of(heuristic(type, 1), type, 1) != "gemv":
            continue  # more groups in a step than the kernel has columns for
        count, compiled = instructions(arguments.device, type)
        bits = bits_per_weight(PackedType(type, "tiles"))
        by_bytes, by_instructions = copied / (bits / 8), issued / count  # weights per second
        bound, speed = min(
            ("bytes", by_bytes), ("instructions", by_instructions), key=lambda way: way[1]
        )
        what = [f"{type.code.bases:g}", "trellis", "row"] if isinstance(type, TrellisType) else []
        if isinstance(type, TernaryType):
            what = [type.bases, "tied" if type.tied else "free", type.group]
        row = [
            *what,
            f"{bits:.2f}",
            f"{count:.2f}",
            compiled.registers,
            compiled.spill_bytes,
            bound,
        ]
        print(f"| {' | '.join(map(str, row))} | {speed / (copied / 2):.1f} |")
    print("\n| N of a trellis code | tiles | registers | spills | decoding | registers | spills |")
    print("|---|---|---|---|---|---|---|")
    for type in codes:
        assert type is not None
        row = [f"{type.code.bases:g}", *of_many_tokens(arguments.device, type)]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
