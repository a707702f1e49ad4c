"""Which way a multiplication goes and in what shapes: given explicitly > tuned on this GPU > a rule of thumb.

`kernels/tuned/<device>.json` is written by `atd bench --tune` on the device that it names. A device without one takes the
rule of thumb, which was made without a GPU: from counted instructions and bytes, see docs/kernels.md.
"""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from atd.kernels.triton_gemm import Tiles
from atd.weights import TernaryType

FOLDER = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Settings:
    """gemv: warps of a block, groups of 16 rows a warp. Up to gemv_tokens tokens go that way, up to gemm_tokens the tiles'."""

    warps: int = 4
    row_blocks: int = 1
    gemv_tokens: int = 4
    tiles: Tiles = field(default_factory=Tiles)
    gemm_tokens: int = 256


def settings(device: str, type: TernaryType, tokens: int) -> Settings:
    """For so many tokens times a matrix of this type: the tuned ones of the nearest matrix, or `heuristic`."""
    entries = tuned(device)
    if not entries:
        return heuristic(type, tokens)
    return min(entries, key=lambda entry: _distance(entry, type, tokens))["settings"]


def heuristic(type: TernaryType, tokens: int) -> Settings:
    """More warps share a row where there are few rows; wider tiles for more tokens."""
    blocks = -(-type.shape[0] // 16)
    warps = 8 if blocks < 256 else 4
    width = min(128, max(16, 1 << (tokens - 1).bit_length()))
    return Settings(warps=warps, tiles=Tiles(rows=64, tokens=width, units=32, warps=4))


def file_of(device: str) -> Path:
    """Where the settings of a device lie: its name in lower case, words joined by dashes."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


@cache
def tuned(device: str) -> tuple[dict[str, Any], ...]:
    """The entries of a device's file: bases, tied, out, in, tokens, settings, microseconds. Raises ValueError for a file
    that cannot be read."""
    path = file_of(device)
    if not path.exists():
        return ()
    try:
        return tuple(
            entry | {"settings": _parse(entry["settings"])} for entry in json.loads(path.read_text())["entries"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a file of tuned settings ({error!r}); delete it or write it anew: atd bench --tune"
        ) from None


def write(device: str, version: str, entries: list[dict[str, Any]]) -> Path:
    """Writes the entries (settings as `Settings`) of a device, measured with a version of jax."""
    path = file_of(device)
    path.parent.mkdir(exist_ok=True)
    rows = [entry | {"settings": asdict(entry["settings"])} for entry in entries]
    path.write_text(json.dumps({"device": device, "jax": version, "entries": rows}, indent=1) + "\n")
    tuned.cache_clear()
    return path


def _parse(entry: dict[str, Any]) -> Settings:
    return replace(Settings(**entry), tiles=Tiles(**entry["tiles"]))


def _distance(entry: dict[str, Any], type: TernaryType, tokens: int) -> tuple:
    def octaves(a: int, b: int) -> float:
        return max(a, b) / min(a, b)

    return (
        octaves(entry["tokens"], tokens),
        entry["bases"] != type.bases,
        entry["tied"] != type.tied,
        octaves(entry["out"], type.shape[0]) * octaves(entry["in"], type.shape[1]),
    )
