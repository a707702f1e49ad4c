"""Whether a converted folder still is what was written."""

from pathlib import Path

from atd.checkpoint.folder import MANIFEST, read_manifest
from atd.checkpoint.writer import file_digest
from atd.errors import RunFailed
from atd.models import frontend
from atd.weights import broken


def verify_checkpoint(folder: str | Path) -> int:
    """Compares every file with the manifest and looks at every weight; returns the number of
    weights. Raises RunFailed naming what is wrong.
    """
    folder = Path(folder)
    for name, sha256 in read_manifest(folder).items():
        if not (folder / name).is_file():
            raise RunFailed(f"{folder / name} is missing")
        if file_digest(folder / name) != sha256:
            raise RunFailed(
                f"{folder / name} is not what was written: its sha256 differs from {MANIFEST}"
            )
    count = 0
    for _, ref in frontend.open(folder).weights():
        if problem := broken(ref.load()):
            raise RunFailed(f"{folder}: tensor {ref.tensor}: {problem}")
        count += 1
    return count
