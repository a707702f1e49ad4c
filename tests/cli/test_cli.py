"""The command line, in process: what each command prints, and one clear message for each kind of bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from atd.cli import convert, run, study
from atd.reports.tables import console

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "demo",
    "convert",
    "eval",
    "study",
    "generate",
    "bench",
    "inspect",
    "verify",
    "export",
    "experiment",
]


@pytest.fixture(scope="module")
def converted(stories260k, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "atd",
            "convert",
            str(stories260k),
            str(out),
            "--recipe",
            "datafree2",
        ],
        check=True,
        cwd=ROOT,
    )
    return out


@pytest.fixture
def text(shared_data) -> Path:
    return shared_data / "text" / "tinystories_sample.txt"


# --- what works ---


def test_help_teaches_without_importing_jax():
    code = "import sys; sys.argv = ['atd', '--help']\nfrom atd.cli.main import main\ntry: main()\nexcept SystemExit: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(atd, command):
    code, out, _ = atd(command, "--help")
    assert code == 0
    assert "usage: atd" in out
    name = "evaluate" if command == "eval" else command
    function = next(getattr(m, name) for m in (convert, run, study) if hasattr(m, name))
    for option, hint in get_type_hints(function, include_extras=True).items():
        own = any(getattr(mark, "help", None) for mark in getattr(hint, "__metadata__", ()))
        documented = own or re.search(rf"^ +{option}: \S", function.__doc__, re.MULTILINE)
        assert option == "return" or documented, f"--{option} has no help text"


def test_eval_writes_what_it_prints(atd, converted, stories260k, text, tmp_path):
    file = tmp_path / "figures.json"
    code, out, err = atd(
        "eval",
        converted,
        "--against",
        stories260k,
        "--data",
        text,
        "--context",
        128,
        "--tokens",
        1024,
        "--json",
        file,
    )
    assert code == 0, err
    figures = json.loads(file.read_text())
    assert figures["windows"] == 8
    assert figures["positions"] == 8 * 127
    assert not figures["bos"]
    assert figures["bits_per_weight"] == pytest.approx(3.72, abs=0.01)
    assert figures["against_perplexity"] < figures["perplexity"] < 3 * figures["against_perplexity"]
    assert 0.01 < figures["kl_mean"] < 1.5
    assert f"{figures['perplexity']:.3f}" in out
    assert "no BOS" in out


def test_eval_against_itself_is_zero(atd, stories260k, text, tmp_path):
    file = tmp_path / "figures.json"
    sizes = ("--context", 64, "--tokens", 256)
    assert (
        atd(
            "eval",
            stories260k,
            "--against",
            stories260k,
            "--data",
            text,
            *sizes,
            "--bos",
            "--json",
            file,
        )[0]
        == 0
    )
    figures = json.loads(file.read_text())
    assert abs(figures["kl_mean"]) < 1e-6
    assert figures["top1_agreement"] == 1
    assert figures["bos"]


def test_generate_repeats_with_its_seed(atd, converted):
    texts = [
        atd("generate", converted, "--max-new-tokens", 24, "--temperature", 0.9, "--seed", seed)[1]
        for seed in (1, 1, 2)
    ]
    assert texts[0].startswith("Once upon a time")
    assert texts[0] == texts[1] != texts[2]


def test_generate_gives_the_same_text_packed_and_unpacked(atd, converted):
    texts = {
        backend: atd("generate", converted, "--max-new-tokens", 32, "--backend", backend)[1]
        for backend in ("xla", "xla-unpacked")
    }
    assert texts["xla"] == texts["xla-unpacked"]


def test_inspect_by_layer_and_by_node(atd, converted, stories260k, monkeypatch):
    monkeypatch.setattr(console, "width", 200)
    assert "model.layers.4" in atd("inspect", converted)[1]
    nodes = atd("inspect", converted, "--nodes")[1]
    assert "model.layers.4.mlp.gate_up_proj" in nodes
    assert "f16" in atd("inspect", stories260k)[1]


def test_verify(atd, converted):
    code, out, _ = atd("verify", converted)
    assert (code, out) == (0, f"{converted}: 32 weights are as they were written\n")


def test_set_reaches_the_recipe(atd, stories260k, tmp_path):
    code, _, err = atd(
        "convert",
        stories260k,
        tmp_path / "o",
        "--recipe",
        "datafree2",
        "--set",
        "decompose.bases=1",
        "--set",
        "decompose.group=row",
    )
    assert code == 0, err
    assert "packed n=1 g=row" in (tmp_path / "o" / "atd_graph.json").read_text()
    assert "bases = 1" in (tmp_path / "o" / "recipe.toml").read_text()


def test_an_allocation_is_shown_and_drawn(atd, stories260k, text, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 140)
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'calibration_tokens = 2048\ncalibration_context = 128\n[[passes]]\nname = "allocate"\nbits = 3.4\ntokens = 512\n'
        '[[passes]]\nname = "decompose"\n[[passes]]\nname = "pack"\n[[passes]]\nname = "fuse"\n'
    )
    out = tmp_path / "o"
    code, printed, err = atd(
        "convert",
        stories260k,
        out,
        "--recipe",
        recipe,
        "--calib",
        text,
        "--calibration-tokens",
        1024,
        "--bits",
        4.2,
    )
    assert code == 0, err
    assert "calibration_tokens = 1024" in (out / "recipe.toml").read_text()
    (first,) = (line.split() for line in printed.splitlines() if line.split()[:1] == ["0"])
    assert set(first[1:8]) <= {"1", "2", "3"}
    assert f"atd inspect {out} --plot {out}.png" in printed
    rows = json.loads((out / "report.json").read_text())["nodes"]
    assert all(
        row["predicted_kl"] > 0 and row["error"] > 0 for row in rows if "layers" in row["node"]
    )
    assert 'budget = ""' in (out / "recipe.toml").read_text()
    assert "bits = 4.2" in (out / "recipe.toml").read_text()
    code, printed, err = atd("inspect", out, "--plot", tmp_path / "who.png")
    assert code == 0, err
    assert (tmp_path / "who.png").read_bytes().startswith(b"\x89PNG")
    refused(
        atd("inspect", stories260k, "--plot", tmp_path / "who.png"),
        "not a checkpoint that atd made",
    )


def test_convert_adaptive_is_the_converter(stories260k, tmp_path):
    command = [
        sys.executable,
        "-m",
        "atd.convert_adaptive",
        str(stories260k),
        str(tmp_path / "o"),
        "--recipe",
        "greedy3",
    ]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert "g=tensor" in (tmp_path / "o" / "atd_graph.json").read_text()


# --- bad input: exit code 2, one message, no traceback, nothing written ---


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    error = err[err.index("error: ") :].replace("\n", " ")
    for part in parts:
        assert part in error, error


def test_convert_refuses(atd, stories260k, converted, tmp_path):
    out = tmp_path / "out"
    refused(atd("convert", tmp_path / "nothing", out), "nothing")
    refused(atd("convert", stories260k, converted), "exists", "--overwrite")
    refused(
        atd("convert", stories260k, out, "--recipe", "ternary4"),
        "no recipe 'ternary4'",
        "did you mean",
    )
    refused(
        atd("convert", stories260k, out, "--set", "decompose.base=2"),
        "no option 'base'; did you mean 'bases'?",
    )
    refused(
        atd("convert", stories260k, out, "--recipe", "ternary2", "--bits", 3.4),
        "--bits needs the allocate pass",
    )
    refused(
        atd("convert", stories260k, out, "--recipe", "greedy3", "--budget", "1MB"),
        "--budget needs the allocate",
    )
    refused(atd("convert", stories260k, out, "--bits", 3.4, "--budget", "1MB"), "give one of them")
    refused(
        atd("convert", stories260k, out, "--bits", 0.3), "is below what is possible: the minimum is"
    )
    refused(atd("convert", stories260k, out, "--budget", "much"), "much")
    refused(
        atd("convert", stories260k, out, "--recipe", "ternary2", "--calib", tmp_path / "x.txt"),
        "x.txt",
    )
    refused(atd("convert", stories260k, stories260k, "--overwrite"), "must lie outside")
    assert os.listdir(tmp_path) == []


def test_an_unsupported_architecture_is_refused_by_name(atd, stories260k, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(stories260k, folder)
    os.chmod(folder, 0o755)
    os.chmod(folder / "config.json", 0o644)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    )
    (folder / "model.safetensors").unlink()  # refused before anything is read
    refused(atd("convert", folder, tmp_path / "out"), "mamba")


def test_damaged_checkpoints_are_refused(atd, stories260k, tmp_path):
    for name, damage in {
        "truncated": lambda d: d[:1000],
        "oversized": lambda d: b"\xff" * 8 + d[8:],
        "short": lambda d: d[:-100],
    }.items():
        folder = tmp_path / name
        shutil.copytree(stories260k, folder)
        os.chmod(folder, 0o755)
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").write_bytes(damage(data))
        refused(atd("convert", folder, tmp_path / "out"), "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_eval_and_generate_refuse(atd, converted, stories260k, text, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    short = tmp_path / "short.txt"
    short.write_text("Once")
    refused(atd("eval", converted, "--data", tmp_path / "none.txt"), "none.txt")
    refused(atd("eval", converted, "--data", empty), "empty")
    refused(atd("eval", converted, "--data", short, "--context", 64), "too few", "64")
    refused(atd("eval", converted, "--data", text, "--context", 100000), "100000")
    refused(
        atd("eval", converted, "--data", text, "--json", tmp_path / "no" / "x.json"),
        "does not exist",
    )
    refused(atd("eval", converted, "--data", text, "--tokens", 0), "--tokens must be at least 1")
    refused(atd("generate", converted, "--chat"), "no chat template")
    refused(atd("generate", converted, "--temperature", -1), "temperature")
    bare = tmp_path / "bare"
    shutil.copytree(converted, bare)
    (bare / "tokenizer.json").unlink()
    refused(atd("generate", bare), "tokenizer")
    refused(atd("verify", stories260k), "not a checkpoint that atd made")


def test_an_unknown_option_is_explained(atd, stories260k):
    code, out, err = atd("convert", stories260k, "o", "--recipee", "x")
    assert code == 2
    assert "--recipe" in out + err


def test_debug_shows_where_an_error_came_from():
    done = subprocess.run(
        [sys.executable, "-m", "atd", "inspect", "/nowhere", "--debug"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "Traceback" in done.stderr
    assert done.returncode == 1
