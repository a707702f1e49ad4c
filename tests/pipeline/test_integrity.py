"""verify_checkpoint: what is not as it was written is found."""

import json
import re
import shutil
from pathlib import Path

import pytest

from atd.checkpoint.folder import CARD, MANIFEST, REPORT, read_manifest, write_manifest
from atd.checkpoint.safetensors import SINGLE, shard_name
from atd.errors import BadInput, RunFailed
from atd.pipeline.convert import convert
from atd.pipeline.integrity import verify_checkpoint


@pytest.fixture(scope="module")
def converted(stories260k, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    return convert(stories260k, out, "datafree2", say=lambda line: None)


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    return shutil.copytree(converted, tmp_path / "copy")


def test_a_file_that_the_manifest_does_not_have_is_not_taken_for_the_models(copy):
    """model.safetensors is read in place of an index and its shards."""
    (copy / "README.md").write_text("notes")
    verify_checkpoint(copy)
    shutil.copy(copy / shard_name(0, 7), copy / SINGLE)
    with pytest.raises(RunFailed, match=r"model\.safetensors would be read, but manifest\.json"):
        verify_checkpoint(copy)


def test_a_file_that_was_dropped_from_the_manifest_is_found(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    for name in read_manifest(copy):
        files = {other: sha256 for other, sha256 in manifest["files"].items() if other != name}
        write_manifest(copy, manifest, files)
        if name not in ("recipe.toml", CARD):  # which no reader of the model asks for
            with pytest.raises(RunFailed, match=f"{name} would be read"):
                verify_checkpoint(copy)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "../out", ""])
def test_names_that_no_file_can_have_are_refused(copy, name):
    (copy / MANIFEST).write_text(json.dumps({"atd": "0", "files": {name: "0"}}))
    with pytest.raises(BadInput, match="expected plain file names"):
        verify_checkpoint(copy)


def test_a_change_of_the_report_is_found_but_for_its_times(copy):
    report = (copy / REPORT).read_text()
    (copy / REPORT).write_text(re.sub(r'("seconds": )[^,]+', r"\g<1>1e-05", report))
    verify_checkpoint(copy)
    for other in (report.replace('"bits": 3', '"bits": 2', 1), report + " ", "{}"):
        (copy / REPORT).write_text(other)
        with pytest.raises(RunFailed, match=r"report\.json is not what was written"):
            verify_checkpoint(copy)
    (copy / REPORT).unlink()
    with pytest.raises(RunFailed, match=r"report\.json is not what was written"):
        verify_checkpoint(copy)


def test_a_change_of_the_manifest_is_found(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    left_out = {key: value for key, value in manifest.items() if key != "sha256"}
    for other in (manifest | {"jax": "9.9.9"}, manifest | {"more": 1}, left_out):
        (copy / MANIFEST).write_text(json.dumps(other))
        with pytest.raises(BadInput, match=r"manifest\.json: damaged: it was changed"):
            verify_checkpoint(copy)


def test_a_manifest_without_digests_of_report_and_itself_is_read(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    early = {key: value for key, value in manifest.items() if key not in ("report", "sha256")}
    (copy / MANIFEST).write_text(json.dumps(early))
    verify_checkpoint(copy)
