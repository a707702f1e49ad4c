"""Packed matrices against bf16, matrix by matrix, on this machine's GPU: microseconds, times bf16,
bandwidth.

    python benchmarks/matmul.py            the matrices of Llama-3-8B and SmolLM2-135M, N = 2, 1, 3
    python benchmarks/matmul.py --tune     no table: search for this GPU's settings, and keep them
    python benchmarks/matmul.py --matrices 'llama3-8b gate_up' --bases 2 --tokens 1 16
    python benchmarks/matmul.py --tiny     whether it runs, on any machine, in seconds

It needs jax and numpy alone. bf16 is `jnp.dot` in the same run, on whatever XLA takes for it
(cuBLAS or its own). Both sides are timed as `atd.kernels.tuning.timing` says: weights out of memory
and not out of the L2, without the host, everything counted that a multiplication does (its
activations are prepared anew each time). The first of each matrix, N and way of computing is
compared with XLA first. GB/s are of the packed bytes, scales and padding included; `of copy` is
that over the bandwidth of copying 1 GB, bytes read and written, measured here as well.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from atd.checkpoint.files import write_json
from atd.errors import AtdError, BadInput
from atd.kernels import matmul as kernels
from atd.kernels import settings, xla
from atd.kernels.packed import device_kind
from atd.kernels.triton.backend import way_of
from atd.kernels.tuning import search, timing
from atd.kernels.tuning.timing import TINY, Effort, Stack
from atd.weights import DenseType, TernaryType, Weight

LLAMA = {
    "llama3-8b qkv": (6144, 4096),
    "llama3-8b o": (4096, 4096),
    "llama3-8b gate_up": (28672, 4096),
    "llama3-8b gate": (14336, 4096),
    "llama3-8b down": (4096, 14336),
    "llama3-8b k": (1024, 4096),
}
HEAD = {"llama3-8b head": (128256, 4096)}
SMOLLM2 = {
    "smollm2 qkv": (960, 576),
    "smollm2 o": (576, 576),
    "smollm2 gate_up": (3072, 576),
    "smollm2 gate": (1536, 576),
    "smollm2 down": (576, 1536),
    "smollm2 k": (192, 576),
}
TINY_MATRICES = {"tiny": (80, 200)}
TOKENS = (1, 2, 4, 8, 16, 64, 256, 2048)
TINY_TOKENS = (1, 20, 300)  # one of each way
TINY_BASES = (2,)
BASES = (2, 1, 3)  # what matters most comes first, if time should run out
# Largest root mean square error over that of the result: of bf16 activations, weights and results.
CHECKED = 1e-2


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        type: the text of the weight's type.
        way: gemv, gemm or decode for triton, else the backend's name.
    over_bf16: times as fast as bf16.
    of_copy: bytes per second over those of copying.
    error: of the first of its kind, against XLA.
    """

    matrix: str
    type: str
    tokens: int
    way: str
    microseconds: float
    bf16_microseconds: float
    over_bf16: float
    bytes_per_second: float
    of_copy: float
    error: float | None


def product(x: jax.Array, weight: Any) -> jax.Array:
    """Multiplies bf16 [M, in] by bf16 [out, in] -> bf16."""
    return jnp.dot(x, weight.array.T)


def way(backend: str, type: TernaryType, tokens: int) -> str:
    """Returns gemv, gemm or decode for triton, else the backend's name."""
    if not backend.startswith("triton"):
        return backend
    return way_of(settings.choose(device_kind(), type, tokens), type, tokens)


def error_of(multiply: timing.Multiply, x: jax.Array, weight: Weight) -> jax.Array:
    """Returns the root mean square of the difference from XLA over that of XLA's result."""
    wanted = xla.matmul(x.astype(jnp.float32), weight)
    return jnp.sqrt(
        jnp.mean((multiply(x, weight).astype(jnp.float32) - wanted) ** 2) / jnp.mean(wanted**2)
    )


def measure(
    multiply: timing.Multiply,
    xs: dict[int, jax.Array],
    matrices: Stack,
    effort: Effort,
    checks: dict[int, jax.Array],
) -> tuple[dict[int, float], dict[int, Any]]:
    """Returns (seconds by tokens, errors by the tokens of `checks`); a text in the place of what
    failed."""
    # The self-test runs once, while there are no threads yet.
    jax.eval_shape(multiply, next(iter(xs.values())), matrices.weights[0])
    chains = {tokens: timing.chain(multiply, x, matrices, effort) for tokens, x in xs.items()}
    check = jax.jit(partial(error_of, multiply))
    lowerings = [partial(check.lower, x, matrices.weights[0]) for x in checks.values()]
    compiled = timing.compile_all([*lowerings, *(chain.lower for chain in chains.values())])
    times, errors = {}, {}
    for (tokens, x), program in zip(checks.items(), compiled, strict=False):
        errors[tokens] = attempt(program, lambda p, x=x: float(p(x, matrices.weights[0])))
    for (tokens, chain), program in zip(chains.items(), compiled[len(checks) :], strict=True):
        x, trips = xs[tokens], chain.trips
        times[tokens] = attempt(
            program, lambda p, x=x, trips=trips: timing.seconds(p, trips, x, matrices, effort)
        )
    return times, errors


def attempt(program: Any, use: Any) -> Any:
    """Returns use(program), or the message of what went wrong in compiling or running it.

    One failure must not end the run.
    """
    if isinstance(program, Exception):
        return f"does not compile: {str(program).splitlines()[0]}"
    try:
        return use(program)
    except Exception as error:
        return f"does not run: {str(error).splitlines()[0]}"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All figures that the time allows."""
    effort = TINY if options.tiny else Effort()
    matrices = TINY_MATRICES if options.tiny else LLAMA | SMOLLM2 | HEAD
    chosen = options.matrices or [name for name in matrices if name not in HEAD]
    matrices = {name: shape for name, shape in matrices.items() if name in chosen}
    all_tokens = options.tokens or (TINY_TOKENS if options.tiny else TOKENS)
    deadline = time.monotonic() + 60 * options.minutes
    bandwidth = timing.copy_bytes_per_second(1 << 20 if options.tiny else timing.COPY_BYTES)
    print(f"{device_kind()}, jax {jax.__version__}: copies {bandwidth / 1e9:.0f} GB/s", flush=True)
    multiply = partial(kernels.matmul, backend=options.backend)
    dense: dict[str, dict[int, Any]] = {}
    rows, failures, left_out = [], [], []
    for bases in options.bases or (TINY_BASES if options.tiny else BASES):
        for name, shape in matrices.items():
            type = TernaryType(shape, bases, options.group, not options.free, "f16")
            if time.monotonic() > deadline:
                left_out.append(f"{name} N={bases}")
                continue
            started = time.monotonic()
            dtype = jnp.dtype(options.activations)
            random = np.random.default_rng(0).standard_normal(
                (max(all_tokens), shape[1]), np.float32
            )
            xs = {tokens: jnp.asarray(random[:tokens], dtype) for tokens in all_tokens}
            if name not in dense:
                in_bf16 = {tokens: x.astype(jnp.bfloat16) for tokens, x in xs.items()}
                held = timing.stack(DenseType(shape, "bf16"), effort)
                dense[name], _ = measure(product, in_bf16, held, effort, {})
            held = timing.stack(
                type, effort, "words" if options.backend.startswith("mosaic") else "tiles"
            )
            ways = {tokens: way(options.backend, type, tokens) for tokens in xs}
            # The first of each way.
            checks = {min(m for m in xs if ways[m] == kind): kind for kind in ways.values()}
            try:
                times, errors = measure(
                    multiply, xs, held, effort, {tokens: xs[tokens] for tokens in sorted(checks)}
                )
            except AtdError as error:  # refused, or the self-test found wrong results
                failures.append(f"{name} N={bases}: {error}")
                continue
            for tokens in xs:
                took, of_dense, error = times[tokens], dense[name][tokens], errors.get(tokens)
                here = f"{name} {held.weights[0].type}, {tokens} tokens ({ways[tokens]})"
                failures += [
                    f"{here}: {text}" for text in (took, of_dense, error) if isinstance(text, str)
                ]
                if isinstance(error, float) and not error <= CHECKED:  # NaN as well
                    failures.append(f"{here}: WRONG, off by {error:.1e} of XLA's result")
                elif isinstance(took, float) and isinstance(of_dense, float):
                    rate = held.weights[0].type.nbytes / max(took, 1e-9)
                    figures = (
                        1e6 * took,
                        1e6 * of_dense,
                        of_dense / max(took, 1e-9),
                        rate,
                        rate / bandwidth,
                    )
                    known = error if isinstance(error, float) else None
                    rows.append(
                        Row(name, str(held.weights[0].type), tokens, ways[tokens], *figures, known)
                    )
            print(
                f"  {name} N={bases}: {time.monotonic() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return {
        "device": device_kind(),
        "jax": jax.__version__,
        "backend": options.backend,
        "activations": options.activations,
        "copy_bytes_per_second": bandwidth,
        "rows": [asdict(row) for row in rows],
        "failures": failures,
        "left_out": left_out,
    }


def table(results: dict[str, Any]) -> str:
    """Returns a table with a row for each matrix and N.

    For each number of tokens, microseconds and how many times as fast as bf16.
    """
    rows = [Row(**row) for row in results["rows"]]
    if not rows:
        return "no figures"
    all_tokens = sorted({row.tokens for row in rows})
    by_kind: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        by_kind.setdefault((row.matrix, row.type), {})[row.tokens] = row
    header = ["us (x bf16), weights", "GB/s", "of copy", *(f"M={tokens}" for tokens in all_tokens)]
    lines = []
    for (matrix, type), found in by_kind.items():
        first = found[min(found)]
        cells = [
            f"{found[m].microseconds:.1f} ({found[m].over_bf16:.2f})" if m in found else "-"
            for m in all_tokens
        ]
        short = (
            type.removeprefix("packed ")
            .replace(" layout=words/1", "")
            .replace(" layout=tiles/1", "")
        )
        lines.append(
            [
                f"{matrix} {short}",
                f"{first.bytes_per_second / 1e9:.0f}",
                f"{first.of_copy:.2f}",
                *cells,
            ]
        )
    return timing.columns(header, lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", type=int, nargs="+", help="N, in this order (2 1 3)")
    parser.add_argument(
        "--free", action="store_true", help="one scale per base instead of tied ones"
    )
    parser.add_argument(
        "--group",
        type=group,
        default="row",
        help="inputs that share a scale: row or a number (row)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help=f"of a product ({' '.join(map(str, TOKENS))}; --tune has some of its own)",
    )
    parser.add_argument("--activations", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--backend", help="of atd.kernels.matmul (triton on a GPU, triton-interpret elsewhere)"
    )
    names = [*LLAMA, *SMOLLM2, *HEAD]
    parser.add_argument(
        "--matrices",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"of {', '.join(names)} (all but the head)",
    )
    parser.add_argument("--minutes", type=float, default=8, help="time limit in minutes (8)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--tiny", action="store_true", help="a small matrix, timed without care")
    parser.add_argument(
        "--tune", action="store_true", help="search for this GPU's settings instead"
    )
    parser.add_argument(
        "--copy", type=Path, metavar="FOLDER", help="folder for a copy of what --tune writes"
    )
    options = parser.parse_args()
    runs = kernels.PACKED["triton"].device_refuses() is None
    options.backend = options.backend or ("triton" if runs else "triton-interpret")
    return options


def group(text: str) -> str | int:
    return text if text in ("row", "tensor") else int(text)


def main() -> int:
    """Returns the exit code: 1 where anything failed or was wrong, 2 for what cannot be run
    here."""
    options = parse()
    try:
        return tune(options) if options.tune else show(options)
    except AtdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def tune(options: argparse.Namespace) -> int:
    """Searches for this GPU's settings, and says where they are."""
    say, all_tokens = partial(print, flush=True), options.tokens or search.TOKENS
    path, left_out = search.tune(options.minutes, say, all_tokens)
    rest = f"; no time for (--minutes): {', '.join(left_out)}" if left_out else ""
    print(f"{path}: written; every later run on this GPU uses it{rest}")
    if options.copy:
        (options.copy / path.name).write_text(path.read_text())
    return 0


def show(options: argparse.Namespace) -> int:
    """Measures, and prints the table and what failed."""
    if options.backend == "triton-interpret" and not options.tiny:
        reason = kernels.PACKED["triton"].device_refuses()
        raise BadInput(f"the kernels do not run here ({reason}); see --tiny, or --backend xla")
    results = run(options)
    print(table(results))
    for failure in results["failures"]:
        print(f"FAILED  {failure}")
    if results["left_out"]:
        print(f"no time for (--minutes): {', '.join(results['left_out'])}")
    if options.json:
        write_json(options.json, results)
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
