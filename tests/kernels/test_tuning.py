"""Settings: the file of a device, the nearest entry, the rule of thumb."""

import pytest

from atd.kernels import tuning
from atd.kernels.triton_gemm import Tiles
from atd.kernels.tuning import Settings
from atd.weights import TernaryType


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.tuned.cache_clear()
    yield tmp_path
    tuning.tuned.cache_clear()


def entry(tokens, out, inputs, bases=2, tied=True, **settings):
    return {"bases": bases, "tied": tied, "out": out, "in": inputs, "tokens": tokens, "settings": Settings(**settings)}


def matrix(out, inputs, bases=2, tied=True):
    return TernaryType((out, inputs), bases, "row", tied, "f16")


def test_tuned_settings_go_before_the_rule_of_thumb(folder):
    type = matrix(4096, 4096)
    assert tuning.settings("NVIDIA H200", type, 1) == tuning.heuristic(type, 1)
    path = tuning.write("NVIDIA H200", "0.11.2", [entry(1, 4096, 4096, warps=2, tiles=Tiles(rows=16))])
    assert path.name == "nvidia-h200.json"
    assert tuning.settings("NVIDIA H200", type, 1) == Settings(warps=2, tiles=Tiles(rows=16))
    assert tuning.settings("NVIDIA L4", type, 1) == tuning.heuristic(type, 1)


def test_the_nearest_entry_is_taken(folder):
    entries = [entry(1, 4096, 4096, warps=1), entry(1, 14336, 4096, warps=2), entry(16, 4096, 4096, warps=4)]
    tuning.write("gpu", "0.11.2", [*entries, entry(1, 4096, 4096, bases=3, warps=8)])
    assert tuning.settings("gpu", matrix(4000, 4096), 2).warps == 1
    assert tuning.settings("gpu", matrix(10000, 4096), 1).warps == 2
    assert tuning.settings("gpu", matrix(14336, 4096), 64).warps == 4
    assert tuning.settings("gpu", matrix(14336, 4096, bases=3), 1).warps == 8


@pytest.mark.parametrize("text", ["{", '{"entries": [{"settings": {"warp": 3, "tiles": {}}}]}', '{"rows": []}'])
def test_a_broken_file_is_named(folder, text):
    (folder / "gpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"gpu\.json: not a file of tuned settings .* atd bench --tune"):
        tuning.settings("gpu", matrix(64, 64), 1)


def test_few_rows_are_shared_by_more_warps():
    assert tuning.heuristic(matrix(1024, 4096), 1).warps > tuning.heuristic(matrix(14336, 4096), 1).warps
    assert tuning.heuristic(matrix(1024, 4096), 100).tiles.tokens == 128
