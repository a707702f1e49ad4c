"""Makes tests/golden/hf: tiny packed models, with their logits by atd and by transformers.

    python -m tests.golden.make_hf_golden                 converts them; logits by atd
    python -m tests.golden.make_hf_golden transformers    adds logits by transformers

The second needs torch and transformers (5.24 was used) besides jax. Of each folder the files stay
that a model is made of.
"""
# pyright: reportMissingImports=false

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
OUT = HERE / "hf"
# name -> (dense model, passes)
MODELS = {
    # joined matrices, free scales of groups, llama3 rope
    "groups": ("llama_gqa", ("decompose{bases = 2, group = 32}", "fuse", "pack")),
    # joined matrices with biases, tied scales, norms of q and k
    "tied": ("qwen3", ("decompose{bases = 3, scales = 'tied', group = 'row'}", "fuse", "pack")),
    # rotations of all kinds, trellis codes, a tied embedding that is packed
    "rotated": (
        "stories",
        (
            "fold_norms",
            "rotate{r3 = true, embedding = true}",
            "decompose{bases = 2, group = 'row', trellis = 'default', nodes = '.*'}",
            "fuse",
            "pack",
        ),
    ),
}


def convert_all() -> None:
    """Converts the models and writes their logits by atd."""
    import atd
    from atd.checkpoint.folder import GRAPH

    for name, (source, passes) in MODELS.items():
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        atd.convert(HERE / source, folder, atd.Pipeline(list(passes)), say=lambda line: None)
        for path in folder.iterdir():
            if path.name not in ("config.json", GRAPH) and "safetensors" not in path.name:
                path.unlink()
        model = atd.load(folder)
        tokens = np.random.default_rng(0).integers(0, model.vocabulary, (1, 16), dtype=np.int32)
        save(name, {"tokens": tokens, "atd": np.asarray(model(tokens))})


def add_transformers() -> None:
    """Adds transformers' logits of the same files."""
    import torch
    from transformers import AutoModelForCausalLM

    import atd.hf  # noqa: F401  registers the format

    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(OUT / name, dtype=torch.float32)
        arrays = dict(np.load(OUT / f"{name}.npz"))
        with torch.no_grad():
            logits = model(torch.from_numpy(arrays["tokens"]).long()).logits
        save(name, arrays | {"transformers": logits.numpy()})


def save(name: str, arrays: dict[str, Any]) -> None:
    """Writes the tokens and logits of a model."""
    np.savez_compressed(OUT / f"{name}.npz", **arrays)


if __name__ == "__main__":
    add_transformers() if sys.argv[1:] == ["transformers"] else convert_all()
