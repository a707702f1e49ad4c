"""The command line, in process: what each command prints."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from atd.cli import chat, convert, generate, run, study
from atd.errors import BadInput
from atd.reports.tables import console
from atd.runtime.compare import LoadedCheckpoint
from atd.runtime.evaluate import Evaluation
from atd.version import __version__

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "demo",
    "convert",
    "eval",
    "study",
    "generate",
    "chat",
    "bench",
    "inspect",
    "verify",
    "export",
    "experiment",
]


def test_help_teaches_without_importing_jax():
    code = """
import sys
sys.argv = ["atd", "--help"]
from atd.cli.main import main
try:
    main()
except SystemExit:
    print("jax" in sys.modules or "numpy" in sys.modules)
"""
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
    function = next(
        getattr(m, name) for m in (chat, convert, generate, run, study) if hasattr(m, name)
    )
    for option, hint in get_type_hints(function, include_extras=True).items():
        own = any(getattr(mark, "help", None) for mark in getattr(hint, "__metadata__", ()))
        documented = own or re.search(rf"^ +{option}: \S", function.__doc__, re.MULTILINE)
        assert option == "return" or documented, f"--{option} has no help text"


def test_eval_writes_what_it_prints(atd, converted, small, stories260k, text, tmp_path):
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
    least, most = {"packaged": (0.003, 0.008), "stories260K": (0.01, 1.5)}[small.name]
    assert least < figures["kl_mean"] < most
    assert f"{figures['perplexity']:.3f}" in out
    assert "no BOS" in out


def test_the_convention_of_llama_cpp_has_bos_where_the_tokenizer_adds_it(
    atd, stories260k, text, tmp_path, monkeypatch
):
    seen = []

    def compare(checkpoint, texts, *, bos_id, **options):
        seen.append(bos_id)
        raise BadInput("enough")

    monkeypatch.setattr("atd.runtime.compare.load_checkpoint", lambda path, **options: None)
    monkeypatch.setattr("atd.runtime.compare.compare", compare)
    evaluation = ("eval", stories260k, "--data", text, "--context", 64)
    for adds in (True, False):
        other = tmp_path / str(adds)
        other.mkdir()
        (other / "tokenizer.json").write_bytes((stories260k / "tokenizer.json").read_bytes())
        config = {"bos_token": "<s>", "add_bos_token": adds}
        (other / "tokenizer_config.json").write_text(json.dumps(config))
        for more in (("--convention", "llama.cpp"), ("--bos",), ()):
            atd(*evaluation, "--tokenizer", other, *more)
    assert seen == [1, 1, None, None, 1, None]
    monkeypatch.setattr("atd.models.config.AFTER_BOS", ("llama",))
    notes = [atd(*evaluation, *more)[2] for more in (("--bos",), ("--quiet",), ())]
    assert ["give --bos" in note for note in notes] == [False, False, True]


def test_figures_are_written_before_they_are_printed(atd, stories260k, text, tmp_path, monkeypatch):
    loaded = LoadedCheckpoint("m", None, 16.0, 1)  # type: ignore[arg-type]
    figures = (None, None, None, None, None, 1, 63, 64, False, "standard", 64, 1.0, 1.0)

    def full(table):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("atd.runtime.compare.load_checkpoint", lambda path, **options: loaded)
    monkeypatch.setattr(
        "atd.runtime.compare.compare", lambda *_, **options: {text.name: Evaluation(2.0, *figures)}
    )
    monkeypatch.setattr("atd.reports.tables.evaluation_table", full)
    file = tmp_path / "figures.json"
    sizes = ("--context", 64, "--tokens", 64)
    code, _, err = atd("eval", stories260k, "--data", text, *sizes, "--json", file)
    assert (code, err) == (1, "error: the output: No space left on device\n")
    assert json.loads(file.read_text())["perplexity"] == 2


def test_eval_writes_figures_into_the_card(atd, converted, stories260k, text, tmp_path, refused):
    out = shutil.copytree(converted, tmp_path / "out")
    eval_it = ("eval", out, "--data", text, "--context", 64, "--tokens", 256, "--card")
    code, _, err = atd(*eval_it, "--against", stories260k)
    assert code == 0, err
    assert atd(*eval_it)[0] == 0
    card = (out / "README.md").read_text().replace("\\_", "_")  # Markdown escapes underscores
    rows = [line for line in card.splitlines() if text.name in line]
    assert [f"| {stories260k.name} |" in row for row in rows] == [True, False]
    assert atd("verify", out)[0] == 0
    figures = ("--data", text, "--context", 64, "--tokens", 256)
    refused(atd("eval", stories260k, *figures, "--card"), "not a checkpoint that atd made")


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
    assert re.match(r"Once upon a time(,| \w+)", texts["xla"])


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
    code, printed, err = atd(
        "convert",
        stories260k,
        tmp_path / "o [1]",
        "--recipe",
        "datafree2",
        "--set",
        "decompose.bases=1",
        "--set",
        "decompose.group=row",
    )
    assert code == 0, err
    assert "packed n=1 g=row" in (tmp_path / "o [1]" / "atd_graph.json").read_text()
    assert "bases = 1" in (tmp_path / "o [1]" / "recipe.toml").read_text()
    assert f"atd generate '{tmp_path}/o [1]', atd inspect" in printed  # a shell takes it as it is


def test_an_allocation_is_shown_and_drawn(atd, stories260k, text, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(console, "width", 140)
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        "calibration_tokens = 2048\ncalibration_context = 128\n"
        '[[passes]]\nname = "allocate"\nbits = 3.4\ntokens = 512\n'
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


def test_ternary_models_go_to_other_tools(atd, converted, stories260k, tmp_path, refused):
    model, out = tmp_path / "model", tmp_path / "out"
    refused(atd("export", converted, out, "--to", "bitnet"), "greedy3 --set decompose.bases=1")
    refused(atd("export", converted, out, "--to", "bit-ttt"), "--recipe greedy3")
    way = ("--recipe", "greedy3", "--set", "decompose.bases=1")
    assert atd("convert", stories260k, model, *way)[0] == 0
    for name, said in {"bitnet": "Hugging Face's bitnet", "bit-ttt": "Bit-TTT-Engine"}.items():
        code, printed, err = atd("export", model, out, "--to", name)
        assert (code, said in printed) == (0, True), err
        assert "n=1 g=tensor" in atd("inspect", out, "--nodes")[1]
        refused(atd("export", model, out, "--to", name), "exists", "--overwrite")
        assert atd("export", model, out, "--to", name, "--overwrite")[0] == 0
        assert atd("verify", out)[0] == 0
        shutil.rmtree(out)
    refused(atd("export", model, out, "--to", "bitnet", "--dtype", "float16"), "leave it out")
    assert not out.exists()


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


def test_the_version(atd):
    assert atd("--version") == (0, f"atd {__version__}\n", "")


def test_sweep_is_another_name_for_study(atd):
    assert atd("sweep", "--help") == atd("study", "--help")
