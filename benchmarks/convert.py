"""Speed and peak memory of `atd convert` on Llama 3's shapes with few blocks.

    python benchmarks/convert.py [--blocks 1 2 4] [--recipe datafree2]    3 minutes, 6 GB of disk
    python benchmarks/convert.py --shapes llama3-70b --blocks 1 3         4 minutes, 14 GB of disk
    python benchmarks/convert.py --tiny                                   seconds, for CI

Peak memory does not grow with depth. Weights are random normal numbers in bf16, one shard per unit,
embedding and head as wide as the real ones (untied). Each conversion is a process of its own; peak
memory is its resident set as the operating system sees it, pages of mapped files included.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from random_checkpoint import SHAPES, shapes, write_checkpoint
from rich.console import Console
from rich.table import Table

from atd.checkpoint.files import write_json

TINY = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 512}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def convert(model: Path, out: Path, recipe: str) -> tuple[float, float, float]:
    """(seconds in all, seconds in the decoder's blocks, peak bytes) of `atd convert` in a process
    of its own."""
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
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--recipe", default="datafree2")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--folder", type=Path, help="where to write the checkpoints; a temporary folder by default"
    )
    arguments = parser.parse_args()
    table = Table(
        title=f"atd convert --recipe {arguments.recipe}, shapes of {arguments.shapes}"
        + (" made tiny" if arguments.tiny else "")
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
            sizes = (TINY if arguments.tiny else {}) | {"num_hidden_layers": blocks}
            weights = write_checkpoint(folder / "model", shapes(arguments.shapes, **sizes))
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
        made_of = {"recipe": arguments.recipe, "shapes": arguments.shapes, "cores": os.cpu_count()}
        write_json(arguments.json, made_of | {"rows": rows})


if __name__ == "__main__":
    main()
