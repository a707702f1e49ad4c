"""Writing: shards that other readers understand, the journal, and targets that are refused."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from atd.checkpoint.folder import (
    MANIFEST,
    check_space,
    check_target,
    finish,
    foreign,
    open_result,
    partial_folder,
    result_folder,
    write_manifest,
)
from atd.checkpoint.journal import JournalEntry, append_journal, journal_file, read_journal
from atd.checkpoint.writer import digest, file_digest, write_shard
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
    folder = tmp_path / "result"
    entries = [
        JournalEntry(f"u{i}", "key", f"s{i}", "sha", {"t": "d"}, [{"node": "n"}]) for i in range(3)
    ]
    append_journal(folder, entries[0])
    append_journal(folder, entries[1])
    path = journal_file(folder)
    path.write_bytes(path.read_bytes()[:-10])
    assert read_journal(folder) == {"s0": entries[0]}
    append_journal(folder, entries[2])
    assert read_journal(folder) == {"s0": entries[0], "s2": entries[2]}
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n[1]\n")
    assert read_journal(folder) == {"s0": entries[0], "s2": entries[2]}


def test_a_journal_line_that_was_changed_is_no_entry(tmp_path):
    folder = tmp_path / "result"
    append_journal(folder, JournalEntry("u", "key", "s", "sha", {"t": "d"}, [{"node": "n"}]))
    sound = journal_file(folder).read_bytes()
    for i in range(len(sound) - 1):
        journal_file(folder).write_bytes(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :])
        assert read_journal(folder) == {}


def test_targets_that_are_refused(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match=r"exists; choose another name$"):
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
        open_result(tmp_path / "out"),
        pytest.raises(BadInput, match="another run is writing"),
        open_result(tmp_path / "out"),
    ):
        pass
    assert os.listdir(tmp_path) == []


def made(folder: Path, content: str = "ours") -> Path:
    """A folder as atd writes it, with one file `data`."""
    folder.mkdir(exist_ok=True)
    (folder / "data").write_text(content)
    files = {"data": file_digest(folder / "data"), "dropped": "of a file that is gone"}
    (folder / MANIFEST).write_text(json.dumps({"atd": "1.0", "files": files}))
    (folder / "report.json").write_text(json.dumps({"nodes": []}))
    return folder


def nothing(target: Path) -> None:
    pass


def finished(target: Path, content: str, overwrite: bool = False, meanwhile=nothing) -> None:
    """A run that writes the folder `made` makes, and what happens to the target meanwhile."""
    with open_result(target) as result:
        meanwhile(target)
        (result.parent / "stage-0").mkdir(exist_ok=True)
        (result / "after-0").mkdir(exist_ok=True)
        append_journal(result, JournalEntry("u", "key", "data", "sha", {}, []))
        made(result, content)
        finish(target, result, ["data", MANIFEST, "report.json"], overwrite)


def contents(folder: Path) -> dict[str, bytes | str]:
    """All files and links below a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


def test_finish_replaces_whole_and_keeps_nothing_else(tmp_path):
    target = tmp_path / "out"
    for content in ("first", "second"):
        finished(target, content, overwrite=True)
        assert set(os.listdir(target)) == {"data", MANIFEST, "report.json"}
        assert (target / "data").read_text() == content
        assert os.listdir(tmp_path) == ["out"]


def test_an_overwrite_cut_off_between_its_renames_is_undone(tmp_path):
    aside = tmp_path / ".out.atd-replaced"
    aside.mkdir()
    (aside / MANIFEST).write_text(json.dumps({"files": {}}))
    with pytest.raises(BadInput, match="exists"):
        check_target(tmp_path / "out", tmp_path / "model", overwrite=False)
    assert (tmp_path / "out" / MANIFEST).exists()


# --- what is not ours is not deleted ---


def a_file(path: Path) -> None:
    path.write_text("years of work")


def an_empty_folder(path: Path) -> None:
    path.mkdir()


def a_link(path: Path) -> None:
    path.symlink_to(made(path.parent / "elsewhere").name)


def a_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def with_another_file(path: Path) -> None:
    (made(path) / "notes.txt").write_text("years of work")


def with_a_folder(path: Path) -> None:
    (made(path) / "experiments").mkdir()


def with_a_changed_file(path: Path) -> None:
    (made(path) / "data").write_text("edited")


def with_a_linked_file(path: Path) -> None:
    (made(path) / "data").unlink()
    (path.parent / "data").write_text("ours")
    (path / "data").symlink_to("../data")


def with_another_report(path: Path) -> None:
    (made(path) / "report.json").write_text('{"of": "mine"}')


def with_an_edited_report(path: Path) -> None:
    made(path)
    write_manifest(path, {"atd": "1.0"}, {"data": file_digest(path / "data")})
    (path / "report.json").write_text('{"nodes": [], "notes": "years of work"}')


def with_the_manifest_of_another_tool(path: Path) -> None:
    path.mkdir()
    (path / MANIFEST).write_text('{"name": "an extension", "files": {}}')
    (path / "report.json").write_text('{"nodes": []}')


FOREIGN = {
    "it is no folder": (a_file, a_link, a_broken_link),
    "it has no manifest.json": (an_empty_folder,),
    "atd did not write its notes.txt": (with_another_file,),
    "atd did not write its experiments": (with_a_folder,),
    "its data was changed since atd wrote it": (with_a_changed_file,),
    "its data is no file": (with_a_linked_file,),
    "it has no 'nodes'": (with_another_report,),
    "its report.json was changed since atd wrote it": (with_an_edited_report,),
    "its manifest.json is none of atd's": (with_the_manifest_of_another_tool,),
}
CASES = [(make, reason) for reason, all in FOREIGN.items() for make in all]


@pytest.mark.parametrize(("make", "reason"), CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_not_ours_is_refused_and_stays(tmp_path, make, reason):
    target = tmp_path / "out"
    make(target)
    before = contents(tmp_path)
    assert reason in str(foreign(target))
    for overwrite in (False, True):
        with pytest.raises(BadInput, match=r"out exists|is no checkpoint that atd made"):
            check_target(target, tmp_path / "model", overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("make", "reason"), CASES, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_a_run_stays_and_the_run_goes_on_behind_it(
    tmp_path, make, reason, overwrite
):
    target = tmp_path / "out"
    with pytest.raises(BadInput, match=r"exists|not overwritten") as refusal:
        finished(target, "ours", overwrite, make)
    assert "is kept: once" in str(refusal.value)
    assert not overwrite or reason in str(refusal.value)
    (tmp_path / "other").mkdir()
    make(tmp_path / "other" / "out")
    partial = partial_folder(target)
    assert {
        name: content
        for name, content in contents(tmp_path).items()
        if not name.startswith(("other", partial.name))
    } == contents(tmp_path / "other")
    assert read_journal(result_folder(target)).keys() == {"data"}
    os.rename(target, tmp_path / "mine")
    finished(target, "ours")
    assert (target / "data").read_text() == "ours"


def test_without_overwrite_even_ours_that_appears_during_a_run_stays(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(BadInput, match="exists"):
        finished(target, "of this run", meanwhile=lambda target: made(target, "of another run"))
    assert (target / "data").read_text() == "of another run"


def test_what_was_left_aside_is_deleted_only_if_it_is_ours(tmp_path):
    target, aside = made(tmp_path / "out"), made(tmp_path / ".out.atd-replaced")
    (aside / "notes.txt").write_text("years of work")
    with pytest.raises(BadInput, match=r"atd-replaced is no checkpoint.*notes\.txt"):
        finished(target, "new", overwrite=True)
    assert (target / "data").read_text() == "ours"
    (aside / "notes.txt").unlink()
    finished(target, "new", overwrite=True)
    assert (target / "data").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_between_the_renames_puts_the_former_output_back(tmp_path, monkeypatch):
    target, rename = made(tmp_path / "out"), os.rename

    def failing(a, b):
        if Path(a).name == "result":
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(RunFailed, match="Input/output error"):
        finished(target, "new", overwrite=True)
    assert (target / "data").read_text() == "ours"
    monkeypatch.undo()
    finished(target, "new", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_a_partial_folder_that_atd_did_not_make_is_not_used(tmp_path):
    partial = partial_folder(tmp_path / "out")
    partial.mkdir()
    (partial / "notes.txt").write_text("years of work")
    with (
        pytest.raises(BadInput, match="not a folder of an unfinished run"),
        open_result(tmp_path / "out"),
    ):
        pass
    assert os.listdir(partial) == ["notes.txt"]


def test_a_manifest_that_names_other_folders_is_damaged(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    folder = made(tmp_path / "out")
    files = {"../thesis.txt": file_digest(tmp_path / "thesis.txt")}
    (folder / MANIFEST).write_text(json.dumps({"atd": "1.0", "files": files}))
    (folder / "data").unlink()
    assert "expected plain file names" in str(foreign(folder))
    with pytest.raises(BadInput, match="expected plain file names"):
        finished(folder, "new", overwrite=True)
    assert (tmp_path / "thesis.txt").exists()
