"""Work is counted from shapes: sums by hand on a tiny model, and what more text or depth adds."""

import pytest

from atd.calibration.rates import NOMINAL, measured, rates
from atd.calibration.work import (
    Text,
    Work,
    corrected_work,
    factor_work,
    half,
    matrices,
    moments_work,
    paths,
    run_work,
    slowed,
    stream_work,
    times,
    visits_work,
)
from atd.checkpoint.cache import Cache
from atd.decomposition.options import trellis_type
from atd.decomposition.trellis_codes import known_code
from atd.weights import TernaryType
from tests.models.tiny import tiny_graph

ATTENDED = slowed(32, 32) + 2 * slowed(16, 32)  # q; k, v
LINEARS = ATTENDED + slowed(32, 32) + 3 * slowed(32, 48)  # and o; gate, up, down


def test_work_adds_up():
    work = Work({("a", "product"): 2.0}) + Work({("a", "product"): 3.0, ("b", "sum"): 1.0})
    assert times(work, 2) == {("a", "product"): 10.0, ("b", "sum"): 2.0}
    assert work["c", "sum"] == 0


def test_a_stream_runs_each_node_once_where_values_are_kept():
    (block, *_) = tiny_graph().blocks
    assert sum(slowed(out, inputs) for _, out, inputs in matrices(block)) == LINEARS
    assert slowed(100, 4096) == 3 * 100 * 4096  # narrow matrices take longer
    work = stream_work(block, 32, Text(100, 10))
    assert work["forward", "product"] == pytest.approx(2 * 100 * LINEARS)
    assert work["forward", "score"] == 100 * 4 * 32 * 5  # half of a window of 10 is seen
    again = stream_work(block, 32, Text(100, 10, kept=False))
    # q, k, v once more for each of three values and the output, o for two, gate and up for one
    more = 3 * ATTENDED + 2 * slowed(32, 32) + 2 * slowed(32, 48)
    assert again["forward", "product"] == pytest.approx(2 * 100 * (LINEARS + more))
    only = run_work(block, 32, Text(100, 10), [matrices(block)[0][0].name])
    assert only["forward", "product"] == 2 * 100 * slowed(32, 32)


def test_moments_and_what_is_made_of_them():
    assert half(255) == 1
    assert half(4096) == 9 / 16  # eight strips
    work = moments_work("moments", 100, tokens=5000, products=2)
    assert work["moments", "moment"] == 2 * 5000 * 100 * 100 * 2
    assert work["moments", "sum"] == (2 + 2) * 100 * 100 * 2  # two batches
    assert factor_work(30)["factorisation", "cholesky"] == 9000
    assert corrected_work(5, 30)["target correction", "solve"] == 2 * 5 * 30 * 30


def test_visits_of_a_matrix():
    tied = TernaryType((64, 128), 2, "row", True, "f16")
    work = visits_work(tied, sweeps=2, refits=1)
    assert work["sweeps", "panel"] == 4 * 2 * 64 * 128 * 128
    assert work["sweeps", "column"] == 4 * 64 * 128
    assert work["refits", "product"] == 2 * 2 * 64 * 128 * 128
    assert work["first scales", "fit"] == (16 + 8) * 64 * 128
    coded = trellis_type((64, 128), known_code(2), "f16")
    assert coded is not None
    assert paths(coded.code) == 243  # 81 states, 3 ways into each
    # The seams of one segment of 64 rows are found in a run over 64 rows, once in three visits; a
    # vector has room for eight segments.
    work = visits_work(coded, sweeps=2, refits=0)
    assert work["sweeps", "path"] == pytest.approx(3 * 8 * 64 * 128 * 243 * (1 + 1 / 3))


def test_rates_are_measured_once(tmp_path, monkeypatch):
    calls = []

    def measured():
        calls.append(1)
        return dict(NOMINAL)

    monkeypatch.setattr("atd.calibration.rates.measured", measured)
    for _ in range(2):
        assert rates(Cache(tmp_path)) == NOMINAL
    assert rates(None) == NOMINAL
    assert len(calls) == 2


@pytest.mark.slow
def test_a_machine_has_rates():
    found = measured()
    assert found.keys() == NOMINAL.keys()
    assert all(0 <= seconds < 100 * NOMINAL[kind] for kind, seconds in found.items())
