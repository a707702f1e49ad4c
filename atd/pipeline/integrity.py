"""Checks that a converted folder is still as it was written."""

from pathlib import Path

from atd.checkpoint.folder import CARD, GRAPH, MANIFEST, REPORT, read_manifest, report_is_intact
from atd.checkpoint.hub import local
from atd.checkpoint.safetensors import INDEX
from atd.checkpoint.tokenizer import FILES
from atd.checkpoint.writer import file_digest
from atd.errors import RunFailed
from atd.models import frontend
from atd.progress import Progress, Report, unheard
from atd.weights import broken


def verify_checkpoint(folder: str | Path, progress: Report = unheard) -> int:
    """Compares every file with the manifest and searches every weight for invalid values.

    The model card may be changed or deleted: it is made to be added to.

    Args:
      folder: a folder that atd made, or its name on the hub.
      progress: hears of each file and each weight.

    Returns the number of weights.

    Raises RunFailed, naming file or tensor, for what is not as it was written, or would be read and
    was not written by atd; and BadInput for a folder that atd did not make.
    """
    folder = local(folder)
    files = {name: sha for name, sha in read_manifest(folder).items() if name != CARD}
    for path in sorted(folder.iterdir()):
        if path.name not in files and _is_read(path):
            raise RunFailed(f"{path} would be read, but {MANIFEST} does not have it")
    for i, (name, sha256) in enumerate(files.items()):
        if not (folder / name).is_file():
            raise RunFailed(f"{folder / name} is missing")
        if file_digest(folder / name) != sha256:
            raise RunFailed(
                f"{folder / name} is not what was written: its sha256 differs from {MANIFEST}"
            )
        progress(Progress("comparing", i + 1, len(files), "files", name))
    if not report_is_intact(folder):
        raise RunFailed(f"{folder / REPORT} is not what was written; only its times may differ")
    refs = [ref for _, ref in frontend.open(folder).weights()]
    for i, ref in enumerate(refs):
        if problem := broken(ref.load()):
            raise RunFailed(f"{folder}: tensor {ref.tensor}: {problem}")
        progress(Progress("verifying", i + 1, len(refs), "weights", ref.tensor))
    return len(refs)


def _is_read(path: Path) -> bool:
    """Whether a file of this name in a model's folder is read as a part of the model."""
    names = ("config.json", GRAPH, INDEX, *FILES)
    return path.name in names or path.suffix == ".safetensors"
