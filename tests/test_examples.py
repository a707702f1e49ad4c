"""The examples run as they stand, on a tiny model, and print what their docstrings promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT / "examples"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_custom_pass():
    assert "mlp.down_proj = linear(%mlp.silu_mul) {weight: packed n=1" in run("custom_pass.py")


def test_kernels_alone():
    """It needs jax and numpy alone."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0]);"
        "assert not {'flax', 'optax', 'safetensors', 'gguf', 'tokenizers', 'tyro'} & {*sys.modules}"
    )
    out = run("-c", code, str(ROOT / "examples/kernels_alone.py"))
    assert "packed n=2 g=row tied layout=aligned/1 f16[256,640]: 3.23 bits" in out


@pytest.mark.slow
def test_convert():
    out = run("convert.py")
    assert "model.layers.1.mlp.down_proj" in out
    assert "it writes [" in out


@pytest.mark.slow
def test_study():
    lines = [line.split() for line in run("study.py").splitlines() if line[0].isdigit()]
    assert len(lines) == 6
    assert float(lines[0][1]) > float(lines[-1][1])  # three bases lose less than one


@pytest.mark.slow
def test_evaluate_checkpoint():
    assert "KL(dense || converted)" in run("evaluate_checkpoint.py")


def test_each_has_a_test_and_is_short():
    assert {f"test_{name.removesuffix('.py')}" for name in EXAMPLES} <= globals().keys()
    assert all(len((ROOT / "examples" / name).read_text().splitlines()) < 40 for name in EXAMPLES)
