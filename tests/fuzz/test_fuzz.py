"""Some inputs of each kind, the same in each run; `make fuzz` tries others, and more of them."""

from itertools import islice

import pytest

from tests.fuzz import interruptions
from tests.fuzz.interruptions import EXPORT
from tests.fuzz.watch import fault, limited_memory
from tests.fuzz.worker import KINDS, faults

FAST = {"JSON Lines": 500, "cache": 500, "results.csv": 500, "index.json": 200, "safetensors": 100}
# These do more than read.
SLOW = {"journal": 8, "recipe": 20, "stored graph": 20, "its config": 10}
SLOW |= {"bitnet": 20, "bitnet 2B-4T": 10, "bitnet online": 10, "Bit-TTT": 20}


FILES = [name for name, kind in KINDS.items() if kind not in interruptions.KINDS]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("share", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_changed_inputs_are_refused_in_words_or_read(kind, share, tmp_path):
    inputs = share * {**FAST, **SLOW}.get(kind, 50)
    with limited_memory():
        for i, found in enumerate(islice(faults(KINDS[kind], tmp_path, share), inputs)):
            assert found is None, f"input {i}: {found}"


@pytest.mark.parametrize("kind", interruptions.kinds(["datafree2", EXPORT]), ids=lambda k: k.name)
@pytest.mark.parametrize("moments", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_ends_at_any_moment_goes_on(kind, moments, tmp_path):
    for found in islice(faults(kind, tmp_path, moments), moments):
        assert found is None


def test_what_breaks_the_rules_is_a_fault(tmp_path):
    def hangs():
        while True:
            pass

    def takes_memory():
        bytearray(4 << 30)

    def writes():
        (tmp_path / "file").write_text("x")

    assert "ValueError" in (fault(lambda: int("x")) or "")
    assert "writes" in (fault(writes) or "")
    assert fault(writes, tmp_path) is None
    with limited_memory():
        assert "MemoryError" in (fault(takes_memory) or "")
    assert "takes more than" in (fault(hangs, seconds=0.1) or "")
