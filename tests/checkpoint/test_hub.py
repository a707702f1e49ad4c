"""Models of the hub, against a stand-in on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atd.checkpoint import hub
from atd.checkpoint.hub import hub_id, local
from atd.checkpoint.reader import checkpoint_contents, open_tokenizer
from atd.errors import BadInput
from atd.models import frontend
from tests.checkpoint.fake_hub import TOKEN, Repo, used


@pytest.fixture
def server(monkeypatch, tmp_path):
    with used(monkeypatch, tmp_path) as fake:
        yield fake


@pytest.fixture
def files(packaged) -> dict[str, bytes]:
    """A model of the hub, with files that nobody reads."""
    own = {path.name: path.read_bytes() for path in packaged.folder.iterdir() if path.is_file()}
    return own | {"pytorch_model.bin": b"old", "onnx/model.onnx": b"other", "README.md": b"text"}


def refused(name: str, *parts: str) -> None:
    with pytest.raises(BadInput) as error:
        frontend.open(name)
    assert "\n" not in str(error.value)
    for part in (name, *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("user/repo", ("user/repo", None, None)),
        ("user/repo@v1.0", ("user/repo", None, "v1.0")),
        ("user/repo@refs/pr/1", ("user/repo", None, "refs/pr/1")),
        ("user/repo/a.gguf@main", ("user/repo", "a.gguf", "main")),
        ("user/repo/q4/a.gguf", ("user/repo", "q4/a.gguf", None)),
    ],
)
def test_names_of_the_hub_have_parts(text, parts):
    name = hub_id(text)
    assert name is not None
    assert (name.repo, name.file, name.revision) == parts
    assert str(name) == text


@pytest.mark.parametrize(
    "text", ["gpt2", "/user/repo", "../repo", "a/b/c", "models/m.gguf", "~/m", "a//b", "a/.b", ""]
)
def test_other_texts_are_paths(text):
    assert hub_id(text) is None
    assert local(text) == Path(text)


def test_a_path_that_exists_is_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "repo").mkdir(parents=True)
    assert local("user/repo") == Path("user/repo")


def test_a_model_of_the_hub_is_the_same_as_its_folder(server, files, packaged):
    server.repos["user/stories"] = Repo({"main": files})
    assert str(frontend.open("user/stories")) == str(frontend.open(packaged.folder))
    digests = checkpoint_contents("user/stories").digests.values()
    assert set(digests) == set(checkpoint_contents(packaged.folder).digests.values())
    mine = open_tokenizer("user/stories").encode("Once upon a time").tolist()
    assert mine == open_tokenizer(packaged.folder).encode("Once upon a time").tolist()
    assert not server.fetched() & {"pytorch_model.bin", "onnx/model.onnx"}
    assert len([line for line in server.asked if "/revision/" in line]) == 1


def test_shards_are_those_of_the_index(server, packaged, tmp_path):
    import json

    weights = (packaged.folder / "model.safetensors").read_bytes()
    names = list(frontend.open_checkpoint(packaged.folder).tensors)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    own = {"config.json": (packaged.folder / "config.json").read_bytes()}
    own |= {"part.safetensors": weights, "other.safetensors": b"of another model"}
    own["model.safetensors.index.json"] = json.dumps(index).encode()
    server.repos["user/sharded"] = Repo({"main": own})
    frontend.open("user/sharded")
    assert "other.safetensors" not in server.fetched()


def test_a_revision_is_a_branch_or_a_commit(server, files, tmp_path):
    repo = server.repos["user/stories"] = Repo({"main": {}, "v1": files})
    commit = repo.commit("v1")
    assert commit is not None
    assert local("user/stories@v1") == local(f"user/stories@{commit[0]}")
    refused("user/stories@v2", "has no revision v2")


def test_a_repository_of_gguf_files(server):
    server.repos["user/one"] = Repo({"main": {"a.gguf": b"GGUF", "README.md": b""}})
    server.repos["user/two"] = Repo({"main": {"a.gguf": b"GGUF", "b.gguf": b"GGUF2"}})
    assert local("user/one").name == "a.gguf"
    assert local("user/two/b.gguf").read_bytes() == b"GGUF2"
    parts = {f"m-0000{i}-of-00002.gguf": b"GGUF" for i in (1, 2)}
    server.repos["user/parts"] = Repo({"main": parts})
    assert local("user/parts").name == "m-00001-of-00002.gguf"
    assert {path.name for path in local("user/parts").parent.iterdir()} == parts.keys()
    refused("user/two", "a.gguf, b.gguf", "add one to its name")
    refused("user/two/c.gguf", "has no file c.gguf")
    server.repos["user/none"] = Repo({"main": {"notes.txt": b""}})
    refused("user/none", "neither model.safetensors nor", "nor a .gguf file")


def test_what_the_hub_does_not_give_is_told_in_one_line(server, files, monkeypatch):
    server.repos["user/gated"] = Repo({"main": files}, gated=True)
    server.repos["user/secret"] = Repo({"main": files}, private=True)
    refused("user/gated", "is gated", "accept its terms", "HF_TOKEN")
    refused("user/secret", "no such file or folder", "or it is private", "HF_TOKEN")
    refused("models/mistyped", "no such file or folder", "the Hugging Face hub has no model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert frontend.open("user/gated").vocabulary == frontend.open("user/secret").vocabulary


def test_without_network_the_cache_is_read(server, files, monkeypatch):
    from huggingface_hub import constants

    server.repos["user/stories"] = Repo({"main": files})
    before = local("user/stories")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._fetched.cache_clear()
    asked = len(server.asked)
    assert local("user/stories") == before
    refused("user/other", "HF_HUB_OFFLINE is set")
    assert len(server.asked) == asked


def test_a_hub_that_cannot_be_reached_is_told(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("user/stories", "no such file or folder", "cannot be reached")


def test_the_hub_is_that_of_the_environment(server, files, tmp_path):
    server.repos["user/stories"] = Repo({"main": files})
    own = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    code = "from atd.checkpoint.hub import local; print(local('user/stories'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | own | {"PYTHONPATH": str(Path(hub.__file__).parents[2])},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert (folder / "config.json").read_bytes() == files["config.json"]
