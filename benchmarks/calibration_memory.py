"""Peak memory of calibrated conversions of random models, over tokens, depth and limits.

    python benchmarks/calibration_memory.py --hidden 1024 --mlp 4096 --tokens 4096 32768
    python benchmarks/calibration_memory.py --hidden 1024 --mlp 4096 --tokens 32768 --limits 1.2GB

Each conversion is a process of its own, and its peak is the resident memory that the system counts
for it, files that are mapped included. «Predicted» is what `atd convert` says before it begins, no
more than its limit. Weights are random, the text is random words in the frequencies of Zipf's law.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from atd.calibration.memory import memory
from atd.decomposition.allocation import parse_bytes
from atd.models import frontend

VOCABULARY = 4096
HEAD = 64  # features of a head
CONTEXT = 512  # tokens of a window


def random_model(folder: Path, hidden: int, mlp: int, layers: int) -> Path:
    """Writes a Llama with random weights and a tokenizer of words."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (hidden // 4, hidden))
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (mlp, hidden))
    shapes |= {"mlp.down_proj": (hidden, mlp)}

    def matrix(out: int, inputs: int) -> np.ndarray:
        weights = rng.standard_normal((out, inputs), np.float32) / np.sqrt(inputs)
        return weights.astype(ml_dtypes.bfloat16)

    ones = np.ones(hidden, ml_dtypes.bfloat16)
    tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, hidden), "model.norm.weight": ones}
    for i in range(layers):
        block = f"model.layers.{i}"
        tensors |= {f"{block}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = ones
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD // 4,
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, "w0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    return folder


def peak(command: list[str]) -> tuple[float, float]:
    """(peak resident bytes, seconds) of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return 1024.0 * used.ru_maxrss, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=4096)
    parser.add_argument("--layers", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--limits", nargs="+", default=[], help="like 2GB; also without one")
    parser.add_argument("--recipe", default="ternary2")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    table = Table("blocks", "tokens", "limit", "predicted", "peak", "seconds")
    with tempfile.TemporaryDirectory() as temporary:
        folder, rng = Path(temporary), np.random.default_rng(1)
        odds = 1 / np.arange(1, VOCABULARY + 1)
        ids = rng.choice(VOCABULARY, max(options.tokens), p=odds / odds.sum())
        (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
        for layers in options.layers:
            model = random_model(folder / f"{layers}", options.hidden, options.mlp, layers)
            for tokens in options.tokens:
                needed = memory(frontend.open(model), tokens, CONTEXT)
                everything = needed.work + needed.streams + needed.inner
                for limit in ["", *options.limits]:
                    command = [sys.executable, "-m", "atd", "convert", str(model)]
                    command += [str(folder / "out"), "--overwrite", "--quiet"]
                    command += ["--recipe", options.recipe, "--calib", str(folder / "text.txt")]
                    command += ["--calibration-tokens", str(tokens)]
                    command += [part for one in options.overrides for part in ("--set", one)]
                    command += ["--memory", limit] if limit else []
                    found, seconds = peak(command)
                    predicted = min(everything, parse_bytes(limit) if limit else everything)
                    figures = (f"{bytes / 1e9:.2f} GB" for bytes in (predicted, found))
                    table.add_row(
                        f"{layers}", f"{tokens:,}", limit or "none", *figures, f"{seconds:.0f}"
                    )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
