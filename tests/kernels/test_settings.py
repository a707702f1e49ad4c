"""Settings: the file of a device, the nearest entry, the rule of thumb."""

from dataclasses import replace

import pytest

from atd.kernels import settings as tuning
from atd.kernels.settings import Settings
from atd.kernels.triton.gemm import Tiles, unit
from atd.kernels.triton.gemv import Shape
from atd.weights import TernaryType


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.tuned.cache_clear()
    yield tmp_path
    tuning.tuned.cache_clear()


def matrix(out, inputs, bases=2, tied=True, group: int | str = "row"):
    return TernaryType((out, inputs), bases, group, tied, "f16")


def entry(tokens, out, inputs, bases=2, tied=True, group: int | str = "row", **settings):
    kind = tuning.kind_of(matrix(out, inputs, bases, tied, group), tokens)
    return kind | {"settings": Settings(**settings), "microseconds": {"gemv": 1.5}}


def test_tuned_settings_go_before_the_rule_of_thumb(folder):
    type = matrix(4096, 4096)
    assert tuning.settings("NVIDIA H200", type, 1) == tuning.heuristic(type, 1)
    path = tuning.write(
        "NVIDIA H200", "0.11.2", [entry(1, 4096, 4096, gemv=Shape(warps=2), tiles=Tiles(rows=16))]
    )
    assert path.name == "nvidia-h200.json"
    assert tuning.settings("NVIDIA H200", type, 1) == Settings(
        gemv=Shape(warps=2), tiles=Tiles(rows=16)
    )
    assert tuning.settings("NVIDIA L4", type, 1) == tuning.heuristic(type, 1)


def test_the_nearest_entry_is_taken(folder):
    entries = [
        entry(1, 4096, 4096, gemv=Shape(warps=1)),
        entry(1, 14336, 4096, gemv=Shape(warps=2)),
        entry(16, 4096, 4096, gemv=Shape(warps=4)),
    ]
    tuning.write("gpu", "0.11.2", [*entries, entry(1, 4096, 4096, bases=3, gemv=Shape(warps=8))])
    assert tuning.settings("gpu", matrix(4000, 4096), 2).gemv.warps == 1
    assert tuning.settings("gpu", matrix(10000, 4096), 1).gemv.warps == 2
    assert tuning.settings("gpu", matrix(14336, 4096), 64).gemv.warps == 4
    assert tuning.settings("gpu", matrix(4096, 4096, bases=3), 1).gemv.warps == 8


def test_a_matrix_of_another_size_takes_the_ways_of_the_nearest_and_its_own_shape(folder):
    tuning.write("gpu", "0.11.2", [entry(1, 28672, 4096, gemv=Shape(warps=16), gemv_tokens=5)])
    found, usual = (tuning.settings(device, matrix(4096, 4096), 1) for device in ("gpu", "none"))
    assert (found.gemv_tokens, found.gemv) == (5, usual.gemv)
    assert tuning.settings("gpu", matrix(24576, 4096), 1).gemv.warps == 16


def test_an_entry_of_another_kind_is_farther_than_one_of_other_tokens(folder):
    by_kind = [
        entry(16, 4096, 4096, gemv=Shape(warps=1)),
        entry(16, 4096, 4096, bases=3, gemv=Shape(warps=2)),
        entry(16, 4096, 4096, tied=False, gemv=Shape(warps=4)),
        entry(16, 4096, 4096, group=128, gemv=Shape(warps=8)),
    ]
    tuning.write("gpu", "0.11.2", [*by_kind, entry(64, 4096, 4096, group=32, gemv=Shape(warps=32))])
    assert tuning.settings("gpu", matrix(4096, 4096), 24).gemv.warps == 1
    assert tuning.settings("gpu", matrix(4096, 4096, bases=3), 40).gemv.warps == 2
    assert tuning.settings("gpu", matrix(4096, 4096, tied=False), 40).gemv.warps == 4
    assert tuning.settings("gpu", matrix(4096, 4096, group=64), 16).gemv.warps == 8
    assert tuning.settings("gpu", matrix(4096, 4096, group=64), 100).gemv.warps == 32


def test_entries_of_the_same_version_are_kept_and_others_are_not(folder):
    tuning.write(
        "gpu",
        "0.11.2",
        [entry(1, 64, 64, gemv=Shape(warps=1)), entry(2, 64, 64, gemv=Shape(warps=2))],
    )
    path = tuning.write("gpu", "0.11.2", [entry(2, 64, 64, gemv=Shape(warps=8))])
    assert [e["settings"].gemv.warps for e in tuning.tuned("gpu")] == [1, 8]
    assert (
        len([line for line in path.read_text().splitlines() if "microseconds" in line]) == 2
    )  # one a line
    tuning.write("gpu", "0.12.0", [entry(4, 64, 64, gemv=Shape(warps=16))])
    assert [e["settings"].gemv.warps for e in tuning.tuned("gpu")] == [16]
    path.write_text("{")
    tuning.tuned.cache_clear()
    tuning.write("gpu", "0.12.0", [entry(1, 64, 64, gemv=Shape(warps=4))])
    assert [e["settings"].gemv.warps for e in tuning.tuned("gpu")] == [4]


@pytest.mark.parametrize(
    "text", ["{", '{"entries": [{"settings": {"warp": 3, "tiles": {}}}]}', '{"rows": []}']
)
def test_a_broken_file_is_named(folder, text):
    (folder / "gpu.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"gpu\.json: not a file of tuned settings .* atd bench --tune"
    ):
        tuning.settings("gpu", matrix(64, 64), 1)


def test_few_rows_are_shared_by_more_warps():
    assert (
        tuning.heuristic(matrix(1024, 4096), 1).gemv.warps
        > tuning.heuristic(matrix(14336, 4096), 1).gemv.warps
    )


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_tiles_fit_into_the_shared_memory_of_every_gpu(bases):
    for tokens in (1, 5, 16, 40, 100, 2000):
        tiles = tuning.heuristic(matrix(4096, 4096, bases), tokens).tiles
        assert tuning.shared_bytes(tiles, bases) <= tuning.SHARED_BYTES
        assert min(tiles.rows, tiles.tokens, tiles.units) >= 16
    assert tuning.heuristic(matrix(4096, 4096, 4), 100).tiles.tokens == 128


def test_tuned_tiles_fit_another_kind_of_matrix(folder):
    tiles = Tiles(64, 128, 32, 4, 2)  # 176 KB for N = 2
    tuning.write("gpu", "0.11.2", [entry(64, 4096, 4096, tiles=tiles)])
    assert tuning.settings("gpu", matrix(4096, 4096), 64).tiles == tiles
    assert tuning.settings("gpu", matrix(4096, 4096, bases=1), 64).tiles == replace(
        tiles, tokens=64
    )
    assert tuning.settings("gpu", matrix(4096, 4096, bases=3), 64).tiles == replace(
        tiles, tokens=32
    )
    assert tuning.settings("gpu", matrix(4096, 4096, bases=4), 64).tiles == tiles


def test_shared_bytes_are_what_triton_asked_for():
    """Counted by Triton, compiled ahead of time for an H200. It keeps the codes of one stage less than are counted."""
    asked = {
        (1, Tiles(64, 16, 16, 4, 2)): 24576,
        (1, Tiles(128, 128, 64, 4, 3)): 1048576,
        (2, Tiles(64, 16, 32, 4, 2)): 28672,
        (2, Tiles(64, 128, 32, 4, 2)): 172032,
        (2, Tiles(128, 128, 64, 8, 3)): 557056,
        (3, Tiles(64, 32, 32, 4, 2)): 106496,
        (4, Tiles(64, 128, 32, 4, 2)): 90112,
    }
    for (bases, tiles), count in asked.items():
        of_a_stage = 4 * unit(bases)[0] * tiles.rows * tiles.units
        assert count <= tuning.shared_bytes(tiles, bases) <= count + of_a_stage, (bases, tiles)
