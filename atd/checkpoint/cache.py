"""Finds the cache folder: it holds what other runs over the same model can use again."""

import os
from pathlib import Path

from atd.errors import BadInput


def default_cache() -> Path:
    """Returns $ATD_CACHE, or ~/.cache/atd."""
    return Path(os.environ.get("ATD_CACHE") or Path.home() / ".cache" / "atd")


def make_cache(folder: Path) -> None:
    """Makes the cache folder. Raises BadInput where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"{folder}: the cache folder cannot be made: {error.strerror}; set ATD_CACHE to another"
        ) from None
    if not os.access(folder, os.W_OK):
        raise BadInput(f"{folder}: the cache folder cannot be written to; set ATD_CACHE to another")
