"""Settings: the user's and the packaged file of a device, the nearest entry, the rule of thumb."""

from dataclasses import replace

import pytest

from atd.errors import BadInput
from atd.kernels import settings
from atd.kernels.settings import Settings, Shape, Tiles
from atd.weights import TernaryType
from atd.weights.layouts import unit


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A folder of packaged files, beside a cache folder of the user that is empty."""
    (tmp_path / "packaged").mkdir()
    monkeypatch.setattr(settings, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("ATD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "packaged"


pytestmark = pytest.mark.usefixtures("packaged")


def matrix(out, inputs, bases=2, tied=True, group: int | str = "row"):
    return TernaryType((out, inputs), bases, group, tied, "f16")


def entry(tokens, out, inputs, bases=2, tied=True, group: int | str = "row", **values):
    kind = settings.kind_of(matrix(out, inputs, bases, tied, group), tokens)
    return kind | {"settings": Settings(**values), "microseconds": {"gemv": 1.5}}


def warps(device, type, tokens) -> int:
    return settings.choose(device, type, tokens).gemv.warps


# --- files ------------------------------------------------------------------------------------


def test_tuned_settings_go_before_the_rule_of_thumb():
    type = matrix(4096, 4096)
    assert settings.choose("NVIDIA H200", type, 1) == settings.heuristic(type, 1)
    tuned = entry(1, 4096, 4096, gemv=Shape(warps=2), tiles=Tiles(rows=16))
    path = settings.write("NVIDIA H200", "0.11.2", [tuned])
    assert path.name == "nvidia-h200.json"
    assert settings.choose("NVIDIA H200", type, 1) == tuned["settings"]
    assert settings.choose("NVIDIA L4", type, 1) == settings.heuristic(type, 1)


def test_the_users_entries_go_before_packaged_ones_of_the_same_matrix_and_tokens(packaged):
    mine = settings.write(
        "gpu",
        "0.11.2",
        [entry(tokens, 4096, 4096, gemv=Shape(warps=8)) for tokens in (1, 16)],
    )
    mine.rename(packaged / mine.name)
    settings.write("gpu", "0.12.0", [entry(1, 4096, 4096, gemv=Shape(warps=2))])
    assert warps("gpu", matrix(4096, 4096), 1) == 2
    assert warps("gpu", matrix(4096, 4096), 16) == 8
    assert [e["settings"].gemv.warps for e in settings.kept("gpu", "0.12.0")] == [2]
    assert len(settings.tuned("gpu")) == 2


def test_nothing_is_written_into_the_package(packaged, tmp_path):
    path = settings.write("gpu", "0.11.2", [entry(1, 64, 64)])
    assert path == settings.user_file("gpu") == tmp_path / "cache" / "tuned" / "gpu.json"
    assert [*packaged.iterdir()] == []
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


def test_the_users_file_is_in_the_cache_folder(monkeypatch, tmp_path):
    for set_, folder in (
        ({"ATD_CACHE": tmp_path / "mine", "XDG_CACHE_HOME": tmp_path}, tmp_path / "mine"),
        ({"XDG_CACHE_HOME": tmp_path / "caches"}, tmp_path / "caches" / "atd"),
        ({"HOME": tmp_path}, tmp_path / ".cache" / "atd"),
    ):
        for name in ("ATD_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in set_.items():
            monkeypatch.setenv(name, str(value))
        assert settings.user_file("NVIDIA L4") == folder / "tuned" / "nvidia-l4.json"


def test_entries_of_the_same_version_are_kept_and_others_are_not():
    def tuned() -> list[int]:
        return [e["settings"].gemv.warps for e in settings.tuned("gpu")]

    settings.write("gpu", "0.11.2", [entry(n, 64, 64, gemv=Shape(warps=n)) for n in (1, 2)])
    path = settings.write("gpu", "0.11.2", [entry(2, 64, 64, gemv=Shape(warps=8))])
    assert tuned() == [1, 8]
    lines = [line for line in path.read_text().splitlines() if "microseconds" in line]
    assert len(lines) == 2  # one per line
    settings.write("gpu", "0.12.0", [entry(4, 64, 64, gemv=Shape(warps=16))])
    assert tuned() == [16]
    path.write_text("{")
    settings.entries_of.cache_clear()
    settings.write("gpu", "0.12.0", [entry(1, 64, 64, gemv=Shape(warps=4))])
    assert tuned() == [4]


BROKEN = [
    "{",
    "\xff",
    '{"entries": [{"settings": {"warp": 3, "tiles": {}}}]}',
    '{"rows": []}',
    '{"entries": [{"bases": 1, "tied": true, "grouped": false, "out": 0, "in": 1, "tokens": 1, '
    '"settings": {"gemv": {}, "tiles": {}}}]}',
    '{"entries": [{"bases": 1, "tied": true, "grouped": false, "out": 1, "in": 1, "tokens": 1, '
    '"settings": {"gemv": {"warps": "4"}, "tiles": {}}}]}',
]


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("is_packaged", [False, True])
def test_a_broken_file_is_named_with_the_way_out(packaged, is_packaged, text):
    path = packaged / "gpu.json" if is_packaged else settings.user_file("gpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="latin-1")
    settings.entries_of.cache_clear()
    with pytest.raises(BadInput, match=r"not a file of tuned settings .* delete it, or") as e:
        settings.choose("gpu", matrix(64, 64), 1)
    assert str(e.value).startswith(f"{path}: ")


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATD_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"gpu\.json: the settings cannot be written: .*ATD_CACHE"):
        settings.write("gpu", "0.11.2", [entry(1, 64, 64)])


# --- the nearest entry ------------------------------------------------------------------------


def test_the_nearest_entry_is_taken():
    entries = [
        entry(1, 4096, 4096, gemv=Shape(warps=1)),
        entry(1, 14336, 4096, gemv=Shape(warps=2)),
        entry(16, 4096, 4096, gemv=Shape(warps=4)),
        entry(1, 4096, 4096, bases=3, gemv=Shape(warps=8)),
    ]
    settings.write("gpu", "0.11.2", entries)
    assert warps("gpu", matrix(4000, 4096), 2) == 1
    assert warps("gpu", matrix(10000, 4096), 1) == 2
    assert warps("gpu", matrix(14336, 4096), 64) == 4
    assert warps("gpu", matrix(4096, 4096, bases=3), 1) == 8


def test_a_matrix_of_another_size_takes_the_ways_of_the_nearest_and_its_own_shape():
    settings.write("gpu", "0.11.2", [entry(1, 28672, 4096, gemv=Shape(warps=16), gemv_tokens=5)])
    found, usual = (settings.choose(device, matrix(4096, 4096), 1) for device in ("gpu", "none"))
    assert (found.gemv_tokens, found.gemv) == (5, usual.gemv)
    assert warps("gpu", matrix(24576, 4096), 1) == 16


def test_an_entry_of_another_kind_is_farther_than_one_of_other_tokens():
    by_kind = [
        entry(16, 4096, 4096, gemv=Shape(warps=1)),
        entry(16, 4096, 4096, bases=3, gemv=Shape(warps=2)),
        entry(16, 4096, 4096, tied=False, gemv=Shape(warps=4)),
        entry(16, 4096, 4096, group=128, gemv=Shape(warps=8)),
        entry(64, 4096, 4096, group=32, gemv=Shape(warps=32)),
    ]
    settings.write("gpu", "0.11.2", by_kind)
    assert warps("gpu", matrix(4096, 4096), 24) == 1
    assert warps("gpu", matrix(4096, 4096, bases=3), 40) == 2
    assert warps("gpu", matrix(4096, 4096, tied=False), 40) == 4
    assert warps("gpu", matrix(4096, 4096, group=64), 16) == 8
    assert warps("gpu", matrix(4096, 4096, group=64), 100) == 32


# --- the rule of thumb ------------------------------------------------------------------------


def test_few_rows_are_shared_by_more_warps():
    few, many = (settings.heuristic(matrix(out, 4096), 1) for out in (1024, 14336))
    assert few.gemv.warps > many.gemv.warps


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_tiles_fit_into_the_shared_memory_of_every_gpu(bases):
    for tokens in (1, 5, 16, 40, 100, 2000):
        tiles = settings.heuristic(matrix(4096, 4096, bases), tokens).tiles
        assert settings.shared_bytes(tiles, bases) <= settings.SHARED_BYTES
        assert min(tiles.rows, tiles.tokens, tiles.units) >= 16
    assert settings.heuristic(matrix(4096, 4096, 4), 100).tiles.tokens == 128


def test_tuned_tiles_fit_another_kind_of_matrix():
    tiles = Tiles(64, 128, 32, 4, 2)  # 176 KB for N = 2
    settings.write("gpu", "0.11.2", [entry(64, 4096, 4096, tiles=tiles)])
    for bases, tokens in ((2, 128), (1, 64), (3, 32), (4, 128)):
        found = settings.choose("gpu", matrix(4096, 4096, bases), 64).tiles
        assert found == replace(tiles, tokens=tokens), bases


def test_shared_bytes_are_what_triton_asked_for():
    """Counted by Triton, compiled ahead of time for an H200. It keeps the codes of one stage less
    than are counted."""
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
        assert count <= settings.shared_bytes(tiles, bases) <= count + of_a_stage, (bases, tiles)
