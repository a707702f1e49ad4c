"""Finds trellis codes from scratch, and shows them beside those of the table.

    python benchmarks/trellis_codes.py [--minutes 60] [--bases 2 3] [--json FILE]
    python benchmarks/trellis_codes.py --tiny         seconds, for CI

For each N and kind of `atd.decomposition.trellis_codes` it takes the shape of the code (how many
trits each row has, and in how many rows each counts) and nothing else. Starts take turns: taps of
equal size with the signs of a Barker sequence, whose shifted copies hardly correlate, and random
ones. From each it descends: the nearest trits of a long row of Gaussians under the taps (Viterbi),
then the taps nearest to the row under the trits (least squares), as Lloyd's algorithm does. The
best starts descend further, on more weights. Errors are those of the taps rounded to three digits,
on weights that none of them has seen; the table's are measured on the same.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from atd.checkpoint.files import write_json
from atd.decomposition.trellis import Phase, phases
from atd.decomposition.trellis_codes import BASES, KINDS, TABLE, Known, bound
from atd.weights.codes import Code

ROWS, LANES = 256, 256  # of a sample; each lane is a row of Gaussians of its own
MARGIN = 32  # rows at either end of a lane whose errors do not count: nothing lies beyond them
FIRST, FURTHER = 8, 30  # rounds of descent from each start, and from the best ones
KEPT = 3  # starts that descend further
STARTS = ("Barker", "random")
BARKER = {2: "++", 3: "++-", 4: "++-+", 5: "+++-+", 7: "+++--+-"}

Shape = tuple[tuple[int, ...], ...]  # taps of each trit of each phase


@dataclass(frozen=True)
class Size:
    """How much is tried. Samples are of ROWS x LANES weights."""

    seconds: float  # per code
    starts: int  # at most
    rounds: int  # of descent from the best starts
    further: int  # samples they descend on
    fresh: int  # samples that errors are measured on


# --- codes as shapes and vectors of taps ----------------------------------------------------------


def shape_of(code: Code) -> Shape:
    """Returns how many taps each trit of each phase has."""
    return tuple(tuple(map(len, phase)) for phase in code.taps)


def code_of(taps: np.ndarray, shape: Shape) -> Code:
    """Returns the code of this shape with these taps, one after the other, three digits each."""
    numbers = iter([round(float(tap), 3) for tap in taps])
    return Code(
        tuple(tuple(tuple(next(numbers) for _ in range(n)) for n in phase) for phase in shape)
    )


def taps_of(code: Code) -> np.ndarray:
    """Returns the taps of a code one after the other, float32."""
    return np.array([tap for phase in code.taps for trit in phase for tap in trit], np.float32)


@lru_cache
def _tables(shape: Shape) -> list[tuple[Phase, list[np.ndarray]]]:
    """The phases of a shape, and head, new and loose of `Phase` per unit of each tap: [taps, ...].

    All three are linear in the taps, so that one compiled search serves every code of a shape.
    """
    count = sum(map(sum, shape))
    units = [phases(code_of(row, shape)) for row in np.eye(count)]
    names = ("head", "new", "loose")
    return [
        (same[0], [np.stack([getattr(step, name) for step in same]) for name in names])
        for same in zip(*units, strict=True)
    ]


# --- the search, with taps as data ----------------------------------------------------------------


@partial(jax.jit, static_argnames="shape")
def search(taps, x, shape: Shape) -> list[jax.Array]:
    """Finds the nearest trits of x float32 [ROWS, lanes], from any state to any state.

    Args:
        taps: float32 [taps], one after the other.
        x: rows of Gaussians, one per lane.
        shape: of the code.

    Returns:
        Trits int8 [ROWS / period, lanes, trits] of each phase, in the order of the code.
    """
    steps = [
        (step, *(jnp.tensordot(taps, jnp.asarray(unit), 1) for unit in units))
        for step, units in _tables(shape)
    ]
    x = x.reshape(-1, len(steps), x.shape[1])

    def forward(cost, rows):
        back = []
        for p, (step, head, new, loose) in enumerate(steps):
            cost, ended = _row(cost, rows[p], step, head, new, loose)
            back.append(ended)
        return cost, back

    cost, back = lax.scan(forward, jnp.zeros((3 ** steps[0][0].alive, x.shape[2])), x)

    def backward(state, given):
        rows, ended = given
        found = []
        for p, (step, head, new, loose) in reversed(list(enumerate(steps))):
            d = jnp.take_along_axis(ended[p], state[None], axis=0)[0].astype(jnp.int32)
            kept, symbol = state // len(new), state % len(new)
            rest = rows[p] - head[d, kept] - new[symbol]
            number = jnp.argmin(jnp.abs(rest - loose[:, None]), axis=0)
            mine = jnp.zeros((len(state), len(step.coded) + len(step.loose_at)), jnp.int8)
            mine = mine.at[:, step.coded].set(jnp.asarray(step.coded_trits)[symbol])
            found.append(mine.at[:, step.loose_at].set(jnp.asarray(step.loose_trits)[number]))
            state = jnp.asarray(step.state)[d, kept]
        return state, found[::-1]

    last = jnp.argmin(cost, axis=0).astype(jnp.int32)
    return lax.scan(backward, last, (x, back), reverse=True)[1]


def _row(cost, y, step: Phase, head, new, loose) -> tuple[jax.Array, jax.Array]:
    """One row: cost [states, lanes] -> (cost behind it, the ended trits of the best way, uint8)."""
    lanes, ends = cost.shape[1], step.ending
    order = (*ends, *(n for n in range(step.alive) if n not in ends), step.alive)
    ways = cost.reshape(*[3] * step.alive, lanes).transpose(order).reshape(len(head), -1, 1, lanes)
    shape = (ways.shape[1], len(new), lanes)
    best, ended = jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.uint8)
    for d in range(len(head)):
        size = rest = jnp.abs(y - head[d][:, None, None] - new[:, None])  # [K, U, lanes]
        for f in range(len(loose) // 2):  # the other half has the opposite signs
            rest = jnp.minimum(rest, jnp.abs(size - jnp.abs(loose[f])))
        way = ways[d] + rest * rest
        ended = jnp.where(way < best, jnp.uint8(d), ended)
        best = jnp.minimum(way, best)
    return best.reshape(-1, lanes), ended.reshape(-1, lanes)


# --- descent --------------------------------------------------------------------------------------


def gaussians(count: int, seed: int) -> Iterator[np.ndarray]:
    """Draws samples float32 [ROWS, LANES]."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((ROWS, LANES), np.float32) for _ in range(count))


def refit(taps: np.ndarray, samples: Iterator[np.ndarray], shape: Shape):
    """Returns the mean square error of taps, and the taps nearest to the samples under its trits.

    A tap j of a trit of phase p counts in rows of phase p + j alone, so that each phase has a least
    squares problem of its own.
    """
    period, count = len(shape), len(taps)
    gram, right, energy, weights = np.zeros((count, count)), np.zeros(count), 0.0, 0
    for x in samples:
        trits = [np.asarray(found, np.float32) for found in search(taps, x, shape)]
        at: list[list[tuple[int, np.ndarray]]] = [[] for _ in shape]
        k = 0
        for p, phase in enumerate(shape):
            for i, length in enumerate(phase):
                for age in range(length):
                    down, row = divmod(p + age, period)
                    at[row].append((k, np.roll(trits[p][..., i], down, axis=0)))
                    k += 1
        for row, columns in enumerate(at):
            cut = slice(MARGIN // period, -MARGIN // period)
            wanted = x[row::period][cut].ravel()
            places = [place for place, _ in columns]
            features = np.stack([column[cut].ravel() for _, column in columns], axis=1)
            left = wanted - features @ taps[places]
            energy, weights = energy + float(left @ left), weights + len(left)
            gram[np.ix_(places, places)] += features.T @ features
            right[places] += features.T @ wanted
    better = np.linalg.lstsq(gram, right, rcond=None)[0].astype(np.float32)
    return energy / weights, better


def start(shape: Shape, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Draws taps whose sums of random trits have the variance 1 of what they are to meet."""
    taps = []
    for phase in shape:
        for length in phase:
            drawn = rng.standard_normal(length)
            if kind == "Barker" and length in BARKER:
                drawn = np.array([1.0 if sign == "+" else -1.0 for sign in BARKER[length]])
            drawn *= rng.uniform(0.5, 1.5) / np.linalg.norm(drawn)
            taps.append(drawn)
    found = np.concatenate(taps)
    return (found * np.sqrt(1.5 * len(shape) / np.sum(found**2))).astype(np.float32)


def error_of(code: Code, samples: int) -> float:
    """Returns the mean square error of a code on samples that no descent has seen."""
    return refit(taps_of(code), gaussians(samples, seed=1), shape_of(code))[0]


def find(known: Known, size: Size) -> dict:
    """Returns the best code found of the shape of a known one, and what was tried."""
    shape, rng, began = shape_of(known.code), np.random.default_rng(0), time.perf_counter()
    tried: list[tuple[float, str, np.ndarray]] = []
    while len(tried) < size.starts:
        kind = STARTS[len(tried) % len(STARTS)]
        taps, error = start(shape, kind, rng), math.inf
        for _ in range(FIRST):
            error, taps = refit(taps, gaussians(1, seed=2 + len(tried)), shape)
        tried.append((error, kind, taps))
        if len(tried) >= KEPT and time.perf_counter() - began > size.seconds / 2:
            break
    tried.sort(key=lambda found: found[0])
    best: list[tuple[float, str, Code]] = []
    for _, kind, taps in tried[:KEPT]:
        for _ in range(size.rounds):
            taps = refit(taps, gaussians(size.further, seed=0), shape)[1]
            if time.perf_counter() - began > size.seconds * (2 + len(best)) / (1 + KEPT):
                break
        code = code_of(taps, shape)
        best.append((error_of(code, size.fresh), kind, code))
    error, kind, code = min(best, key=lambda found: found[0])
    return {
        "bases": known.bases,
        "kind": known.kind,
        "states": 3 ** phases(code)[0].alive,
        "starts": {name: sum(kind == name for _, kind, _ in tried) for name in STARTS},
        "start_errors": {name: [e for e, kind, _ in tried if kind == name] for name in STARTS},
        "best_start": kind,
        "error": error,
        "decibels": 10 * math.log10(error / bound(known.bases)),
        "code": str(code),
        "table_error": error_of(known.code, size.fresh),
        "table_code": known.text,
        "seconds": time.perf_counter() - began,
    }


# --- what is shown --------------------------------------------------------------------------------


def show(rows: Sequence[dict]) -> Table:
    """Shows each code found beside the table's."""
    table = Table(
        title="mean square error on Gaussians of variance 1, and dB above the bound",
        caption="*" + " + ".join(STARTS),
    )
    for title in ("N", "kind", "states", "starts*", "from", "error", "dB", "table", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        starts = " + ".join(map(str, row["starts"].values()))
        error, decibels = f"{row['error']:.5f}", f"{row['decibels']:.2f}"
        known = f"{row['table_error']:.5f}"
        table.add_row(
            f"{row['bases']:g}",
            row["kind"],
            str(row["states"]),
            starts,
            row["best_start"],
            error,
            decibels,
            known,
            f"{row['seconds']:.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", type=float, nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--minutes", type=float, default=60, help="time limit of all codes")
    parser.add_argument("--tiny", action="store_true", help="one code, two starts, few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    wanted = [k for k in TABLE if k.bases in options.bases and k.kind in options.kinds]
    size = Size(60 * options.minutes / max(1, len(wanted)), 100, FURTHER, 4, 16)
    if options.tiny:
        wanted, size = [k for k in TABLE if (k.bases, k.kind) == (2, "fast")], Size(9, 2, 1, 1, 1)
    rows = []
    for known in wanted:
        rows.append(row := find(known, size))
        print(f"N = {row['bases']:g} {row['kind']}: {row['code']}", flush=True)
        for name, errors in row["start_errors"].items():
            found = " ".join(f"{error:.5f}" for error in errors)
            print(f"  {len(errors)} {name} starts, after {FIRST} rounds: {found}", flush=True)
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
