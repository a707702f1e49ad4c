"""Folders go to the hub, and come back as they were."""

import shutil

import pytest

from atd.checkpoint.folder import read_manifest
from atd.errors import BadInput, RunFailed
from atd.pipeline.convert import convert
from atd.pipeline.integrity import verify_checkpoint
from atd.pipeline.push import push
from tests.checkpoint.fake_hub import TOKEN, Repo, used


@pytest.fixture
def server(monkeypatch, tmp_path):
    with used(monkeypatch, tmp_path) as fake:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield fake


@pytest.fixture(scope="module")
def made(packaged, tmp_path_factory):
    out = tmp_path_factory.mktemp("push") / "out"
    return convert(packaged.folder, out, "datafree2", say=lambda line: None)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def test_a_folder_comes_back_as_it_was(server, folder):
    (folder / "notes.txt").write_text("not of atd")
    assert push(folder, "user/stories", private=True) == f"{server.endpoint}/user/stories"
    assert server.repos["user/stories"].private
    assert verify_checkpoint("user/stories") == verify_checkpoint(folder)
    there = server.repos["user/stories"].branches["main"]
    assert set(there) == {*read_manifest(folder), "manifest.json", "report.json"}
    assert len([line for line in server.asked if "/commit/" in line]) == 1


def test_a_card_of_the_users_own_goes_up(server, folder):
    (folder / "README.md").write_text("# My model\n")
    push(folder, "user/stories")
    assert server.repos["user/stories"].branches["main"]["README.md"] == b"# My model\n"


def test_a_branch_is_made_and_old_shards_go(server, folder):
    server.repos["user/stories"] = Repo({"main": {"old.safetensors": b"1", "notes": b"2"}})
    address = push(folder, "user/stories", revision="two")
    assert address == f"{server.endpoint}/user/stories/tree/two"
    branches = server.repos["user/stories"].branches
    assert "config.json" in branches["two"]
    assert "notes" in branches["two"]
    assert "old.safetensors" not in branches["two"]
    assert set(branches["main"]) == {"old.safetensors", "notes"}


def test_a_broken_folder_stays_here(server, folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(RunFailed, match="is not what was written"):
        push(folder, "user/stories")
    assert not server.asked


@pytest.mark.parametrize("name", ["stories", "user/stories@main", "user/repo/a.gguf", "/a/b"])
def test_what_is_no_name_is_refused(folder, name):
    with pytest.raises(BadInput, match="expected user/repo"):
        push(folder, name)


def test_without_a_token_the_way_out_is_told(server, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadInput, match=r"gives no access to user/stories: set HF_TOKEN"):
        push(folder, "user/stories")


def test_the_command_prints_the_address(server, folder, atd):
    code, out, err = atd("push", folder, "user/stories")
    assert code == 0, err
    assert f"{server.endpoint}/user/stories: uploaded" in out
