"""Options that several commands share."""

import json
import subprocess
import sys
from pathlib import Path

from atd.errors import BadInput
from atd.version import __version__

ROOT = Path(__file__).parents[2]


def test_python_m_atd_is_the_command():
    call = [sys.executable, "-m", "atd", "--version"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"atd {__version__}\n", "")


def test_an_option_counts_once(atd, stories260k, text, refused):
    refused(atd("generate", stories260k, "--seed", 1, "--seed=2"), "--seed is given twice")
    refused(atd("eval", stories260k, "--data", text, "--data", text), "--data is given twice")
    twice = ("--max-new-tokens", 1, "--max_new_tokens", 1)
    refused(atd("generate", stories260k, *twice), "--max-new-tokens is given twice")
    several = ("--set", "decompose.bases=3", "--set", "decompose.group=7", "--recipe", "none")
    refused(atd("convert", stories260k, "out", *several), "none")


def test_devices_are_named(atd, stories260k, refused):
    for name in ("gpu", "tpu:1", "cpu:7", "cpu:x", "cpu:-1", "abacus", ":0"):
        told = f"there is no device '{name}' here; there is cpu:0 (cpu)"
        refused(atd("generate", stories260k, "--device", name), told)


def test_a_device_by_its_number():
    code = """
import jax.numpy
from atd.models.placement import use_device
use_device("cpu:1")
print(jax.numpy.zeros(3).device)
"""
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, capture_output=True, text=True, env=two)
    assert done.stdout.strip() in ("TFRT_CPU_1", "cpu:1"), done.stderr


def test_eval_computes_in_the_dtype(atd, stories260k, text, tmp_path):
    sizes = ("--data", text, "--context", 64, "--tokens", 512, "--quiet")
    file = tmp_path / "figures.json"
    code, _, err = atd("eval", stories260k, *sizes, "--dtype", "bfloat16", "--json", file)
    assert (code, err) == (0, "")
    assert '"dtype": "bfloat16"' in file.read_text()


def test_eval_and_generate_round_keys_and_values(atd, stories260k, text, tmp_path):
    sizes = ("--data", text, "--context", 64, "--tokens", 512, "--quiet")
    file = tmp_path / "figures.json"
    rounded = ("--kv", "int8", "--chunk", 24, "--against", stories260k, "--json", file)
    code, _, err = atd("eval", stories260k, *sizes, *rounded)
    assert (code, err) == (0, "")
    figures = json.loads(file.read_text())
    assert figures["kv"] == "int8"
    assert 0 < figures["kl_mean"] < 0.002
    write = ("generate", stories260k, "--max-new-tokens", 4, "--quiet", "--kv", "int8")
    assert atd(*write)[0] == 0


def test_quiet_prints_results_alone(atd, converted, text):
    sizes = ("--data", text, "--context", 64, "--tokens", 128)
    assert atd("eval", converted, *sizes, "--quiet")[2] == ""
    assert atd("verify", converted)[2] != ""
    assert atd("verify", converted, "--quiet")[2] == ""


def test_the_seed_of_a_conversion(atd, stories260k, tmp_path, monkeypatch, refused):
    seeds = []

    def convert(model, out, recipe, **options):
        seeds.append(recipe.seed)
        raise BadInput("enough")

    monkeypatch.setattr("atd.pipeline.convert.convert", convert)
    for options in ((), ("--seed", 7), ("--seed", -1)):
        refused(atd("convert", stories260k, tmp_path / "out", "--recipe", "rotated2", *options))
    assert seeds == [0, 7]
