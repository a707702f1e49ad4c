"""The benchmarks run: their --tiny forms, on real small models where they need one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from atd.pipeline.convert import convert

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(name: str, *arguments, code: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_decompose(tmp_path):
    run("decompose.py", "--tiny", "--json", tmp_path / "f.json")
    assert all(
        row["weights_per_second"] > 0 for row in json.loads((tmp_path / "f.json").read_text())
    )


def test_convert(tmp_path):
    run("convert.py", "--tiny", "--blocks", 1, "--folder", tmp_path, "--json", tmp_path / "f.json")
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert row["weights"] == 128 * 128 * 3 + 128 * 384 * 3
    assert 1e8 < row["peak_bytes"] < 3e9


def test_families():
    row = next(line for line in run("families.py", "qwen3").splitlines() if "qwen3" in line)
    _, _, error, kl, _, _ = (cell.strip() for cell in row.split("│"))
    assert float(error) < 1e-5
    assert 0 < float(kl) < 1


def test_calibration_memory():
    sizes = ["--hidden", 256, "--mlp", 512, "--tokens", 1024, "--limits", "1GB"]
    less = ["--set", "decompose.trellis=", "--set", "decompose.sweeps=0"]
    rows = [r for r in run("calibration_memory.py", *sizes, *less).splitlines() if "1,024" in r]
    assert [row.split("│")[3].strip() for row in rows] == ["none", "1GB"]
    peaks = [float(row.split("│")[5].split()[0]) for row in rows]  # GB
    assert all(0.1 < peak < 1 for peak in peaks)


def test_decompose_with_trellis_codes(tmp_path):
    out = run("decompose.py", "--trellis", "--tiny", "--json", tmp_path / "f.json")
    rows = json.loads((tmp_path / "f.json").read_text())
    assert [row["type"] for row in rows] == ["N = 2, tied", "N = 3, tied", "N = 2, fast"]
    assert all(row["feedback"] > 0 and row["sweep"] > 0 for row in rows)
    assert "N = 2, fast" in out


def test_trellis_codes(tmp_path):
    out = run("trellis_codes.py", "--tiny", "--json", tmp_path / "f.json")
    (row,) = json.loads((tmp_path / "f.json").read_text())
    assert row["starts"] == {"Barker": 1, "random": 1}
    assert row["table_error"] == pytest.approx(0.0187, rel=0.02)
    assert row["table_error"] < row["error"] < 0.0292  # what rounding each weight alone leaves
    assert "1 Barker starts, after 8 rounds: 0.0" in out


def test_decode(stories260k, tmp_path):
    run("decode.py", stories260k, "--tiny", "--json", tmp_path / "f.json")
    packed, dense, unpacked = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert packed["weights_bytes"] < dense["weights_bytes"] == unpacked["weights_bytes"]
    assert dense["first_token_seconds"] > 0


def test_decode_of_random_weights_and_in_one_jit(tmp_path):
    arguments = (
        "--random",
        "tiny",
        "--tiny",
        "--one-jit",
        "--no-dense",
        "--backend",
        "xla-unpacked",
    )
    out = run("decode.py", *arguments, "--json", tmp_path / "f.json")
    assert "tiny, prompt 16, 8 tokens, median of 1, float32, cpu" in out
    figures = json.loads((tmp_path / "f.json").read_text())
    assert all(
        row["one_jit_tokens_per_second"] > 0 and row["peak_bytes"] is None
        for row in figures["rows"]
    )


def test_cpu(stories260k, tmp_path):
    """Without llama.cpp, on the backend that needs no compiler."""
    convert(stories260k, tmp_path / "out", "datafree2", say=lambda line: None)
    out = run(
        "cpu.py",
        stories260k,
        "--converted",
        tmp_path / "out",
        *("--tiny", "--backend", "xla", "--types", "--json", tmp_path / "f.json"),
    )
    packed, unpacked, *dense = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert packed["weights_bytes"] < unpacked["weights_bytes"] == dense[0]["weights_bytes"]
    assert unpacked["over_unpacked"]["decode_tokens_per_second"] == 1
    assert [row["model"] for row in dense] == ["dense float32", "dense bfloat16"]
    assert all(0 < row["bare_bytes"] < row["resident_bytes"] for row in (packed, unpacked))
    assert "atd packed out" in out


LLAMA_QUANTIZE = """#!/bin/sh
cp "$1" "$2"
"""
LLAMA_BENCH = """#!/bin/sh
case "$2" in
    *Q4_0*) bytes=99000 speed=9 ;;
    *TQ1_0*) bytes=36000 speed=5 ;;
    *) bytes=34000 speed=2 ;;
esac
echo "[{\\"model_size\\": $bytes, \\"avg_ts\\": $speed}]"
"""


def test_cpu_compares_with_the_fastest_type_of_as_many_bytes(tmp_path, monkeypatch):
    """A random model of 35,328 bytes, and stand-ins for llama.cpp's tools."""
    for name, script in {"llama-quantize": LLAMA_QUANTIZE, "llama-bench": LLAMA_BENCH}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("ATD_LLAMA_CPP", str(tmp_path))
    arguments = ("--random", "tiny", "--tiny", "--backend", "xla", "--gguf", tmp_path / "gguf")
    types = ("--types", "Q4_0", "TQ1_0", "IQ3_S")
    out = run("cpu.py", *arguments, *types, "--json", tmp_path / "f.json")
    assert (tmp_path / "gguf" / "tiny-Q4_0.gguf").read_bytes().startswith(b"GGUF")
    rows = {row["model"]: row for row in json.loads((tmp_path / "f.json").read_text())["rows"]}
    for name in ("packed N = 2 trellis", "packed N = 2 tied"):
        row = rows[name]
        assert row["rival"] == "TQ1_0"
        speed = row["decode_tokens_per_second"]
        assert row["over_rival"]["decode_tokens_per_second"] == pytest.approx(speed / 5)
    assert rows["dense float32"]["rival"] is None
    assert 0 < rows["IQ3_S"]["resident_bytes"] < 1e8
    assert "llama.cpp Q4_0" in out


def test_matmul(tmp_path):
    out = run("matmul.py", "--tiny", "--json", tmp_path / "f.json")
    figures = json.loads((tmp_path / "f.json").read_text())
    rows = figures["rows"]
    assert (rows[0]["tokens"], rows[0]["way"], rows[-1]["way"]) == (1, "gemv", "decode")
    first = {row["way"]: row for row in reversed(rows)}  # of each way, which is compared with XLA
    assert all(row["error"] < 1e-2 for row in first.values())
    assert all(row["bytes_per_second"] > 0 for row in rows)
    assert not figures["failures"]
    assert "tiny n=2 g=row tied " in out
    assert "f16[80,200]" in out


def test_matmul_says_what_it_leaves_out_and_refuses_what_does_not_run(tmp_path):
    assert "no time for (--minutes): tiny N=3" in run(
        "matmul.py", "--tiny", "--bases", 3, "--minutes", -1, "--json", tmp_path / "f.json"
    )
    assert "nothing to tune here: it needs an NVIDIA GPU" in run("matmul.py", "--tune", code=2)
    assert "the kernels do not run here" in run("matmul.py", code=2)


def test_quality(stories260k, small, tmp_path):
    text = small.sample
    arguments = (
        stories260k,
        "--data",
        text,
        "--context",
        64,
        "--tokens",
        512,
        "--recipes",
        "greedy3",
        "datafree3",
    )
    out = run("quality.py", *arguments, "--slices", 2, "--json", tmp_path / "f.json")
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    greedy, again, als, _ = (row[text.stem] for row in rows)
    assert als["kl_mean"] < 0.2 * greedy["kl_mean"]
    assert greedy["kl_mean"] == again["kl_mean"]  # these recipes draw nothing at random
    mean = next(line for line in out.splitlines() if line.startswith("greedy3, mean"))
    low, high = re.findall(r"(\d+\.\d{4})\.\.(\d+\.\d{4})", mean)[0]
    assert float(low) < greedy["kl_mean"] < float(high)


def test_input_rotation(stories260k, small, tmp_path):
    arguments = ("--tokens", 2048, "--context", 64, "--blocks", 0, 1, "--json", tmp_path / "f.json")
    run("input_rotation.py", stories260k, "--data", small.calibration, *arguments)
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["node"] for row in rows] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert all(0.5 < row["rotated, held out"] < 1.5 for row in rows)


def test_lm_eval_speed(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not here (extra eval)")
    task = ROOT / "tests" / "lm_eval" / "tasks" / "choice.yaml"  # which names its data from ROOT
    options = ("--task", task, "--limit", 3, "--rounds", 1, "--json", tmp_path / "f.json")
    run("lm_eval_speed.py", ROOT / "tests" / "golden" / "stories", *options)
    (row,) = json.loads((tmp_path / "f.json").read_text())
    assert (row["name"], row["requests"]) == ("atd", 12)
    assert row["tokens_per_second"] > 0


def test_quality_picture(tmp_path):
    figures = ROOT / "docs" / "results" / "quality.json"
    run("quality_picture.py", figures, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_help(name):
    run(name, "--help")
