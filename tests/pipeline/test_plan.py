"""A plan says what a conversion will do, from headers alone."""

from dataclasses import replace
from shutil import copytree

import pytest

from atd.calibration.rates import NOMINAL, rates
from atd.checkpoint.cache import Cache
from atd.errors import BadInput
from atd.pipeline.convert import convert, plan
from atd.pipeline.plan import duration
from atd.pipeline.recipe import read_recipe

GOLDEN = """\
passes:
  fold_norms
  rotate{r3 = true}
  decompose{method = "hessian", group = "row", trellis = "default", sweeps = 1, refits = 2}
  fuse
  pack
  verify
types:
     1 x dense f16: 65,536 bytes
     2 x packed n=1 g=tensor free layout=aligned/1 f32: 1,672 bytes
    25 x packed trellis n=2 layout=aligned/1 f16: 98,080 bytes
weights: 520,064 bytes are read, 166,696 are written
calibration: 64 windows of 512 tokens, self
time: about 34 s, 30 s of it to compile, where no earlier run has
  compiling                       30 s
  forward                          2 s
  writing calibration text         1 s
  moments                          0 s
  sweeps                           0 s
"""


def seconds(model, tokens: int, recipe: str = "ternary2") -> float:
    made = replace(read_recipe(recipe), calibration_tokens=tokens)
    return sum(plan(model, made, say=lambda line: None).seconds(NOMINAL).values())


def test_text_of_a_plan(stories260k, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # which programs are compiled depends on it
    lines = []
    shown = plan(stories260k, "ternary2", say=lines.append).shown(NOMINAL)
    assert shown.splitlines() == GOLDEN.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["memory"]


def test_more_text_takes_longer(stories260k):
    assert seconds(stories260k, 4096) < seconds(stories260k, 16384) < seconds(stories260k, 65536)
    assert seconds(stories260k, 4096, "datafree2") == seconds(stories260k, 65536, "datafree2")


@pytest.mark.parametrize("recipe", ["ternary2", "datafree2"])
def test_no_weight_is_read_and_nothing_is_written(stories260k, tmp_path, recipe):
    model = copytree(stories260k, tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + b"\xff" * (len(content) - header))  # NaN
    before = sorted(tmp_path.rglob("*"))
    assert plan(model, recipe, say=lambda line: None).shown(NOMINAL)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(BadInput, match="NaN"):
        convert(model, tmp_path / "out", "datafree2", say=lambda line: None)


def test_what_cannot_work_is_refused(stories260k):
    with pytest.raises(BadInput, match="too little"):
        plan(stories260k, "ternary2", limit=1000)
    with pytest.raises(BadInput, match="below what is possible"):
        plan(stories260k, "adaptive", overrides=["allocate.bits=0.1"])


def test_the_time_is_said_before_work_begins(stories260k, tmp_path, monkeypatch):
    lines = []
    cache = Cache(tmp_path / "cache")
    convert(stories260k, tmp_path / "out", "datafree2", cache=cache.folder, say=lines.append)
    assert lines[0].startswith("time: about")
    assert lines[0].endswith("on two common cores (--plan measures this machine)")
    found = plan(stories260k, "datafree2", say=lambda line: None)
    monkeypatch.setattr("atd.calibration.rates.measured", lambda: dict(NOMINAL))
    rates(cache)
    assert found.time(cache) == lines[0].removesuffix(
        ", on two common cores (--plan measures this machine)"
    )


def test_durations():
    assert [duration(s) for s in (4.4, 150, 600, 9000)] == ["4 s", "150 s", "10 min", "2.5 h"]
