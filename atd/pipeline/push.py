"""Uploads an output folder to the Hugging Face hub."""

from pathlib import Path

from atd.checkpoint.folder import CARD, MANIFEST, REPORT, read_manifest
from atd.checkpoint.hub import parse_name, told
from atd.errors import BadInput
from atd.pipeline.integrity import verify_checkpoint
from atd.progress import Report, unheard


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    progress: Report = unheard,
) -> str:
    """Uploads a folder that atd made as one commit, and returns its address.

    The repository is made where there is none, and so is the branch. Weights of a former upload
    that the folder does not have are deleted in the same commit.

    Args:
      folder: what `convert` or an export wrote; its model card may have been changed since.
      name: "user/repo".
      private: make the repository a private one; one that is there stays as it is.
      revision: the branch; main by default.
      progress: hears of the verification.

    Raises:
      RunFailed: the folder is not as it was written; nothing is uploaded.
      BadInput: atd did not make the folder; the hub gives no access, or cannot be reached.
    """
    folder, parts = Path(folder), parse_name(name)
    if parts is None or parts.file or parts.revision:
        raise BadInput(f"{name!r} is no name of a model on the hub; expected user/repo")
    verify_checkpoint(folder, progress)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = {*read_manifest(folder), MANIFEST, REPORT, CARD}
    added = sorted(file for file in files if (folder / file).is_file())
    with told(parts, first=""):
        api = HfApi()
        address = str(api.create_repo(name, private=private or None, exist_ok=True))
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = api.list_repo_files(name, revision=revision)
        gone = [file for file in there if file.endswith(".safetensors") and file not in files]
        api.create_commit(
            name,
            [
                *(CommitOperationDelete(path_in_repo=file) for file in gone),
                *(CommitOperationAdd(file, folder / file) for file in added),
            ],
            commit_message="Upload a folder of atd",
            revision=revision,
        )
    return address if revision is None else f"{address}/tree/{revision}"
