"""Settings of the Triton backend: which way it multiplies, and in what shapes.

Those that are given explicitly go before those that were tuned on this GPU, and these before a rule
of thumb.

`atd bench --tune` measures on the device that it runs on and writes to the user's file,
`user_file(device)`. The package brings files for some devices, `kernels/tuned/<device>.json`; for
the same matrix and number of tokens, an entry of the user's file goes before one of the package. A
device that is in neither takes `heuristic`.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from atd.errors import BadInput
from atd.weights import TernaryType
from atd.weights.layouts import LAYOUTS, TILE_ROWS, unit

PACKAGED = Path(__file__).parent / "tuned"
SHARED_BYTES = 96 << 10  # per block, on GPUs that have least of it: A10, RTX 30xx, L4, RTX 40xx
MOST_SHARED_BYTES = 227 << 10  # on those that have most: H100, H200
MOST_WARPS = 16  # per block


@dataclass(frozen=True)
class Shape:
    """How `triton.gemv` cuts its work into blocks of threads. All are powers of two.

    Attributes:
        warps: of a block.
        row_warps: how many of them have rows of their own; the others share these rows and take
            turns at their steps.
        row_blocks: groups of 16 rows of a warp, which share its activations.
        unroll: steps of a warp in one turn of its loop.
    """

    warps: int = 4
    row_warps: int = 1
    row_blocks: int = 1
    unroll: int = 1

    @property
    def splits(self) -> int:
        """Warps that take turns at the steps of a row."""
        return self.warps // self.row_warps

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return TILE_ROWS * self.row_blocks * self.row_warps

    def paired(self) -> "Shape":
        """Returns the shape for a gate above an up matrix, in which a warp has rows of both.

        Twice the rows: half as many steps in a turn of the loop, and as many more warps to share
        them.
        """
        if self.row_blocks > 1:
            return self
        warps = min(MOST_WARPS, 2 * self.warps)
        return replace(self, row_blocks=2, warps=warps, unroll=max(1, self.unroll // 2))


@dataclass(frozen=True)
class Tiles:
    """How `triton.gemm` cuts its work. Rows, tokens and units are powers of two of at least 16.

    Attributes:
        rows, tokens: of the tile of results that a block computes.
        units: of each row that a block takes in one turn of its loop.
        warps: of a block.
        stages: turns whose operands are loaded ahead.
    """

    rows: int = 64
    tokens: int = 32
    units: int = 32
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Settings:
    """Which way a product goes, and in what shapes.

    Up to gemv_tokens tokens go by `triton.gemv`, up to gemm_tokens by `triton.gemm`, and more by
    `triton.decode`.
    """

    gemv: Shape = field(default_factory=Shape)
    gemv_tokens: int = 16
    tiles: Tiles = field(default_factory=Tiles)
    gemm_tokens: int = 64


def choose(device: str, type: TernaryType, tokens: int) -> Settings:
    """Returns the tuned settings of the nearest matrix, or `heuristic` where there are none.

    The shape of a gemv goes with the size of the matrix and the sums that it keeps, and is taken
    from a matrix of about the same size and no fewer sums alone.

    Args:
        device: its name, such as "NVIDIA H200".
        type: of the matrix [out, in].
        tokens: that it is multiplied by.

    Raises:
        BadInput: a file of the device's settings cannot be read.
    """
    entries, usual = tuned(device), heuristic(type, tokens)
    if not entries:
        return usual
    entry = min(entries, key=lambda entry: _distance(entry, type, tokens))
    found: Settings = entry["settings"]
    if max(_octaves(entry, kind_of(type, tokens), name) for name in ("out", "in")) > 0.6:
        found = replace(found, gemv=usual.gemv)
    if _sums(entry["bases"], entry["tied"]) < _sums(type.bases, type.tied):
        tokens_at_most = min(found.gemv_tokens, usual.gemv_tokens)
        found = replace(found, gemv=usual.gemv, gemv_tokens=tokens_at_most)
    # Tiles of another kind of matrix may take more shared memory for this one; what they took for
    # theirs is there.
    room = max(SHARED_BYTES, shared_bytes(found.tiles, entry["bases"]))
    return replace(found, tiles=_fit(found.tiles, type.bases, room))


def heuristic(type: TernaryType, tokens: int) -> Settings:
    """Returns settings for a device that is not tuned, from counted instructions and bytes.

    As many warps per row as make 4096 of them, 31 on each multiprocessor of an H200, but no more
    than have two steps to do. A gemv of free scales has 16 columns for tokens and bases together,
    and from the third call on it decodes more often than tiles are slower. Tiles as wide as the
    tokens, or as the shared memory allows. With one scale per row, decoding once pays off beyond
    two such tiles: it moves 4 bytes more per weight.
    """
    groups, steps = (LAYOUTS["tiles"].codes_shape(*type.shape, type.bases)[i] for i in range(2))
    warps = 2 ** min(4, max(0, round(math.log2(4096 / groups))), int(math.log2(max(1, steps / 2))))
    width = min(128, max(16, 1 << (tokens - 1).bit_length()))
    tiles = _fit(Tiles(rows=64, tokens=width, units=32, warps=4), type.bases, SHARED_BYTES)
    per_row = type.scales_shape[1] == 1
    sums = _sums(type.bases, type.tied)
    if tokens > 8 and sums <= 2:  # more activations than codes: two groups of rows share them
        row_blocks, unroll = 2, 1
    else:  # rows of a few steps have nothing to unroll, and five planes no registers for it
        row_blocks, unroll = 1, 2 if steps >= 8 and per_row and type.bases < 5 else 1
    shape = Shape(warps=warps, row_blocks=row_blocks, unroll=unroll)
    return Settings(
        gemv=shape,
        gemv_tokens=16 if sums == 1 or not per_row else min(16, 2 * (16 // sums)),
        tiles=tiles,
        gemm_tokens=max(64, 2 * tiles.tokens if per_row else 0),
    )


def _sums(bases: int, tied: bool) -> int:
    """Sums that a gemv keeps for each result."""
    return 1 if tied else bases


def _fit(tiles: Tiles, bases: int, room: int) -> Tiles:
    """The tiles, narrower or with fewer units where they take more bytes than there is room."""
    while shared_bytes(tiles, bases) > room and (tiles.units > 16 or tiles.tokens > 16):
        if tiles.units <= 16 or tiles.tokens > 32:
            tiles = replace(tiles, tokens=tiles.tokens // 2)
        else:
            tiles = replace(tiles, units=tiles.units // 2)
    return tiles


def shared_bytes(tiles: Tiles, bases: int) -> int:
    """Returns the shared memory of a block in bytes, within some per cent of what Triton asks for.

    It holds the activations of all planes and the codes of a turn, once per stage.
    """
    words, params = unit(bases)
    return tiles.stages * tiles.units * (2 * params * tiles.tokens + 4 * words * tiles.rows)


# --- files ------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Returns $ATD_CACHE; without it, $XDG_CACHE_HOME/atd or ~/.cache/atd."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("ATD_CACHE") or caches / "atd")


def user_file(device: str) -> Path:
    """Returns where `write` puts the settings of a device: tuned/<device>.json of the cache."""
    return cache_folder() / "tuned" / _file_name(device)


def _file_name(device: str) -> str:
    """The device's name in lower case, words joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def kind_of(type: TernaryType, tokens: int) -> dict[str, Any]:
    """Returns what an entry is of, as it stands in the file."""
    grouped = type.scales_shape[1] > 1
    kind = {"bases": type.bases, "tied": type.tied, "grouped": grouped}
    return kind | {"out": type.shape[0], "in": type.shape[1], "tokens": tokens}


def tuned(device: str) -> tuple[dict[str, Any], ...]:
    """Returns the entries of a device, each with `kind_of`, settings, and microseconds by way.

    Raises:
        BadInput: a file cannot be read.
    """
    files = PACKAGED / _file_name(device), user_file(device)
    return tuple({_key(entry): entry for path in files for entry in entries_of(path)}.values())


@cache
def entries_of(path: Path) -> tuple[dict[str, Any], ...]:
    """Returns the entries of a file; none where there is no file.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        return tuple(_parse(entry) for entry in json.loads(path.read_text())["entries"])
    except FileNotFoundError:
        return ()
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{path}: not a file of tuned settings ({error!r}); delete it, or write it anew with "
            "atd bench --tune"
        ) from None


def kept(device: str, version: str) -> tuple[dict[str, Any], ...]:
    """Returns the entries of the user's file that `write` keeps.

    All of them, if they were measured with this version of jax and can be read, else none.
    """
    path = user_file(device)
    try:
        return entries_of(path) if json.loads(path.read_text())["jax"] == version else ()
    except (BadInput, OSError, KeyError, TypeError, ValueError):
        return ()


def write(device: str, version: str, entries: list[dict[str, Any]]) -> Path:
    """Writes entries to the user's file, one per line, together with those that are `kept`.

    Args:
        device: its name, such as "NVIDIA H200".
        version: of jax, with which they were measured.
        entries: each with `kind_of`, settings, and microseconds by way.

    Returns:
        The file.

    Raises:
        BadInput: the file cannot be written.
    """
    path = user_file(device)
    rows = {
        _key(entry): entry | {"settings": asdict(entry["settings"])}
        for entry in (*kept(device, version), *entries)
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for _, row in sorted(rows.items()))
    head = f'{{\n "device": {json.dumps(device)},\n "jax": {json.dumps(version)},\n "entries": [\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(f"{head}{lines}\n ]\n}}\n")
        part.replace(path)
    except OSError as error:
        raise BadInput(
            f"{path}: the settings cannot be written: {error.strerror}; set ATD_CACHE to another "
            "folder"
        ) from None
    entries_of.cache_clear()
    return path


def _key(entry: dict[str, Any]) -> tuple:
    return tuple(entry[name] for name in ("grouped", "bases", "tied", "out", "in", "tokens"))


def _parse(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with its settings as `Settings`. Raises ValueError for what no kernel can take."""
    values = entry["settings"]
    shape, tiles = Shape(**values["gemv"]), Tiles(**values["tiles"])
    counts = [*asdict(shape).values(), *asdict(tiles).values(), *_key(entry)[3:]]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(f"no positive integers: {entry}")
    return entry | {"settings": Settings(**values | {"gemv": shape, "tiles": tiles})}


def _octaves(entry: dict[str, Any], kind: dict[str, Any], name: str) -> float:
    return abs(math.log2(entry[name] / kind[name]))


def _distance(entry: dict[str, Any], type: TernaryType, tokens: int) -> float:
    """How far an entry lies: octaves of tokens and shape, and a penalty for each other property."""
    kind = kind_of(type, tokens)
    penalties = {"grouped": 8, "bases": 3, "tied": 2}
    shape = (_octaves(entry, kind, "out") + _octaves(entry, kind, "in")) / 2
    far = sum(penalty for name, penalty in penalties.items() if entry[name] != kind[name])
    return _octaves(entry, kind, "tokens") + shape + far
