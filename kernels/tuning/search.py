"""The search for the fastest settings on this GPU: `atd bench --tune` or `python
benchmarks/matmul.py --tune`.

For each matrix, in an order that puts first what matters most, and for each number of tokens, each
way to multiply is measured in its fastest shape:

    gemv     all SHAPES for ALL_SHAPES tokens; between them the shape that was found
    gemm     tiles, one dimension after the other from the rule of thumb: the best value is kept
    decode   as it is

A way that is fastest for a number of tokens and for all fewer that were measured is taken up to
there, and the fastest for the most tokens up to where the rule of thumb has it. The order of trials
is fixed, and of equally fast ones the first is taken: the same times make the same file.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atd.errors import BadInput
from atd.kernels import settings
from atd.kernels.packed import device_kind
from atd.kernels.settings import Settings, Shape, Tiles
from atd.kernels.triton.backend import Triton, way_of
from atd.kernels.tuning import timing
from atd.kernels.tuning.timing import Effort
from atd.weights import TernaryType

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
# The launches of a GEMV that are tried.
SHAPES = tuple(
    Shape(*each)
    for each in [
        *((warps, 1, 1, unroll) for warps in (1, 2, 4, 8, 16) for unroll in (1, 2, 4)),
        *((warps, 1, 2, 1) for warps in (2, 4, 8)),
        *((warps, row_warps, 2, 1) for warps, row_warps in ((4, 4), (8, 8), (8, 2))),
    ]
)
GEMV_UP_TO, GEMM_FROM, DECODE_FROM = 32, 16, 64  # tokens for which a way is tried
ALL_SHAPES = (1, 16)  # tokens for which all shapes are tried; for others the one found before
TILED = (32,)  # tokens for which all dimensions of the tiles are tried; for others the width alone
TILES = {
    "tokens": (16, 32, 64, 128),
    "rows": (64, 128),
    "units": (16, 32, 64),
    "warps": (4, 8),
    "stages": (1, 2, 3),
}
EFFORT = Effort(call_seconds=0.004, repeats=5)
NEVER, ALWAYS = 0, 1 << 30  # numbers of tokens up to which a way is taken


@dataclass(frozen=True)
class Problem:
    """Some tokens times a matrix of a type."""

    type: TernaryType
    tokens: int


# Seconds of each; infinity for what does not run.
Clock = Callable[[Problem, Sequence[Settings]], list[float]]


def matrices() -> list[TernaryType]:
    """Returns what is tuned: Llama-3-8B's fused shapes and small ones.

    Tied scales per row come before free ones and groups.
    """
    large = [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096)]
    small = [(3072, 576), (576, 1536)]

    def of(shapes, bases: int, tied: bool = True, group: int | str = "row") -> list[TernaryType]:
        return [TernaryType(shape, bases, group, tied, "f16") for shape in shapes]

    first = [each for bases in (2, 1, 3) for each in of(large, bases)]
    free = [each for bases in (2, 3) for each in of(large[:2], bases, tied=False)]
    return first + of(small, 2) + free + of(large[:2], 2, tied=False, group=128)


def tune(
    minutes: float = 8, say: Callable[[str], None] = print, all_tokens: Sequence[int] = TOKENS
) -> tuple[Path, list[str]]:
    """Searches on this device and writes the user's file of it (`settings.user_file`).

    What the file holds already, measured with this version of jax, is not measured again: a second
    call goes on where the first one ended.

    Args:
        minutes: time limit; a matrix that was begun is finished.
        say: takes a line per matrix.
        all_tokens: numbers of tokens to measure.

    Returns:
        (the file, the matrices for which there was no time).

    Raises:
        BadInput: the kernels do not run here, or the file cannot be written.
    """
    if reason := Triton().device_refuses():
        raise BadInput(f"there is nothing to tune here: {reason}")
    device = device_kind()
    kept = settings.kept(device, jax.__version__)
    kinds = [type for type in matrices() if not _is_kept(type, kept, all_tokens)]
    if len(kinds) < len(matrices()):
        done, file = len(matrices()) - len(kinds), settings.user_file(device)
        say(f"{done} of {len(matrices())} are in {file}; delete it to begin anew")
    entries, left_out = search(kinds, DeviceClock(), minutes, say, all_tokens)
    return settings.write(device, jax.__version__, entries), left_out


def search(
    kinds: Sequence[TernaryType],
    clock: Clock,
    minutes: float,
    say: Callable[[str], None],
    all_tokens: Sequence[int] = TOKENS,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns (entries for `settings.write`, the matrices for which there was no time)."""
    started, trials = time.monotonic(), 0
    entries, left_out = [], []

    def counted(problem: Problem, candidates: Sequence[Settings]) -> list[float]:
        nonlocal trials
        trials += len(candidates)
        return clock(problem, candidates)

    for i, type in enumerate(kinds):
        name = str(type)
        if time.monotonic() - started > 60 * minutes:
            left_out.append(name)
            continue
        found = of_matrix(type, counted, all_tokens)
        entries += found
        passed = max(time.monotonic() - started, 1e-9)
        rate = f"{trials} trials, {trials / passed:.1f}/s"
        say(f"{i + 1}/{len(kinds)} {name}: {summary(found)}  [{rate}]")
    return entries, left_out


def of_matrix(type: TernaryType, clock: Clock, all_tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Returns an entry for each number of tokens."""
    best: dict[int, Settings] = {}
    seconds: dict[int, dict[str, float]] = {}
    gemv, tiled = None, None
    for tokens in all_tokens:
        problem, chosen = Problem(type, tokens), settings.heuristic(type, tokens)
        times = seconds[tokens] = {}
        has_gemv = way_of(Settings(gemv_tokens=ALWAYS), type, tokens) == "gemv"
        if has_gemv and tokens <= GEMV_UP_TO:
            only = replace(gemv or chosen, gemv_tokens=ALWAYS)
            grid = [replace(only, gemv=shape) for shape in SHAPES]
            gemv, times["gemv"] = fastest(clock, problem, grid if tokens in ALL_SHAPES else [only])
        if tokens >= GEMM_FROM or not has_gemv:
            dimensions = TILES if tokens in TILED or tiled is None else ("tokens",)
            tiled, times["gemm"] = best_tiles(clock, problem, tiled or chosen, dimensions)
            chosen = tiled
        if tokens >= DECODE_FROM:
            decode = replace(chosen, gemv_tokens=NEVER, gemm_tokens=NEVER)
            (times["decode"],) = clock(problem, [decode])
        best[tokens] = replace(chosen, gemv=(gemv or chosen).gemv)
    gemv_tokens, gemm_tokens = crossovers(seconds)
    usual = settings.heuristic(type, all_tokens[-1])
    if gemv_tokens == all_tokens[-1]:  # where it ends was not seen
        gemv_tokens = max(gemv_tokens, usual.gemv_tokens)
    if gemm_tokens == all_tokens[-1]:
        gemm_tokens = max(gemm_tokens, usual.gemm_tokens)
    return [
        settings.kind_of(type, tokens)
        | {
            "settings": replace(best[tokens], gemv_tokens=gemv_tokens, gemm_tokens=gemm_tokens),
            "microseconds": _microseconds(seconds[tokens]),
        }
        for tokens in all_tokens
    ]


def _microseconds(seconds: dict[str, float]) -> dict[str, float]:
    """The microseconds of the ways that run."""
    return {way: round(1e6 * value, 2) for way, value in seconds.items() if value < np.inf}


def fastest(
    clock: Clock, problem: Problem, candidates: Sequence[Settings]
) -> tuple[Settings, float]:
    """Returns the first of the fastest, and its seconds."""
    times = clock(problem, candidates)
    at = min(range(len(times)), key=times.__getitem__)
    return candidates[at], times[at]


def best_tiles(
    clock: Clock, problem: Problem, start: Settings, dimensions: Iterable[str] = TILES
) -> tuple[Settings, float]:
    """Searches one dimension of the tiles after the other, and returns the best and its seconds.

    No wider than twice the tokens: the rest would be padding.
    """
    known: dict[Settings, float] = {}
    best = replace(start, gemv_tokens=NEVER, gemm_tokens=ALWAYS)
    for dimension in dimensions:
        values = TILES[dimension]
        if dimension == "tokens":
            values = [width for width in values if width <= max(16, 2 * problem.tokens)]
        tried = [best.tiles, *(replace(best.tiles, **{dimension: value}) for value in values)]
        candidates = [replace(best, tiles=tiles) for tiles in tried if _has_room(tiles, problem)]
        new = [each for each in dict.fromkeys(candidates) if each not in known]
        known |= dict(zip(new, clock(problem, new), strict=True))
        best = min(dict.fromkeys(candidates), key=known.__getitem__)
    return best, known[best]


def _has_room(tiles: Tiles, problem: Problem) -> bool:
    return settings.shared_bytes(tiles, problem.type.bases) <= settings.MOST_SHARED_BYTES


def crossovers(seconds: dict[int, dict[str, float]]) -> tuple[int, int]:
    """Returns (gemv_tokens, gemm_tokens), of the seconds by way by tokens.

    Each way is taken up to the last number of tokens before it is not the fastest.
    """

    def up_to(way: str, start: int) -> int:
        last = start
        for tokens, times in seconds.items():
            if tokens > start:
                if way not in times or times[way] > min(times.values()):
                    break
                last = tokens
        return last

    gemv_tokens = up_to("gemv", 0)
    return gemv_tokens, up_to("gemm", gemv_tokens)


def summary(entries: Sequence[dict[str, Any]]) -> str:
    """Returns a text with the crossovers, and what the fewest tokens take."""
    first, chosen = entries[0], entries[0]["settings"]
    shape = ", ".join(f"{name} {value}" for name, value in asdict(chosen.gemv).items())
    times = ", ".join(f"{way} {value} us" for way, value in first["microseconds"].items())
    crossover = f"gemv to {chosen.gemv_tokens}, gemm to {chosen.gemm_tokens}"
    return f"{first['tokens']} token: {times} ({shape}); {crossover}"


def _is_kept(type: TernaryType, kept: Sequence[dict[str, Any]], all_tokens: Sequence[int]) -> bool:
    """Whether there are entries for all these numbers of tokens."""
    kinds = [settings.kind_of(type, tokens) for tokens in all_tokens]
    return all(
        any(kind == {name: entry[name] for name in kind} for entry in kept) for kind in kinds
    )


class DeviceClock:
    """Measures on this device. Keeps the matrices of the type that it was last asked for."""

    def __init__(self, effort: Effort = EFFORT, interpret: bool = False):
        self._effort, self._interpret = effort, interpret
        self._type, self._stack = None, None

    def __call__(self, problem: Problem, candidates: Sequence[Settings]) -> list[float]:
        if self._type != problem.type or self._stack is None:
            self._stack = None  # frees the memory before more is taken
            self._type, self._stack = problem.type, timing.stack(problem.type, self._effort)
        size = problem.tokens, problem.type.shape[1]
        x = jnp.asarray(np.random.default_rng(0).standard_normal(size, np.float32))
        backends = [Triton(self._interpret, candidate) for candidate in candidates]
        chains = [timing.chain(b.multiply, x, self._stack, self._effort) for b in backends]
        compiled = timing.compile_all([chain.lower for chain in chains])
        return [
            self._seconds(program, chain.trips, x)
            for program, chain in zip(compiled, chains, strict=True)
        ]

    def _seconds(self, program: Any, trips: int, x: jax.Array) -> float:
        assert self._stack is not None
        if isinstance(program, Exception):  # a shape that Pallas or Triton refuses is slow, no more
            return np.inf
        try:
            return timing.seconds(program, trips, x, self._stack, self._effort)
        except jax.errors.JaxRuntimeError:  # more shared memory or registers than there are
            return np.inf
