"""verify_checkpoint: what is not as it was written is found."""

import json
import shutil
from pathlib import Path

import pytest

from atd.checkpoint.folder import MANIFEST, read_manifest
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
        (copy / MANIFEST).write_text(json.dumps(manifest | {"files": files}))
        if name != "recipe.toml":  # which no reader of the model asks for
            with pytest.raises(RunFailed, match=f"{name} would be read"):
                verify_checkpoint(copy)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "../out", ""])
def test_names_that_no_file_can_have_are_refused(copy, name):
    (copy / MANIFEST).write_text(json.dumps({"atd": "0", "files": {name: "0"}}))
    with pytest.raises(BadInput, match="expected plain file names"):
        verify_checkpoint(copy)
