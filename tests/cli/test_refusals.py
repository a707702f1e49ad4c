"""Bad input: exit code 2, one line that names what is wrong, no traceback, nothing written."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[2]


def test_convert_refuses(atd, stories260k, converted, tmp_path, refused):
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


def test_an_unsupported_architecture_is_refused_by_name(atd, stories260k, tmp_path, refused):
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


def test_damaged_checkpoints_are_refused(atd, stories260k, tmp_path, refused):
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


def test_eval_and_generate_refuse(atd, converted, stories260k, text, tmp_path, refused):
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
    refused(atd("verify", tmp_path / "none"), "none: no such file or folder")


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


def test_numbers_out_of_range_are_refused(atd, converted, stories260k, text, tmp_path, refused):
    eval_it = ("eval", converted, "--data", text, "--context", 64)
    refused(atd(*eval_it, "--batch", 0), "--batch must be at least 1, not 0")
    refused(atd("eval", converted, "--data", text, "--context", 1), "at least 2")
    refused(atd("generate", converted, "--seed", 2**64), "an integer of 64 bits")
    refused(atd("convert", stories260k, tmp_path / "o", "--bits", "nan"), "set bits (above 0)")
    refused(atd("experiment", "gaussian", "--size", 0), "at least one row")
    refused(atd("experiment", "gaussian", "--seed", -1), "expected 0 or more")


def test_numbers_are_refused_before_a_model_is_loaded(
    atd, converted, stories260k, text, tmp_path, monkeypatch, refused
):
    def loaded(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("atd.models.model.Model.__init__", loaded)
    eval_it = ("eval", converted, "--data", text)
    refused(atd(*eval_it, "--batch", 0), "--batch must be at least 1, not 0")
    refused(atd(*eval_it, "--context", 1), "--context must be at least 2, not 1")
    refused(atd(*eval_it, "--tokens", -3), "--tokens must be at least 1, not -3")
    refused(atd(*eval_it, "--context", 1024), "beyond the 512 positions", "give --context 512")
    generate = ("generate", converted)
    refused(atd(*generate, "--max-new-tokens", 0), "--max-new-tokens must be at least 1")
    for option, value in {"temperature": "nan", "top-k": -1, "top-p": 0, "seed": 2**64}.items():
        refused(atd(*generate, f"--{option}={value}"), f"{option.replace('-', '_')} is {value}")
    refused(atd(*generate, "--prompt", "Lily " * 600), "leaves no room in the model's context")
    for option in ("prompt", "steps", "repeats"):
        refused(atd("bench", converted, f"--{option}=0"), f"--{option} must be at least 1, not 0")
    refused(atd("bench", converted, "--steps", 4096), "takes 512 tokens; prompt and steps are")
    study = ("study", tmp_path / "none", tmp_path / "s", "--recipe", "datafree2", "--data", text)
    refused(atd(*study, "--context", 1), "--context must be at least 2")
    refused(atd(*study, "--tokens", 0), "--tokens must be at least 1")


def test_a_backend_that_is_not_here_is_refused_with_the_reason(atd, converted, text, refused):
    for backend in ("mosaic", "triton"):
        eval_it = ("eval", converted, "--data", text, "--context", 64, "--backend", backend)
        refused(atd(*eval_it), f"backend {backend}", "needs", "backend 'xla' runs there")


def test_a_tokenizer_of_another_model_is_refused(atd, converted, text, tmp_path, refused):
    other = tmp_path / "other"
    other.mkdir()
    words = json.loads((converted / "tokenizer.json").read_text())
    shift = {word: i + 10_000 for word, i in words["model"]["vocab"].items()}
    words["model"]["vocab"], words["added_tokens"] = shift, []
    (other / "tokenizer.json").write_text(json.dumps(words))
    borrowed = ("--tokenizer", other)
    refused(atd("eval", converted, "--data", text, "--context", 64, *borrowed), "another model's")
    refused(atd("generate", converted, *borrowed), "another model's")


def test_damaged_files_of_a_converted_folder_are_refused(atd, converted, tmp_path, refused):
    def damaged(name: str, content: str) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(converted, folder)
        (folder / name).write_text(content)
        return folder

    drawn = ("--plot", tmp_path / "x.png")
    for content in ("{", "{}", '{"nodes": [1]}', '{"nodes": [{"node": "x"}]}'):
        refused(atd("inspect", damaged("report.json", content), *drawn), "report.json")
    refused(atd("verify", damaged("manifest.json", "{}")), "manifest.json: damaged")
    refused(atd("inspect", damaged("atd_graph.json", "{}")), "atd_graph.json")
    for name, content in (
        ("tokenizer.json", "x"),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
        ("tokenizer_config.json", '{"chat_template": 3}'),
    ):
        refused(atd("generate", damaged(name, content)), name)


def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    atd, converted, stories260k, text, tmp_path, refused
):
    nowhere, folder = tmp_path / "no" / "x", tmp_path
    eval_it = ("eval", converted, "--data", text, "--context", 64, "--tokens", 128)
    for command in (eval_it, ("bench", converted)):
        refused(atd(*command, "--json", nowhere), "does not exist; make it first")
        refused(atd(*command, "--json", folder), "is a folder")
    for command in (("inspect", converted), ("experiment", "gaussian")):
        refused(atd(*command, "--plot", nowhere), "does not exist; make it first")
        refused(atd(*command, "--plot", tmp_path / "x.nonsense"), "no picture format")
    (tmp_path / "file").write_text("")
    refused(atd("convert", stories260k, tmp_path / "file" / "o"), "choose another folder")
    refused(atd("export", converted, tmp_path / "file" / "o", "--to", "hf"), "choose another")
    code, _, err = atd(*eval_it, "--json", "/dev/full")  # found out when it is written
    assert (code, "error: /dev/full: the disk is full" in err) == (1, True)


def test_what_the_system_refuses_is_one_line(atd, stories260k, monkeypatch):
    from atd.models import frontend

    for error, code, told in (
        (PermissionError(13, "Permission denied", "/f"), 2, "/f: Permission denied"),
        (OSError(36, "File name too long", "/f"), 2, "/f: File name too long"),
        (OSError(28, "No space left on device"), 1, "the output: No space left on device"),
        (MemoryError(), 1, "out of memory"),
        (ValueError("array is too big; and so on"), 1, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: allocating 1 TB"), 1, "out of memory"),
        (RuntimeError("Symlink loop from '/l'"), 2, "Symlink loop from '/l'; give"),
        (IndexError("list index\nout of range"), 1, "IndexError: list index. This is a fault of"),
        (AssertionError(), 1, "AssertionError. This is a fault of atd: the same command with --de"),
    ):
        monkeypatch.setattr(frontend, "open", lambda path, error=error, **_: raise_(error))
        exit_code, _, err = atd("inspect", stories260k)
        assert (exit_code, err.count("\n")) == (code, 1)
        assert err.startswith(f"error: {told}")
        with pytest.raises(type(error)):
            atd("inspect", stories260k, "--debug")


def test_a_device_that_is_not_here_is_named(atd, stories260k, monkeypatch, refused):
    from atd.models import frontend

    def no_device():
        raise AssertionError

    monkeypatch.setattr(frontend, "open", lambda path, **_: no_device())
    monkeypatch.setattr("jax.devices", no_device)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    refused(atd("inspect", stories260k), "no device of JAX_PLATFORMS=cuda here; unset it")


def test_a_prompt_in_another_encoding_is_refused(atd, stories260k, refused):
    refused(
        atd("generate", stories260k, "--prompt", "caf\udce9"), "not valid Unicode at character 3"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_nobody_takes_is_one_line():
    command = [sys.executable, "-m", "atd", "--version"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "error: the output: No space left on device\n")


def test_a_working_directory_that_is_gone_is_told(tmp_path):
    (gone := tmp_path / "gone").mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    command = ["sh", "-c", script, gone, sys.executable, "-m", "atd", "inspect", "m"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: the working directory does not exist any more; change to another one\n"
    )


def test_characters_that_the_terminal_lacks_are_no_error(monkeypatch):
    from atd.cli import main

    for encoding in ("latin-1", "ascii"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["atd", "--version"])
        main.main()
        print("– 漢字 \udcff", flush=True)
        assert stream.buffer.getvalue().endswith(b"? ?? ?\n")


def raise_(error: Exception):
    raise error


def test_nan_logits_end_eval_and_generate_with_a_message(atd, stories260k, text, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(stories260k, folder)
    os.chmod(folder, 0o755)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float16(np.nan)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    figures = tmp_path / "figures.json"
    code, _, err = atd("eval", folder, "--data", text, "--context", 64, "--json", figures)
    assert code == 1
    assert "the model's logits are not finite at" in err
    assert "nan on " in err
    assert not figures.exists()
    code, _, err = atd("generate", folder, "--max-new-tokens", 4)
    assert code == 1
    assert "logits at position" in err
    assert "are not finite, with 0 tokens written" in err


def test_a_scale_that_overflows_is_refused_by_name(atd, stories260k, tmp_path, refused):
    folder = tmp_path / "spiked"
    shutil.copytree(stories260k, folder)
    os.chmod(folder, 0o755)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    tensors = {key: array.astype(np.float32) for key, array in tensors.items()}
    tensors[f"{name}.weight"][3, 5] = 150_000
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    convert = ("convert", folder, tmp_path / "out", "--recipe", "datafree2")
    refused(atd(*convert), f"{name}: weights of up to 1.5e+05 overflow scales", "bf16")
    assert not (tmp_path / "out").exists()
    assert atd(*convert, "--set", "decompose.dtype=bf16")[0] == 0


def test_calibration_text_is_refused_before_the_model_is_read(
    atd, stories260k, tmp_path, monkeypatch, refused
):
    monkeypatch.setattr("atd.checkpoint.identity.read_contents", lambda *_: pytest.fail("read"))
    convert = ("convert", stories260k, tmp_path / "out")
    refused(atd(*convert, "--calib", tmp_path / "none.txt"), "none.txt")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04\xff")
    refused(atd(*convert, "--recipe", "ternary2", "--calib", tmp_path / "zip"), "zip")
    few = "pass decompose needs at least 1 calibration windows, there are 0 of 512 tokens"
    refused(atd(*convert, "--recipe", "ternary2", "--calibration-tokens", 10), few)
    refused(atd(*convert, "--calibration-tokens", 10), "calibrate needs at least 8", "least 4,096")
    mixed = ("--calib", "self", "--calib", __file__, "--calibration-tokens", 4095)
    refused(atd(*convert, *mixed), "there are 6 of 512 tokens", "(--calibration-tokens)", "4,096")
    assert os.listdir(tmp_path) == ["zip"]
