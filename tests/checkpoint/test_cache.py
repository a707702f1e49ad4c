"""The cache: what was saved comes back, and what is damaged counts as absent."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from atd.checkpoint.cache import Cache, cache_key
from atd.errors import BadInput, RunFailed
from atd.host import default_cache
from atd.kernels.settings import user_file

ARRAYS = {"losses model.layers.0.mlp": np.arange(3.0), "ids": np.array([[1, 2]], np.int32)}


def test_what_was_saved_comes_back(tmp_path):
    cache = Cache(tmp_path / "a" / "b")
    assert cache.load("x") is None
    cache.save("x", ARRAYS)
    found = cache.load("x")
    assert found is not None
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert cache.load("y") is None


@pytest.mark.parametrize("length", [0, 2, 100, 300])
def test_damaged_entries_count_as_absent(tmp_path, length):
    cache = Cache(tmp_path)
    cache.save("x", ARRAYS)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:length])
    assert cache.load("x") is None


def test_no_changed_byte_passes_for_what_was_saved(tmp_path):
    cache = Cache(tmp_path)
    cache.save("x", ARRAYS)
    (file,) = tmp_path.iterdir()
    sound = file.read_bytes()
    for i in range(len(sound)):
        file.write_bytes(sound[:i] + bytes([sound[i] ^ 4]) + sound[i + 1 :])
        assert cache.load("x") is None


def test_keys_say_what_the_entry_is_and_what_it_is_made_from():
    key = cache_key("windows", [1, "graph", None])
    assert key.startswith("windows-")
    assert key == cache_key("windows", [1, "graph", None])
    assert key != cache_key("windows", [2, "graph", None])


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cache folder cannot be made.*ATD_CACHE"):
        Cache(tmp_path / "file" / "folder").load("x")


def test_default_cache(monkeypatch, tmp_path):
    """Tuned settings of kernels are in the same folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("ATD_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("ATD_CACHE")
    assert default_cache() == tmp_path / "caches" / "atd"
    assert user_file("cpu").parent == default_cache() / "tuned"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache().parts[-2:] == (".cache", "atd")
    assert user_file("cpu").parent == default_cache() / "tuned"


def test_runs_that_save_one_entry_at_once_do_not_meet(tmp_path, monkeypatch):
    """Each has a temporary name of its own, and none is left."""
    cache, names, rename = Cache(tmp_path), set(), os.rename

    def counted(a, b):
        names.add(a)
        rename(a, b)

    monkeypatch.setattr(os, "rename", counted)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: cache.save("x", {"a": np.full(1000, i)}), range(12)))
    assert len(names) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    found = cache.load("x")
    assert found is not None
    assert len(set(found["a"].tolist())) == 1


def test_a_disk_that_fails_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(a, b):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(RunFailed, match="the disk is full"):
        Cache(tmp_path).save("x", ARRAYS)
    assert not list(tmp_path.iterdir())
