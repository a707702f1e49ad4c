"""convert() on real weights: bytes that repeat, interruption at any moment, bad input, nothing
lost.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import atd
from atd.checkpoint.folder import (
    MANIFEST,
    REPORT,
    read_manifest,
    result_folder,
    write_manifest,
)
from atd.checkpoint.journal import journal_file, read_journal
from atd.checkpoint.writer import file_digest, write_shard
from atd.errors import BadInput, RunFailed
from atd.models import frontend
from atd.passes.decompose import Decompose
from atd.passes.pack import Pack
from atd.passes.verify import Verify
from atd.pipeline import Pipeline, driver
from atd.pipeline.convert import convert
from atd.pipeline.integrity import verify_checkpoint
from tests.models.tiny import change_in_place

ROOT = Path(__file__).parents[2]


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def converted(stories260k, tmp_path_factory) -> Path:
    return convert(
        stories260k, tmp_path_factory.mktemp("converted") / "out", "datafree2", say=quiet
    )


def test_the_folder_says_how_it_was_made(converted, stories260k):
    config = json.loads((converted / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "atd"
    assert config["hidden_size"] == 64
    report = json.loads((converted / "report.json").read_text())
    assert len(report["nodes"]) == 5 * 7 + 1
    rows = {row["node"]: row for row in report["nodes"]}
    assert 0.05 < rows["model.layers.0.self_attn.v_proj"]["error"] < 0.25
    # 13 cells of 2 bytes, 2 fp16 scales per row of 64
    assert rows["model.layers.0.self_attn.v_proj"]["bits"] == pytest.approx(8 * (13 * 2 + 4) / 64)
    assert rows["model.embed_tokens"]["error"] is None
    assert (converted / "tokenizer.json").read_bytes() == (
        stories260k / "tokenizer.json"
    ).read_bytes()
    assert [path.name for path in converted.parent.iterdir()] == [converted.name]
    assert {path.name for path in converted.iterdir()} == {
        *read_manifest(converted),
        MANIFEST,
        REPORT,
    }


@pytest.mark.exact
def test_the_same_input_gives_the_same_bytes_and_so_does_its_own_recipe(
    converted, stories260k, tmp_path
):
    again = convert(stories260k, tmp_path / "again", converted / "recipe.toml", say=quiet)
    assert read_manifest(again) == read_manifest(converted)


@pytest.mark.exact
def test_what_was_written_is_what_was_computed(converted, stories260k):
    graph = frontend.open(converted)
    lazy = Pipeline([Decompose(), "fuse", Pack()])(frontend.open(stories260k))
    assert str(graph) == str(lazy)
    for (_, written), (_, computed) in zip(graph.weights(), lazy.weights(), strict=True):
        np.testing.assert_array_equal(written.load().dequantize(), computed.load().dequantize())


def test_a_converted_model_is_no_input_for_another_decomposition(converted, tmp_path):
    with pytest.raises(BadInput, match="matches none of the dense matrices"):
        convert(converted, tmp_path / "twice", "datafree2", say=quiet)


@pytest.mark.exact
def test_a_converted_model_can_be_laid_anew(converted, tmp_path):
    other = convert(
        converted, tmp_path / "other", Pipeline([Pack(layout="bit-ttt"), Verify()]), say=quiet
    )
    for (_, a), (_, b) in zip(
        frontend.open(converted).weights(), frontend.open(other).weights(), strict=True
    ):
        np.testing.assert_array_equal(a.load().dequantize(), b.load().dequantize())
    assert "layout=bit-ttt/1" in (other / "atd_graph.json").read_text()


@pytest.mark.exact
def test_a_pipeline_with_two_stages(stories260k, converted, tmp_path):
    """verify in the middle makes the driver write, re-read and go on from what was written."""
    out = convert(
        stories260k,
        tmp_path / "out",
        Pipeline([Decompose(), Verify(), "fuse", Pack(), Verify()]),
        say=quiet,
    )
    shards = {
        name: sha for name, sha in read_manifest(out).items() if name.endswith(".safetensors")
    }
    assert shards == {
        name: sha for name, sha in read_manifest(converted).items() if name.endswith(".safetensors")
    }


def test_verify_finds_a_flipped_bit(converted, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(converted, damaged)
    assert verify_checkpoint(damaged) == 5 * 6 + 2
    shard = damaged / "model-00003-of-00007.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        RunFailed, match=r"model-00003-of-00007\.safetensors is not what was written"
    ):
        verify_checkpoint(damaged)
    data[-1] = (
        0  # no code of the layout; with a manifest that agrees, the values alone give it away
    )
    shard.write_bytes(data)
    manifest = json.loads((damaged / MANIFEST).read_text())
    write_manifest(damaged, manifest, manifest["files"] | {shard.name: file_digest(shard)})
    with pytest.raises(RunFailed, match="1 bytes are no codes of layout aligned"):
        verify_checkpoint(damaged)


def test_the_pass_verify_finds_a_disk_that_lies(stories260k, tmp_path, monkeypatch):
    write = write_shard

    def lying(path, refs):
        digests = write(path, refs)
        if "00004" in path.name:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        return digests

    monkeypatch.setattr(driver, "write_shard", lying)
    with pytest.raises(RunFailed, match="read back from the disk is not what was written"):
        convert(stories260k, tmp_path / "out", "datafree2", say=quiet)
    assert not (tmp_path / "out").exists()


# --- NaN and Inf ---


@pytest.fixture
def with_nan(stories260k, tmp_path) -> Path:
    folder = tmp_path / "nan"
    shutil.copytree(stories260k, folder)
    os.chmod(folder, 0o755)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors[
        "model.layers.2.mlp.up_proj.weight"
    ].copy()
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = np.nan
    os.remove(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_nan_is_refused_by_name_or_becomes_zero(with_nan, tmp_path):
    with pytest.raises(
        BadInput,
        match=r"model\.layers\.2\.mlp\.up_proj\.weight holds 1 NaN or Inf values, "
        r"the first at \[3, 5\]",
    ):
        convert(with_nan, tmp_path / "out", "datafree2", say=quiet)
    assert not (tmp_path / "out").exists()
    said = []
    from dataclasses import replace

    from atd.pipeline.recipe import read_recipe

    out = convert(
        with_nan,
        tmp_path / "out",
        replace(read_recipe("datafree2"), nonfinite="zero"),
        say=said.append,
    )
    assert any("replaced by 0" in line for line in said)
    assert np.isfinite(
        frontend.open(out).blocks[2].node("mlp.gate_up_proj").weights["weight"].load().dequantize()
    ).all()


# --- interruption ---


def run_convert(model: Path, out: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "atd.convert_adaptive",
        str(model),
        str(out),
        "--recipe",
        "datafree3",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    # A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
    # A handler they don't.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.exact
@pytest.mark.slow
def test_kill_at_random_moments_ends_in_the_same_bytes(trained, tmp_path):
    """kill -9 again and again, then a run to the end: the digests of an undisturbed run."""
    started = time.monotonic()
    whole = run_convert(trained.folder, tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr
    duration = time.monotonic() - started
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moments, out, kept = random.Random(seed), tmp_path / "killed", set()
    for _ in range(3):
        process = run_convert(trained.folder, out)
        try:
            process.wait(moments.uniform(0.25, 0.9) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if out.exists():  # finished; perhaps killed on its way out, with nothing left to write
            break
        assert process.returncode == -signal.SIGKILL
        now = set(read_journal(result_folder(out)))
        assert kept <= now, "a finished unit was lost"
        kept = now
    if not out.exists():
        final = run_convert(trained.folder, out)
        _, errors = final.communicate()
        assert final.returncode == 0, errors
    assert read_manifest(out) == read_manifest(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["killed", "whole"]


def test_ctrl_c_leaves_one_line_and_a_run_that_goes_on(trained, tmp_path):
    result = result_folder(tmp_path / "out")
    journal = journal_file(result)
    for _ in range(5):  # on a busy machine the run may end before the signal comes
        process = run_convert(trained.folder, tmp_path / "out")
        while process.poll() is None and not (journal.exists() and journal.stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        if process.returncode != 0:
            break
        shutil.rmtree(tmp_path / "out")
    assert process.returncode == 130, errors
    assert (
        errors.strip().splitlines()[-1]
        == "interrupted; a conversion goes on where it stopped when the same command is given again"
    )
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    finished = read_journal(result)
    times = {entry.shard: (result / entry.shard).stat().st_mtime_ns for entry in finished.values()}
    assert times
    convert(trained.folder, tmp_path / "out", "datafree3", say=quiet)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times} == times, (
        "finished units were written again"
    )


def test_another_recipe_does_not_take_up_what_the_first_left(
    stories260k, converted, tmp_path, monkeypatch
):
    write, calls = write_shard, []

    def stop_after_three(path, refs):
        calls.append(path.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(path, refs)

    monkeypatch.setattr(driver, "write_shard", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        convert(stories260k, tmp_path / "out", "datafree3", say=quiet)
    monkeypatch.setattr(driver, "write_shard", write)
    assert read_manifest(
        convert(stories260k, tmp_path / "out", "datafree2", say=quiet)
    ) == read_manifest(converted)


def test_a_source_that_changed_is_converted_again(stories260k, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(stories260k, source)
    os.chmod(source, 0o755)
    tensors = load_file(source / "model.safetensors")
    first = convert(source, tmp_path / "out", "datafree2", say=quiet)
    before = read_manifest(first)
    os.remove(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors[
        "model.layers.0.mlp.up_proj.weight"
    ] * np.float16(2)
    save_file(tensors, source / "model.safetensors")
    after = read_manifest(convert(source, tmp_path / "out", "datafree2", overwrite=True, say=quiet))
    assert {name for name in before if before[name] != after[name]} == {
        "model-00002-of-00007.safetensors"
    }


class Stopped(Exception):
    """Stands for kill -9."""


def cut_off(*arguments, **options) -> None:
    """A conversion that ends after three units."""
    done = []

    def three_units(now) -> None:
        done.append(now.task == "converting")
        if sum(done) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        convert(*arguments, **options, say=quiet, progress=three_units)


@pytest.mark.exact
def test_a_model_of_equal_size_and_time_is_another_model(stories260k, converted, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(stories260k, source)
    os.chmod(source, 0o755)
    change_in_place(source / "model.safetensors")
    cut_off(source, out, "datafree2")
    change_in_place(source / "model.safetensors")  # back again
    assert read_manifest(convert(source, out, "datafree2", say=quiet)) == read_manifest(converted)


def test_a_model_that_is_replaced_meanwhile_is_noticed(stories260k, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(stories260k, source)
    os.chmod(source, 0o755)
    file = source / "model.safetensors"
    status = file.stat()

    def replaced(now) -> None:
        if now.task == "converting" and now.ended:
            shutil.copy(stories260k / file.name, source / "new")
            os.utime(source / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
            (source / "new").rename(file)

    with pytest.raises(RunFailed, match=r"model\.safetensors was changed while it was read"):
        convert(source, tmp_path / "out", "datafree2", say=quiet, progress=replaced)
    assert not (tmp_path / "out").exists()


@pytest.mark.exact
def test_other_settings_of_jax_do_not_go_on_with_what_is_there(
    stories260k, converted, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(driver, "numerics", lambda: {"jax_enable_x64": "True"})
        cut_off(stories260k, out, "datafree2")
    written = []

    def counted(path, refs):
        written.append(path.name)
        return write_shard(path, refs)

    monkeypatch.setattr(driver, "write_shard", counted)
    assert read_manifest(convert(stories260k, out, "datafree2", say=quiet)) == read_manifest(
        converted
    )
    assert len(written) == 7


# --- refusals ---


def test_an_existing_output_is_not_touched(stories260k, converted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    with pytest.raises(
        BadInput, match="exists; choose another name, or replace it with --overwrite"
    ):
        convert(stories260k, out, "datafree2", say=quiet)
    assert read_manifest(out) == read_manifest(converted)
    convert(stories260k, out, "datafree3", overwrite=True, say=quiet)
    assert verify_checkpoint(out)
    assert read_manifest(out) != read_manifest(converted)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_output_during_a_run_stays(
    stories260k, converted, tmp_path, monkeypatch, overwrite
):
    out = tmp_path / "out"

    def thesis(now) -> None:
        if not out.exists():
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    options = {"overwrite": overwrite, "say": quiet}
    with pytest.raises(BadInput, match="is kept: once"):
        convert(stories260k, out, "datafree2", **options, progress=thesis)
    assert (out / "thesis.txt").read_text() == "years of work"
    out.rename(tmp_path / "thesis")
    monkeypatch.setattr(driver, "write_shard", None)  # all units are finished
    assert read_manifest(convert(stories260k, out, "datafree2", **options)) == read_manifest(
        converted
    )
    assert sorted(os.listdir(tmp_path)) == ["out", "thesis"]


def test_a_full_disk_is_seen_before_the_work(stories260k, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(BadInput, match=r"the disk has 0\.0 MB free"):
        convert(stories260k, tmp_path / "out", "datafree2", say=quiet)


def test_names_at_the_top(stories260k, tmp_path):
    """The five lines of the README."""
    out = atd.convert(stories260k, tmp_path / "out", recipe="datafree3")
    model = atd.load(out)
    assert model(np.zeros((1, 4), np.int32)).shape == (1, 4, 512)
