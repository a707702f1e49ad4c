"""The cache: arrays that a run computed and other runs over the same model can use again."""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atd.checkpoint.writer import write_file
from atd.errors import BadInput

_DIGEST = 32  # bytes of the sha256 behind an entry: numpy does not notice all damage


def cache_key(name: str, made_from: Any) -> str:
    """Returns a key of the cache: a name, and the hash of a JSON value that says what the entry is
    made from.
    """
    return f"{name}-{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]}"


@dataclass(frozen=True)
class Cache:
    """A folder of entries, one file of named arrays per key."""

    folder: Path

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """Returns the arrays under the key; None where there are none, or they are damaged.

        Raises:
            BadInput: there are none, and the folder could not take any: known before they are
                computed.
        """
        with suppress(OSError):
            stored = self._file(key).read_bytes()
            content, digest = stored[:-_DIGEST], stored[-_DIGEST:]
            if digest == hashlib.sha256(content).digest():
                with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                    return dict(arrays)
        self._make_folder()
        return None

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Stores the arrays under the key, whole or not at all."""
        self._make_folder()
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]  no array is called allow_pickle
        archive = content.getvalue()
        write_file(self._file(key), archive + hashlib.sha256(archive).digest())

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def _make_folder(self) -> None:
        """Makes the folder. Raises BadInput where it cannot be made or written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"{self.folder}: the cache folder cannot be made: {error.strerror}; "
                "set ATD_CACHE to another"
            ) from None
        if not os.access(self.folder, os.W_OK):
            raise BadInput(
                f"{self.folder}: the cache folder cannot be written to; set ATD_CACHE to another"
            )
