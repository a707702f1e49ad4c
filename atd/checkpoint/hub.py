"""Models of the Hugging Face hub: a name `user/repo[@revision]` becomes a folder of its cache.

    user/repo                 the newest commit of the branch main
    user/repo@v1.0            a branch, a tag or a commit
    user/repo/model.gguf      one GGUF file of several

A path that exists is that path. The files are those that `atd` reads; library, cache, progress bar
and settings (HF_TOKEN, HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT) are those of huggingface_hub.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from glob import escape
from pathlib import Path

from atd.checkpoint.files import path_exists, read_json
from atd.checkpoint.folder import CARD, GRAPH, MANIFEST, REPORT
from atd.checkpoint.safetensors import INDEX, SINGLE
from atd.checkpoint.tokenizer import FILES
from atd.errors import BadInput, RunFailed

_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(
    rf"(?P<repo>{_NAME}/(?!\S*\.gguf(?:@|$)){_NAME}|{_NAME}/{_NAME}(?=/))"
    r"(?:/(?P<file>[^@\s]+\.gguf))?(?:@(?P<revision>\S+))?"
)
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_READ = ("config.json", SINGLE, INDEX, *FILES, GRAPH, REPORT, MANIFEST, "recipe.toml", CARD)


@dataclass(frozen=True)
class HubId:
    """A name of a model of the hub."""

    repo: str  # "user/repo"
    file: str | None  # a GGUF file of it
    revision: str | None

    def __str__(self) -> str:
        file, revision = self.file and f"/{self.file}", self.revision and f"@{self.revision}"
        return f"{self.repo}{file or ''}{revision or ''}"


def parse_name(text: str) -> HubId | None:
    """Returns the parts of a text that can be a name of the hub, None for any other."""
    match = _ID.fullmatch(text)
    return HubId(match["repo"], match["file"], match["revision"]) if match else None


def hub_id(model: str | os.PathLike) -> HubId | None:
    """Returns the parts of a model's name on the hub; None for a path that exists, and for text
    that is no name.
    """
    name = parse_name(os.fspath(model))
    return None if name is None or path_exists(Path(model)) else name


def local(model: str | os.PathLike) -> Path:
    """Returns where the files of a model lie: the path itself, or the folder (or GGUF file) in the
    hub's cache that the name stands for, fetched where it is not there.

    A name stands for the same commit for as long as the process lives.

    Raises BadInput, in one line, for what the hub does not have or does not give, and where it
    cannot be reached.
    """
    name = hub_id(model)
    return Path(model) if name is None else _fetched(name)


@cache
def _fetched(name: HubId) -> Path:
    """The files of a model of the hub that `atd` reads."""
    from huggingface_hub import snapshot_download

    with told(name):
        if name.file is not None:
            return _gguf(name, name.file, name.revision)
        found = snapshot_download(name.repo, revision=name.revision, allow_patterns=[*_READ])
        folder = Path(found)
        if (folder / SINGLE).exists():
            return folder
        if (folder / INDEX).exists():
            shards = read_json(folder / INDEX).get("weight_map")
            names = sorted({*map(str, shards.values())}) if isinstance(shards, dict) else []
            if names:
                snapshot_download(name.repo, revision=folder.name, allow_patterns=names)
            return folder
        return _gguf(name, _only_gguf(name, folder), folder.name)


def _gguf(name: HubId, file: str, revision: str | None) -> Path:
    """A GGUF file; of one in several parts the one that was named, with the others beside it."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if part := _PART.fullmatch(file):
        parts = f"{escape(part['stem'])}-?????-of-{part['count']}.gguf"
        snapshot_download(name.repo, revision=revision, allow_patterns=[parts])
    return Path(hf_hub_download(name.repo, file, revision=revision))


def _only_gguf(name: HubId, folder: Path) -> str:
    """The one GGUF file of a repository without safetensors."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        files = [file.name for file in folder.glob("*.gguf")]
    else:
        files = HfApi().list_repo_files(name.repo, revision=folder.name)
    parts = {file: _PART.fullmatch(file) for file in files if file.endswith(".gguf")}
    found = sorted(file for file, part in parts.items() if not part or part["number"] == "00001")
    if not found:
        raise BadInput(f"{name}: it has neither {SINGLE} nor {INDEX} nor a .gguf file")
    if len(found) > 1:
        listed = ", ".join(found[:8]) + (", ..." if found[8:] else "")
        raise BadInput(f"{name}: it has several GGUF files: {listed}; add one to its name")
    return found[0]


@contextmanager
def told(name: HubId, first: str = "no such file or folder, and ") -> Iterator[None]:
    """Turns what huggingface_hub raises into BadInput that says what to do, RunFailed for a disk
    that cannot be written. `first` stands in front of the reason."""
    try:
        yield
    except (BadInput, RunFailed):
        raise
    except Exception as error:  # of huggingface_hub, of its HTTP client, of the disk
        if isinstance(error, OSError) and error.errno and not hasattr(error, "response"):
            raise RunFailed(f"{name}: {error.filename or 'cache'}: {error.strerror}") from error
        raise BadInput(f"{name}: {first}{_reason(error, name)}") from None


def _reason(error: Exception, name: HubId) -> str:
    """What an error of huggingface_hub says, in words for people."""
    from huggingface_hub import errors
    from huggingface_hub.constants import is_offline_mode

    match error:
        case errors.GatedRepoError():
            return (
                f"the model {name.repo} of the Hugging Face hub is gated: accept its terms on its "
                "page, then set HF_TOKEN or run `hf auth login`"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"the Hugging Face hub has no model {name.repo}, or it is private: for that, set "
                "HF_TOKEN or run `hf auth login`"
            )
        case errors.RevisionNotFoundError():
            return (
                f"the model {name.repo} of the Hugging Face hub has no revision "
                f"{name.revision or 'main'}"
            )
        case errors.RemoteEntryNotFoundError():
            return f"the model {name.repo} of the Hugging Face hub has no file {name.file}"
        case errors.HFValidationError():
            return "no name of a model of the Hugging Face hub"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return (
                f"the Hugging Face hub gives no access to {name.repo}: set HF_TOKEN, or run `hf "
                "auth login`"
            )
        case errors.HfHubHTTPError():
            return f"the Hugging Face hub answers: {_first_line(error)}"
    if is_offline_mode():
        return (
            "the cache of the Hugging Face hub has no such model (or not all of it), and "
            "HF_HUB_OFFLINE is set"
        )
    cause = error.__cause__ or error
    return (
        f"the Hugging Face hub cannot be reached ({type(cause).__name__}: {_first_line(cause)}); "
        "with HF_HUB_OFFLINE=1 only its cache is asked"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
