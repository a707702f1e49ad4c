"""The search for settings, with a clock that is a formula: the fastest shapes, the crossovers, the
file."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from atd.errors import BadInput
from atd.kernels import settings
from atd.kernels.mosaic.backend import Mosaic
from atd.kernels.settings import Settings, Shape, Tiles
from atd.kernels.triton.backend import Triton
from atd.kernels.tuning import search, timing
from atd.kernels.tuning.search import ALWAYS, NEVER, Problem
from atd.weights import DenseType, Packed, PackedType, TernaryType

ROW = TernaryType((4096, 4096), 4, "row", True, "f16")  # with tiles that all fit into shared memory
GROUPS = replace(ROW, group=4)  # too small for a gemv


def way(settings: Settings) -> str:
    return "gemv" if settings.gemv_tokens else "gemm" if settings.gemm_tokens else "decode"


def clock(problem: Problem, candidates) -> list[float]:
    """Returns seconds by a formula.

    Args:
        gemv: 3 us per token, best with 4 warps with rows of their own, 2 row blocks. gemm: 60 us +
            1 us per token, best with
    tiles of 64 rows, the tokens, 64 units, 8 warps; tiles of 3 stages do not run. decode: 200 us.
    """

    def seconds(settings: Settings) -> float:
        tiles = settings.tiles
        if way(settings) == "gemv":
            off = (
                abs(settings.gemv.warps - 4)
                + abs(settings.gemv.row_warps - 4)
                + abs(settings.gemv.row_blocks - 2)
            )
            return 1e-6 * (3 * problem.tokens + off)
        if way(settings) == "gemm":
            off = (
                (tiles.rows != 64)
                + abs(tiles.tokens - problem.tokens) / 64
                + (tiles.units != 64)
                + (tiles.warps != 8)
            )
            return np.inf if tiles.stages == 3 else 1e-6 * (60 + problem.tokens + off)
        return 200e-6

    return [seconds(each) for each in candidates]


def found(type=ROW, **options):
    lines = []
    entries, left_out = search.search([type], clock, minutes=1, say=lines.append, **options)
    assert not left_out
    return {entry["tokens"]: entry for entry in entries}, lines


def test_the_fastest_shape_of_each_way_is_found():
    entries, (line,) = found()
    assert list(entries) == list(search.TOKENS)
    for tokens, entry in entries.items():
        assert entry["settings"].gemv == Shape(4, 4, 2, 1)
        if tokens in search.TILED:
            width = min(128, max(16, tokens))
            wanted = Tiles(rows=64, tokens=width, units=64, warps=8, stages=2)
            assert entry["settings"].tiles == wanted, tokens
    # The width is tried for every number of tokens.
    assert entries[64]["settings"].tiles.tokens == 64
    assert entries[1]["microseconds"] == {"gemv": 3.0}
    assert entries[32]["microseconds"] == {"gemv": 96.0, "gemm": 92.0}
    assert entries[64]["microseconds"] == {"gemm": 124.0, "decode": 200.0}
    assert line.startswith(
        "1/1 ternary n=4 g=row tied f16[4096,4096]: 1 token: gemv 3.0 us (warps 4"
    )
    assert "/s]" in line


def test_each_way_is_taken_while_it_is_the_fastest():
    for type, gemv_tokens in ((ROW, 16), (GROUPS, 0)):  # no gemv for groups
        for entry in found(type)[0].values():
            chosen = entry["settings"]
            assert (chosen.gemv_tokens, chosen.gemm_tokens) == (gemv_tokens, 64)
            assert entry["grouped"] == (type == GROUPS)
            assert type == ROW or "gemv" not in entry["microseconds"]


def test_few_numbers_of_tokens_leave_the_rest_to_the_rule_of_thumb():
    entries, _ = found(all_tokens=(1,))
    chosen = entries[1]["settings"]
    assert (list(entries), chosen.gemv_tokens, chosen.gemm_tokens) == ([1], 16, 64)
    assert chosen.gemv == Shape(4, 4, 2, 1)


def test_crossovers():
    found = [
        search.crossovers(seconds)
        for seconds in (
            {1: {"gemv": 1.0}, 4: {"gemv": 4.0, "gemm": 3.0}, 8: {"gemv": 5.0, "gemm": 6.0}},
            {1: {"gemv": 1.0}, 16: {"gemv": 9.0, "gemm": 8.0, "decode": 7.0}},
            {1: {"gemm": 1.0}, 16: {"gemm": 2.0, "decode": np.inf}},
        )
    ]
    assert found == [(1, 4), (1, 1), (0, 16)]


def test_the_same_times_make_the_same_settings():
    assert found()[0] == found()[0]


def test_what_the_time_does_not_allow_is_named():
    entries, left_out = search.search([ROW, GROUPS], clock, minutes=-1, say=print)
    assert entries == []
    assert left_out == [str(ROW), str(GROUPS)]


def test_it_refuses_where_the_kernels_do_not_run():
    if reason := Triton().device_refuses():
        with pytest.raises(BadInput, match="nothing to tune here: it needs an NVIDIA GPU") as error:
            search.tune()
        assert reason in str(error.value)


def test_the_users_file_is_written_and_a_second_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("ATD_CACHE", str(tmp_path))
    monkeypatch.setattr(Triton, "device_refuses", lambda self: None)
    monkeypatch.setattr(search, "device_kind", lambda: "a device")
    monkeypatch.setattr(search, "DeviceClock", lambda: clock)
    monkeypatch.setattr(search, "matrices", lambda: [ROW, GROUPS])
    path, left_out = search.tune(minutes=-1)
    assert path == tmp_path / "tuned" / "a-device.json"
    assert (settings.tuned("a device"), len(left_out)) == ((), 2)
    monkeypatch.setattr(search, "matrices", lambda: [ROW])
    assert search.tune() == (path, [])
    monkeypatch.setattr(search, "matrices", lambda: [ROW, GROUPS])
    lines: list[str] = []
    assert search.tune(say=lines.append) == (path, [])
    assert lines[0] == f"1 of 2 are in {path}; delete it to begin anew"
    assert lines[1].startswith("1/1 ternary n=4 g=4 ")
    assert len(settings.tuned("a device")) == 2 * len(search.TOKENS)
    assert settings.choose("a device", ROW, 4).gemv_tokens == 16
    assert settings.choose("a device", GROUPS, 100).gemm_tokens == 64


def test_the_clock_of_this_device_times_what_runs_and_nothing_else():
    type = TernaryType((32, 100), 1, "row", True, "f16")
    good = Settings(Shape(warps=1), gemv_tokens=ALWAYS)
    bad = Settings(gemv_tokens=NEVER, gemm_tokens=ALWAYS, tiles=Tiles(rows=-1))
    taken = search.DeviceClock(timing.TINY, interpret=True)(Problem(type, 1), [good, bad])
    assert 0 < taken[0] < 10
    assert taken[1] == np.inf


@pytest.mark.parametrize("layout", [Triton.layout, Mosaic.layout])
def test_random_matrices_are_what_kernels_read(layout):
    ternary = TernaryType((2000, 70), 3, "row", True, "f16")
    packed = timing.stack(ternary, timing.TINY, layout).weights[0]
    assert isinstance(packed, Packed)
    assert packed.type == PackedType(ternary, layout)
    assert packed.codes.shape == packed.type.codes_shape
    trits = np.asarray(packed.unpack().trits)
    assert {-1, 0, 1} == set(np.unique(trits))
    assert abs(trits.mean()) < 0.01
    assert jnp.std(packed.dequantize()) * np.sqrt(70) == pytest.approx(1, abs=0.1)
    dense = timing.stack(DenseType((2000, 70), "bf16"), replace(timing.TINY, most_copies=2)).weights
    assert len(dense) == 2
    assert jnp.abs(dense[0].dequantize() - dense[1].dequantize()).max() > 0


def test_a_small_matrix_has_something_else_read_between_its_turns():
    effort = timing.Effort(cold_bytes=1 << 16, most_copies=2)
    small = timing.stack(TernaryType((16, 64), 1, "row", True, "f16"), effort)
    assert small.between.nbytes == 1 << 16
    large = timing.stack(TernaryType((1024, 1024), 2, "row", True, "f16"), effort)
    assert (len(large.weights), large.between.size) == (2, 0)


def test_columns():
    table = timing.columns(["a", "bb"], [["xyz", "1"], ["x", "22"]])
    assert table == "a    bb\n---  --\nxyz   1\nx    22"
