"""What a calibrated conversion takes is said before it begins, and a limit changes no byte."""

from contextlib import nullcontext

import jax
import numpy as np
import pytest

from atd.calibration.memory import PROCESS, available, device_memory, memory
from atd.calibration.room import Batches, Room
from atd.checkpoint.folder import read_manifest
from atd.errors import BadInput
from atd.models import frontend
from atd.pipeline.convert import convert
from atd.pipeline.recipe import Recipe, read_recipe
from tests.models.tiny import tiny_graph

LESS = ["decompose.trellis=", "decompose.refits=0", "decompose.sweeps=0"]


def test_what_is_taken_follows_the_shapes():
    one, other = (memory(tiny_graph(mlp=48), tokens, 16) for tokens in (1000, 3000))
    weights, outputs = 2 * 32 + 3 * 32 * 32 + 3 * 48 * 32, 4 * 32 + 2 * 48
    batch = 2 * outputs + 4 * 16  # floats of a token: values, and scores of attention
    work = 3 * weights + 8 * 48 * 48
    assert one.work == PROCESS + 4 * (work + 1000 * batch)
    assert other.work == PROCESS + 4 * (work + 3000 * batch)
    assert one.streams == 2 * 2 * 1000 * 32
    assert one.inner == 2 * 4 * 1000 * (3 * 32 + 48)
    assert (other.streams, other.inner) == (3 * one.streams, 3 * one.inner)


def test_lines_say_what_finds_no_room():
    needed = memory(tiny_graph(), 10**8, 16)  # 12.8 GB, and 115.2 GB
    assert "12.8 GB for the residual streams; 115.2 GB" in needed.under(200e9)
    assert "computed again where there is no room" in needed.under(100e9)
    assert "in files where there is no room" not in needed.under(100e9)
    assert "in files where there is no room" in needed.under(10e9)
    assert needed.left(10e9) == 10e9 - needed.work
    with pytest.raises(BadInput, match=r"0\.1 GB of memory are too little.*take 0\.5 GB"):
        needed.left(0.1e9)


def test_a_device_with_memory_of_its_own_is_counted_apart(monkeypatch):
    needed = memory(tiny_graph(mlp=48), 1000, 16)
    weights, outputs = 2 * 32 + 3 * 32 * 32 + 3 * 48 * 32, 4 * 32 + 2 * 48
    batch = 2 * outputs + 4 * 16
    assert needed.device == 4 * (2 * weights + 3 * 48 * 48 + 1000 * batch) < needed.work
    assert device_memory() is None or jax.default_backend() != "cpu"
    assert "on each device" not in needed.under(1e9)
    for there in (needed.device, needed.device - 1):
        monkeypatch.setattr("atd.calibration.memory.device_memory", lambda there=there: there)
        assert "0.0 GB on each device; " in needed.under(1e9)
        with (
            nullcontext()
            if there == needed.device
            else pytest.raises(BadInput, match="XLA_PYTHON_CLIENT_MEM_FRACTION")
        ):
            needed.check_device()


def test_there_is_memory():
    assert available() > 1e8


def test_room_is_taken_and_given_back():
    room = Room(100)
    assert room.take(60)
    assert not room.take(41)
    room.give_back(60)
    assert room.take(100)
    assert Room().take(1 << 60)


def test_batches_in_files_are_what_was_put_there(tmp_path):
    arrays = [np.full((2, 3), i, np.int32) for i in range(3)]
    put = np.random.default_rng(0).standard_normal((4, 1)).astype(np.float32)
    in_files, in_memory = Batches(arrays, tmp_path / "x"), Batches(arrays)
    for batches in (in_files, in_memory):
        batches[1] = put
        assert [batch.shape for batch in batches] == [(2, 3), (4, 1), (2, 3)]
        assert batches[1].dtype == np.float32
        np.testing.assert_allclose(batches[1], put, rtol=2**-8)
        np.testing.assert_array_equal(batches[2], arrays[2])
    np.testing.assert_array_equal(in_files[1], in_memory[1])
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["1.npy"]
    in_files.remove()
    assert not [*(tmp_path / "x").iterdir()]


@pytest.mark.exact
def test_a_limit_changes_no_byte(stories260k, small, tmp_path):
    chosen = read_recipe("ternary2", LESS)
    chosen = Recipe(chosen.pipeline, calibration_tokens=2048, calibration_context=256)
    needed, lines = memory(frontend.open(stories260k), 2048, 256), []

    def made(name: str, **options):
        return convert(stories260k, tmp_path / name, chosen, calib=small.calibration, **options)

    free = made("free", say=lines.append)
    tight = made("tight", limit=needed.work + 1000, say=lines.append)
    assert read_manifest(tight) == read_manifest(free)
    said = [line for line in lines if line.startswith("memory: ")]
    assert ["in files" in line for line in said] == [False, True]
    assert not (tmp_path / "tight.partial").exists()
    lines.clear()
    with pytest.raises(BadInput, match="memory are too little"):
        made("less", limit=needed.work - 1000, say=lines.append)
    assert not any(line.startswith("calibration: ") for line in lines)  # before text is there
