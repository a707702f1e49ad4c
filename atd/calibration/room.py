"""Room for the values of a calibration run: how many bytes of them are kept, and what else is on
disk.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np


class Room:
    """Bytes that values may take together.

    What finds no room is computed again or kept in files: the results are the same.
    """

    def __init__(self, bytes: float = float("inf"), folder: Path | None = None):
        """bytes: of all values; folder: for files, needed where the bytes are limited."""
        self.left, self.folder = bytes, folder

    def take(self, bytes: int) -> bool:
        """Returns whether there is room for this many bytes, and takes it if so."""
        if bytes > self.left:
            return False
        self.left -= bytes
        return True

    def give_back(self, bytes: int) -> None:
        """Has bytes that were taken for others again."""
        self.left += bytes


STREAM = np.dtype(ml_dtypes.bfloat16)  # rounds by 0.2 % at most; the KL stays as it is in float32


class Batches:
    """A residual stream in all batches, in bfloat16: in memory, or one file each."""

    def __init__(self, arrays: Sequence[np.ndarray], folder: Path | None = None):
        """arrays: at the start, as they are; folder: for the files; None: in memory."""
        self.folder = folder
        self._arrays: list[np.ndarray | None] = list(arrays)  # None: in its file
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, i: int) -> np.ndarray:
        """Returns an array, float32 where it was put there."""
        array = self._arrays[i]
        if array is None:
            array = np.load(self._path(i)).view(STREAM)  # of which files know the size alone
        return array.astype(np.float32) if array.dtype == STREAM else array

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __setitem__(self, i: int, array: np.ndarray) -> None:
        array = array.astype(STREAM)
        if self.folder is None:
            self._arrays[i] = array
        else:
            np.save(self._path(i), array)
            self._arrays[i] = None

    def remove(self) -> None:
        """Deletes the files; the arrays are gone."""
        for i, array in enumerate(self._arrays):
            if array is None:
                self._path(i).unlink()
        self._arrays = []

    def _path(self, i: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{i}.npy"
