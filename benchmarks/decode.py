"""Decode and prefill speed of one model: dense, converted and packed in memory, converted and unpacked at load.

    python benchmarks/decode.py MODEL [--recipe datafree2] [--json FILE] [--tiny]

Every figure is the median over repeats, and the variants take turns within each repeat, so that a busy machine slows
all of them alike. Decoding: one sequence, greedy, each token waited for. Dispatch: the share of a decode step in which
the host, and not the device, was busy making the calls.
"""

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from atd.convert_adaptive import convert
from atd.models.model import Model, load


def prefill_seconds(model: Model, prompt: np.ndarray, length: int):
    """(seconds of one prefill, cache, the likeliest next token)."""
    cache = model.new_cache(1, length)
    jax.block_until_ready(cache.blocks)
    started = time.perf_counter()
    logits, cache = model.prefill(prompt, cache)
    token = jax.block_until_ready(logits.argmax(axis=-1))
    return time.perf_counter() - started, cache, token


def decode_seconds(model: Model, token, cache, steps: int) -> tuple[float, float]:
    """(seconds a token, of which the host spent so many on calls)."""
    seconds, calls = [], []
    for _ in range(steps):
        started = time.perf_counter()
        logits, cache = model.decode(token, cache)
        called = time.perf_counter()
        token = jax.block_until_ready(logits.argmax(axis=-1))
        seconds.append(time.perf_counter() - started)
        calls.append(called - started)
    return median(seconds), median(calls)


def measure(models: dict[str, Model], prompt_length: int, steps: int, repeats: int) -> list[dict]:
    """A row of figures for each model."""
    prompt = np.random.default_rng(0).integers(0, min(m.vocabulary for m in models.values()), (1, prompt_length))
    length = prompt_length + steps + 1
    samples = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            prefill, cache, token = prefill_seconds(model, prompt, length)
            decode, calls = decode_seconds(model, token, cache, steps)
            if repeat:  # the first compiles
                samples[name].append((prefill, decode, calls))
    rows = []
    for name, model in models.items():
        prefill, decode, calls = (median(values) for values in zip(*samples[name], strict=True))
        row = {"model": name, "weights_bytes": model.weights_nbytes, "prefill_tokens_per_s": prompt_length / prefill}
        rows.append(row | {"decode_ms": 1e3 * decode, "decode_tokens_per_s": 1 / decode, "dispatch_ms": 1e3 * calls})
    for row in rows:
        for figure in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            row[f"{figure}_ratio"] = row[figure] / rows[0][figure]
    return rows


def table(rows: list[dict], title: str) -> Table:
    out = Table(title=title)
    for column in (
        "model",
        "MB",
        "prefill\ntokens/s",
        "x dense",
        "decode\ntokens/s",
        "x dense",
        "ms a\ntoken",
        "dispatch",
    ):
        out.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        out.add_row(
            row["model"],
            f"{row['weights_bytes'] / 1e6:.1f}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['prefill_tokens_per_s_ratio']:.2f}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['decode_tokens_per_s_ratio']:.2f}",
            f"{row['decode_ms']:.2f}",
            f"{row['dispatch_ms'] / row['decode_ms']:.0%}",
        )
    return out


def main(
    model: Annotated[Path, tyro.conf.Positional],
    *,
    recipe: str = "datafree2",
    converted: Path | None = None,
    dtype: str = "float32",
    prompt: int = 128,
    steps: int = 64,
    repeats: int = 5,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    tiny: bool = False,
) -> None:
    """Decode and prefill tokens/s, dense against converted.

    Args:
        model: dense Hugging Face folder or .gguf file.
        recipe: how to convert it.
        converted: a folder converted before, instead.
        dtype: of dense matrices in memory: float32, bfloat16 or float16.
        prompt: tokens of the prompt.
        steps: tokens decoded after it.
        repeats: measured rounds over all variants.
        json_file: write the figures there as well.
        tiny: a quick look whether it runs: 16 tokens, 8 steps, one round.
    """
    console = Console()
    if tiny:
        prompt, steps, repeats = 16, 8, 1
    with tempfile.TemporaryDirectory() as scratch:
        if converted is None:
            converted = Path(scratch) / "converted"
            with console.status(f"converting {model} by recipe {recipe}"):
                convert(model, converted, recipe)
        with console.status("loading"):
            models = {
                "dense": load(model, dtype=dtype),
                "xla (packed)": load(converted, backend="xla", dtype=dtype),
                "xla-unpacked": load(converted, backend="xla-unpacked", dtype=dtype),
            }
        with console.status("measuring"):
            rows = measure(models, prompt, steps, repeats)
    device = jax.devices()[0]
    console.print(
        table(rows, f"{model.name}, prompt {prompt}, {steps} tokens, {device.device_kind}, jax {jax.__version__}")
    )
    if json_file:
        json_file.write_text(
            json.dumps(
                {
                    "source": str(model),
                    "dtype": dtype,
                    "prompt": prompt,
                    "steps": steps,
                    "repeats": repeats,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    tyro.cli(main)
