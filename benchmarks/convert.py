"""Speed and peak memory of `atd convert` on Llama-3-8B's shapes with few blocks: memory must not grow with depth.

    python benchmarks/convert.py [--blocks 1 2 4] [--recipe datafree2]      about 3 minutes and 6 GB of disk
    python benchmarks/convert.py --tiny                                    seconds, for CI

Weights are random bf16 normal numbers, one shard a block, embedding and head as wide as the real ones (untied). Each
conversion is a process of its own; peak memory is what the operating system saw of it (resident set, pages of mapped
files included).
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from atd.checkpoint.writer import write_shard
from atd.ir import in_memory
from atd.weights import Dense

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TINY = LLAMA_3_8B | {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def write_checkpoint(folder: Path, config: dict, blocks: int) -> int:
    """A random checkpoint of these shapes; returns the number of weights of its linears."""
    rng = np.random.default_rng(0)
    hidden, mlp, vocabulary = (
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
    )
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    linears = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    mlps = {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}

    def random(name: str, shape: tuple[int, ...]):
        return in_memory(
            name, Dense((rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16))
        )

    def gain(name: str):
        return in_memory(name, Dense(np.ones(hidden, ml_dtypes.bfloat16)))

    folder.mkdir(parents=True)
    shards = {
        "embed": [("model.embed_tokens.weight", (vocabulary, hidden))],
        "head": [("lm_head.weight", (vocabulary, hidden))],
    }
    for i in range(blocks):
        b = f"model.layers.{i}"
        shards[f"block-{i}"] = [
            *((f"{b}.self_attn.{n}_proj.weight", shape) for n, shape in linears.items()),
            *((f"{b}.mlp.{n}_proj.weight", shape) for n, shape in mlps.items()),
        ]
    weight_map, weights = {}, 0
    for shard, tensors in shards.items():
        file = f"{shard}.safetensors"
        refs = [random(name, shape) for name, shape in tensors]
        if shard.startswith("block"):
            weights += sum(int(np.prod(shape)) for _, shape in tensors)
            b = f"model.layers.{shard.removeprefix('block-')}"
            refs += [
                gain(f"{b}.input_layernorm.weight"),
                gain(f"{b}.post_attention_layernorm.weight"),
            ]
        elif shard == "head":
            refs.append(gain("model.norm.weight"))
        weight_map |= dict.fromkeys(write_shard(folder / file, refs), file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    return weights


def convert(model: Path, out: Path, recipe: str) -> tuple[float, float, float]:
    """(seconds in all, seconds in the decoder's blocks, peak bytes) of `atd convert` in a process of its own."""
    started = time.perf_counter()
    child = os.spawnv(
        os.P_NOWAIT,
        sys.executable,
        [sys.executable, "-m", "atd.convert_adaptive", str(model), str(out), "--recipe", recipe],
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit("the conversion failed")
    rows = json.loads((out / "report.json").read_text())["nodes"]
    blocks = sum(row["seconds"] for row in rows if row["error"] is not None)
    return time.perf_counter() - started, blocks, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--recipe", default="datafree2")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--folder", type=Path, help="where to write the checkpoints; a temporary folder by default"
    )
    arguments = parser.parse_args()
    table = Table(
        title=f"atd convert --recipe {arguments.recipe}, Llama-3-8B's shapes{' made tiny' if arguments.tiny else ''}"
    )
    for column in (
        "blocks",
        "weights of linears",
        "seconds in all",
        "million weights/s in blocks",
        "peak memory",
    ):
        table.add_column(column, justify="right")
    rows = []
    for blocks in arguments.blocks:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            weights = write_checkpoint(
                folder / "model", TINY if arguments.tiny else LLAMA_3_8B, blocks
            )
            seconds, in_blocks, peak = convert(folder / "model", folder / "out", arguments.recipe)
        finally:
            shutil.rmtree(folder)
        rows.append(
            {
                "blocks": blocks,
                "weights": weights,
                "seconds": seconds,
                "weights_per_second": weights / in_blocks,
                "peak_bytes": peak,
            }
        )
        table.add_row(
            str(blocks),
            f"{weights:,}",
            f"{seconds:.1f}",
            f"{weights / in_blocks / 1e6:.1f}",
            f"{peak / 1e9:.2f} GB",
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"recipe": arguments.recipe, "cores": os.cpu_count(), "rows": rows}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
