"""Writing: shards that other readers understand, the journal, and targets that are refused."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from atd.checkpoint.folder import MANIFEST, check_space, check_target, finish, open_partial
from atd.checkpoint.journal import JOURNAL, JournalEntry, append_journal, read_journal
from atd.checkpoint.writer import digest, write_file, write_shard
from atd.errors import BadInput, RunFailed
from atd.ir import WeightRef, in_memory
from atd.weights import Dense, DenseType, Ternary, TernaryType


def refs():
    rng = np.random.default_rng(0)
    type = TernaryType((3, 7), 2, "row", False, "f16")
    ternary = Ternary(
        rng.integers(-1, 2, (3, 7, 2)).astype(np.int8),
        rng.random((3, 1, 2)).astype(np.float16),
        type,
    )
    bf16 = Dense(rng.standard_normal((5, 3)).astype(ml_dtypes.bfloat16))
    return [
        in_memory("a.weight", ternary),
        in_memory("b.weight", bf16),
        in_memory("c.weight", Dense(rng.standard_normal(4).astype(np.float32))),
    ]


def test_shards_are_read_by_safetensors(tmp_path):
    path = tmp_path / "shard.safetensors"
    digests = write_shard(path, refs())
    with safe_open(path, "np") as file:
        assert (
            set(file.keys())
            == {"a.weight_trits", "a.scales", "b.weight", "c.weight"}
            == set(digests)
        )
        a, b, c = (ref.load() for ref in refs())
        assert isinstance(a, Ternary)
        assert isinstance(b, Dense)
        assert isinstance(c, Dense)
        np.testing.assert_array_equal(file.get_tensor("a.weight_trits"), a.trits)
        np.testing.assert_array_equal(file.get_tensor("a.scales"), a.scales)
        np.testing.assert_array_equal(file.get_tensor("b.weight"), b.array)
        np.testing.assert_array_equal(file.get_tensor("c.weight"), c.array)
        assert digests["b.weight"] == digest(file.get_tensor("b.weight"))
    assert os.listdir(tmp_path) == ["shard.safetensors"]


def test_data_that_is_not_of_its_type_is_not_written(tmp_path):
    wrong = WeightRef("a", DenseType((4,), "f32"), lambda: Dense(np.zeros(4, np.float16)))
    with pytest.raises(RunFailed, match="its type says float32, its data is float16"):
        write_shard(tmp_path / "s", [wrong])
    assert not (tmp_path / "s").exists()


def test_a_full_disk_is_one_clear_message(tmp_path):
    full = tmp_path / "full.safetensors"
    (tmp_path / "full.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"the disk is full\. What is finished is kept"):
        write_shard(full, refs())
    with pytest.raises(BadInput, match=r"needs 1000000000000\.0 MB"):
        check_space(tmp_path, 10**18)


def test_a_journal_line_that_was_cut_off_is_no_entry(tmp_path):
    entries = [
        JournalEntry(f"u{i}", "key", f"s{i}", "sha", {"t": "d"}, [{"node": "n"}]) for i in range(3)
    ]
    append_journal(tmp_path, entries[0])
    append_journal(tmp_path, entries[1])
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-10])
    assert read_journal(tmp_path) == {"s0": entries[0]}
    append_journal(tmp_path, entries[2])
    assert read_journal(tmp_path) == {"s0": entries[0], "s2": entries[2]}


def test_targets_that_are_refused(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(
        BadInput, match="exists; choose another name, or replace it with --overwrite"
    ):
        check_target(mine, source, overwrite=False)
    with pytest.raises(BadInput, match="no checkpoint that atd made, so it is not overwritten"):
        check_target(mine, source, overwrite=True)
    for target in (source, source / "inside", tmp_path):
        with pytest.raises(BadInput, match="must lie outside the model's folder"):
            check_target(target, source, overwrite=True)
    with pytest.raises(BadInput, match="cannot be made"):
        check_target(mine / "thesis.txt" / "out", source, overwrite=False)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # tests may run as root, who is refused nothing
    with pytest.raises(BadInput, match="no permission to write there"):
        check_target(tmp_path / "out", tmp_path / "model", overwrite=False)


def test_two_runs_do_not_write_the_same_target(tmp_path):
    with (
        open_partial(tmp_path / "out"),
        pytest.raises(BadInput, match="another run is writing"),
        open_partial(tmp_path / "out"),
    ):
        pass


def test_finish_replaces_whole_and_keeps_nothing_else(tmp_path):
    target = tmp_path / "out"
    for content in ("first", "second"):
        with open_partial(target) as partial:
            (partial / "stage-0").mkdir()
            write_file(partial / "data", content)
            finish(target, partial, ["data"])
        assert {p.name: p.read_text() for p in target.iterdir()} == {"data": content}
    assert os.listdir(tmp_path) == ["out"]


def test_an_overwrite_cut_off_between_its_renames_is_undone(tmp_path):
    aside = tmp_path / ".out.atd-replaced"
    aside.mkdir()
    (aside / MANIFEST).write_text(json.dumps({"files": {}}))
    with pytest.raises(BadInput, match="exists"):
        check_target(tmp_path / "out", tmp_path / "model", overwrite=False)
    assert (tmp_path / "out" / MANIFEST).exists()
