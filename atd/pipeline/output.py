"""Writes what a folder holds besides its shards: config, graph, index, tokenizer; recipe, report,
model card and manifest.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from atd.calibration.text import SELF
from atd.checkpoint.folder import CARD, GRAPH, MANIFEST, REPORT, write_manifest
from atd.checkpoint.journal import JournalEntry
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.safetensors import INDEX
from atd.checkpoint.writer import file_digest, write_file
from atd.errors import BadInput
from atd.ir import Graph
from atd.models import frontend
from atd.models.config import both_dtypes
from atd.models.frontend import FORMAT_VERSION
from atd.pipeline.card import converted_card
from atd.pipeline.recipe import Recipe
from atd.progress import Say
from atd.version import __version__


def tokenizer_files(source: Path, say: Say) -> dict[str, bytes]:
    """Returns the tokenizer's files by name.

    Warns where the source has no tokenizer, and returns none; says what one had to assume.
    """
    try:
        tokenizer = open_tokenizer(source)
        if tokenizer.assumed:
            say(f"note: {tokenizer.assumed}")
        return tokenizer.files()
    except BadInput as error:
        say(
            f"warning: {error}. The converted checkpoint will have no tokenizer; "
            "eval and generate need one (--tokenizer)"
        )
        return {}


def index_text(size: int, weight_map: Mapping[str, str]) -> str:
    """Returns the index of a sharded checkpoint: bytes of all tensors, and the shard of each."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(weight_map)}
    return json.dumps(index, indent=1, sort_keys=True) + "\n"


def write_metadata(
    folder: Path,
    graph: Graph,
    recipe: Recipe,
    entries: Sequence[JournalEntry],
    tokenizer: Mapping[str, bytes],
) -> None:
    """Writes what a reader needs besides the shards: config, graph, index, tokenizer."""
    quantization = {
        "quant_method": "atd",
        "format_version": FORMAT_VERSION,
        "passes": [str(step) for step in recipe.pipeline.passes],
    }
    config = both_dtypes(graph.config) | {"quantization_config": quantization}
    size = sum(ref.type.nbytes for _, ref in graph.weights())
    files = {
        "config.json": json.dumps(config, indent=2) + "\n",
        GRAPH: json.dumps(graph.to_json(), indent=1) + "\n",
        INDEX: index_text(size, {name: e.shard for e in entries for name in e.tensors}),
        **tokenizer,
    }
    for name, content in files.items():
        write_file(folder / name, content)


def write_summary(
    folder: Path,
    source: Path,
    recipe: Recipe,
    entries: Sequence[JournalEntry],
    tokenizer: Mapping[str, bytes],
    windows: np.ndarray | None,
) -> list[str]:
    """Writes the resolved recipe, report.json, the model card and the manifest of digests.

    Returns the names of all files of the checkpoint.

    The report holds times, which alone differ from run to run; the manifest covers everything else.
    """
    write_file(folder / "recipe.toml", recipe.to_toml())
    report = {"source": source.name, "nodes": [row for entry in entries for row in entry.report]}
    write_file(folder / REPORT, json.dumps(report, indent=1) + "\n")
    passes = [str(step) for step in recipe.pipeline.passes]
    write_file(folder / CARD, converted_card(source, frontend.open(folder), passes))
    digests = {entry.shard: entry.sha256 for entry in entries}
    for name in ("config.json", GRAPH, INDEX, "recipe.toml", CARD, *tokenizer):
        digests[name] = file_digest(folder / name)
    about = {
        "format_version": FORMAT_VERSION,
        "atd": __version__,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        **({} if windows is None else {"calibration": _calibration(recipe, windows)}),
    }
    write_manifest(folder, about, digests)
    return [*digests, REPORT, MANIFEST]


def _calibration(recipe: Recipe, windows: np.ndarray) -> dict:
    """What a model was calibrated on, for its manifest."""
    return {
        "texts": [text if text == SELF else Path(text).name for text in recipe.calibration],
        "tokens_sha256": recipe.calibration_sha256,
        "windows": list(windows.shape),
    }
