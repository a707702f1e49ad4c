"""The benchmarks run: their --tiny forms, on real small models where they need one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_decompose(tmp_path):
    run("decompose.py", "--tiny", "--json", tmp_path / "f.json")
    assert all(row["weights_per_second"] > 0 for row in json.loads((tmp_path / "f.json").read_text()))


def test_convert(tmp_path):
    run("convert.py", "--tiny", "--blocks", 1, "--folder", tmp_path, "--json", tmp_path / "f.json")
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert row["weights"] == 128 * 128 * 3 + 128 * 384 * 3
    assert 1e8 < row["peak_bytes"] < 3e9


def test_decode(stories260k, tmp_path):
    run("decode.py", stories260k, "--tiny", "--json", tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text())


def test_quality(stories260k, shared_data, tmp_path):
    text = shared_data / "text" / "tinystories_sample.txt"
    arguments = (stories260k, "--data", text, "--context", 64, "--tokens", 512, "--recipes", "greedy3", "datafree3")
    run("quality.py", *arguments, "--json", tmp_path / "f.json")
    greedy, als = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert als[text.stem]["kl_mean"] < 0.2 * greedy[text.stem]["kl_mean"]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_help(name):
    run(name, "--help")
