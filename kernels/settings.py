"""Which way a multiplication goes and in what shapes: given explicitly > tuned on this GPU > a rule of thumb.

`kernels/tuned/<device>.json` is written by `atd bench --tune` on the device that it names. A device without one takes the
rule of thumb, which was made without a GPU: from counted instructions and bytes, see docs/kernels.md.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from atd.kernels.triton.gemm import Tiles, unit
from atd.kernels.triton.gemv import Shape
from atd.weights import TernaryType
from atd.weights.layouts import LAYOUTS

FOLDER = Path(__file__).parent / "tuned"
SHARED_BYTES = 96 << 10  # of a block, on GPUs that have least of it: A10, RTX 30xx, L4, RTX 40xx
MOST_SHARED_BYTES = 227 << 10  # on those that have most: H100, H200


@dataclass(frozen=True)
class Settings:
    """Up to gemv_tokens tokens go by `triton_gemv`, up to gemm_tokens by the tiles of `triton_gemm`."""

    gemv: Shape = field(default_factory=Shape)
    gemv_tokens: int = 16
    tiles: Tiles = field(default_factory=Tiles)
    gemm_tokens: int = 64


def settings(device: str, type: TernaryType, tokens: int) -> Settings:
    """For so many tokens times a matrix of this type: the tuned ones of the nearest matrix, or `heuristic`. The shape of a
    gemv goes with the size of the matrix and is taken from one of about the same size alone."""
    entries, usual = tuned(device), heuristic(type, tokens)
    if not entries:
        return usual
    entry = min(entries, key=lambda entry: _distance(entry, type, tokens))
    found: Settings = entry["settings"]
    if max(_octaves(entry, kind_of(type, tokens), name) for name in ("out", "in")) > 0.6:
        found = replace(found, gemv=usual.gemv)
    # Tiles of another kind of matrix may take more shared memory for this one; what they took for theirs is there.
    room = max(SHARED_BYTES, shared_bytes(found.tiles, entry["bases"]))
    return replace(found, tiles=_fit(found.tiles, type.bases, room))


def heuristic(type: TernaryType, tokens: int) -> Settings:
    """As many warps to a row as make 4096 of them, 31 on each multiprocessor of an H200, where that was fastest; but no more
    than have two steps to do. Tiles as wide as the tokens, or as the shared memory allows, and with a scale a row two of them
    side by side: decoding once moves 4 bytes a weight more, an H200 takes a tile's 5 instructions two or three times meanwhile."""
    groups, steps = (LAYOUTS["tiles"].codes_shape(*type.shape, type.bases)[i] for i in range(2))
    warps = 2 ** min(4, max(0, round(math.log2(4096 / groups))), int(math.log2(max(1, steps / 2))))
    tiles = Tiles(
        rows=64, tokens=min(128, max(16, 1 << (tokens - 1).bit_length())), units=32, warps=4
    )
    # Rows of a few steps have nothing to unroll. Beyond 8 tokens there are more activations than codes to load: two groups of rows share them.
    row_blocks, unroll = (
        (2, 1) if tokens > 8 else (1, 2 if steps >= 8 and type.scales_shape[1] == 1 else 1)
    )
    shape = Shape(warps=warps, row_blocks=row_blocks, unroll=unroll)
    tiles = _fit(tiles, type.bases, SHARED_BYTES)
    return Settings(
        shape,
        tiles=tiles,
        gemm_tokens=max(64, 2 * tiles.tokens if type.scales_shape[1] == 1 else 0),
    )


def _fit(tiles: Tiles, bases: int, room: int) -> Tiles:
    """The tiles, narrower or with fewer units where they take more shared memory than there is."""
    while shared_bytes(tiles, bases) > room and (tiles.units > 16 or tiles.tokens > 16):
        narrower = tiles.units <= 16 or tiles.tokens > 32
        tiles = (
            replace(tiles, tokens=tiles.tokens // 2)
            if narrower
            else replace(tiles, units=tiles.units // 2)
        )
    return tiles


def shared_bytes(tiles: Tiles, bases: int) -> int:
    """Shared memory that a block of tiles takes: the activations of all planes and the codes of a step, once a stage.
    Within a few per cent of what Triton asks for."""
    words, params = unit(bases)
    return tiles.stages * tiles.units * (2 * params * tiles.tokens + 4 * words * tiles.rows)


def file_of(device: str) -> Path:
    """Where the settings of a device lie: its name in lower case, words joined by dashes."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def kind_of(type: TernaryType, tokens: int) -> dict[str, Any]:
    """What an entry is of, as it stands in the file."""
    grouped = type.scales_shape[1] > 1
    kind = {"bases": type.bases, "tied": type.tied, "grouped": grouped}
    return kind | {"out": type.shape[0], "in": type.shape[1], "tokens": tokens}


@cache
def tuned(device: str) -> tuple[dict[str, Any], ...]:
    """The entries of a device's file: `kind_of` and settings, and microseconds by way. Raises ValueError for a file that
    cannot be read."""
    path = file_of(device)
    if not path.exists():
        return ()
    try:
        return tuple(_parse(entry) for entry in json.loads(path.read_text())["entries"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a file of tuned settings ({error!r}); delete it or write it anew: atd bench --tune"
        ) from None


def kept(device: str, version: str) -> tuple[dict[str, Any], ...]:
    """The entries of a device's file if they were measured with this version of jax and can be read, else none."""
    try:
        return tuned(device) if json.loads(file_of(device).read_text())["jax"] == version else ()
    except (OSError, KeyError, TypeError, ValueError):
        return ()


def write(device: str, version: str, entries: list[dict[str, Any]]) -> Path:
    """Writes the entries (settings as `Settings`) of a device, measured with a version of jax, one a line, and those that
    are `kept`."""
    path = file_of(device)
    path.parent.mkdir(exist_ok=True)
    rows = {
        _key(entry): entry | {"settings": asdict(entry["settings"])}
        for entry in (*kept(device, version), *entries)
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for _, row in sorted(rows.items()))
    head = f'{{\n "device": {json.dumps(device)},\n "jax": {json.dumps(version)},\n "entries": [\n'
    path.write_text(f"{head}{lines}\n ]\n}}\n")
    tuned.cache_clear()
    return path


def _key(entry: dict[str, Any]) -> tuple:
    return tuple(entry[name] for name in ("grouped", "bases", "tied", "out", "in", "tokens"))


def _parse(entry: dict[str, Any]) -> dict[str, Any]:
    _key(entry)  # all of it is there
    values = entry["settings"]
    return entry | {
        "settings": Settings(
            **values | {"gemv": Shape(**values["gemv"]), "tiles": Tiles(**values["tiles"])}
        )
    }


def _octaves(entry: dict[str, Any], kind: dict[str, Any], name: str) -> float:
    return abs(math.log2(entry[name] / kind[name]))


def _distance(entry: dict[str, Any], type: TernaryType, tokens: int) -> float:
    """In octaves of tokens. Another matrix of the same kind is near, another kind of matrix far."""
    kind = kind_of(type, tokens)
    penalties = {"grouped": 8, "bases": 3, "tied": 2}
    shape = (_octaves(entry, kind, "out") + _octaves(entry, kind, "in")) / 2
    return (
        _octaves(entry, kind, "tokens")
        + shape
        + sum(far for name, far in penalties.items() if entry[name] != kind[name])
    )
