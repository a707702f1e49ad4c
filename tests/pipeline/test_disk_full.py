"""A disk that is full at any moment of a run: one clear message, nothing half-written at OUT, and
the same command ends in the same bytes once there is space again.
"""

import math
import shutil
from pathlib import Path

import pytest

from atd.checkpoint.folder import MANIFEST, partial_folder, read_manifest
from atd.errors import RunFailed
from atd.exports.hf import export_hf
from atd.pipeline.convert import convert
from atd.pipeline.integrity import verify_checkpoint
from tests.fuzz.failing_disk import full_disk

GOLDEN = Path(__file__).parents[1] / "golden"


def _convert(source: Path, out: Path) -> None:
    convert(source, out, "datafree2", cache=out.with_name("cache"), say=lambda line: None)


def _export(source: Path, out: Path) -> None:
    export_hf(source, out, say=lambda line: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "source"
    shutil.copytree(GOLDEN / "llama_bias", folder)
    shutil.copy(GOLDEN / "stories" / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("run", [_convert, _export])
@pytest.mark.parametrize("step", [25, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_moment(run, step, source, tmp_path):
    with full_disk() as used:
        run(source, tmp_path / "whole")
    sound = read_manifest(tmp_path / "whole")
    assert used.count > 20
    for full in range(0, used.count, step):
        out = tmp_path / f"out-{full}"
        with full_disk(full, full if full % 2 else math.inf):
            refusal = _refusal(run, source, out)
        assert refusal is None or "the disk is full" in refusal, full
        if out.exists():  # whole already; what is left is to tidy up
            assert (out / MANIFEST).exists(), full
        else:
            run(source, out)
        assert read_manifest(out) == sound, full
        verify_checkpoint(out)
        shutil.rmtree(out)
        partial = partial_folder(out)
        assert {path.name for path in tmp_path.iterdir()} <= {"whole", "cache", partial.name}, full
        shutil.rmtree(partial, ignore_errors=True)


def _refusal(run, source: Path, out: Path) -> str | None:
    """The message that a run ends with, None where it ends well."""
    try:
        run(source, out)
    except RunFailed as error:
        return str(error)
    return None
