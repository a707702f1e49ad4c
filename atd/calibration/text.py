"""Which text a conversion is calibrated on: files, text that the model writes itself, or several of them in equal parts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from atd.calibration.self_text import cached_self_text
from atd.calibration.streams import tokens_digest
from atd.checkpoint.tokenizer import open_tokenizer, read_text
from atd.errors import BadInput
from atd.ir import Graph
from atd.pipeline.driver import Progress
from atd.pipeline.recipe import Recipe

SELF = "self"  # a file of this name: ./self


def calibration_text(
    recipe: Recipe,
    source: Path,
    graph: Graph,
    cache: Path,
    say: Callable[[str], None],
    progress: Callable[[Progress], None],
) -> np.ndarray:
    """Windows int32 [windows, context]: `calibration_tokens` in equal parts from each text of the recipe, in turns.

    Raises BadInput where a text is too short (says how much is needed), or the windows are not those that the recipe
    names by their digest.
    """
    limit = graph.config.get("max_position_embeddings") or recipe.calibration_context
    context = min(recipe.calibration_context, limit)
    count = recipe.calibration_tokens // len(recipe.calibration)

    def drawn(done: int, total: int) -> None:
        progress(Progress(done, total, "writing calibration text", "tokens"))

    words, parts = open_tokenizer(source), []
    for text in recipe.calibration:
        if text == SELF:
            parts.append(
                cached_self_text(
                    graph, words, tokens=count, context=context, seed=recipe.seed, cache=cache, progress=drawn
                )
            )
        else:
            parts.append(calibration_windows(words.encode(read_text(text)), count, context, text))
    shortest = min(map(len, parts))
    windows = np.stack([part[:shortest] for part in parts], axis=1).reshape(-1, context)  # one of each in turns
    if recipe.calibration_sha256 not in ("", digest := tokens_digest(windows)):
        raise BadInput(
            f"the recipe was calibrated on other text: {', '.join(recipe.calibration)} gives tokens of sha256 {digest[:12]}..., "
            f"it names {recipe.calibration_sha256[:12]}...; give that text with --calib, or remove calibration_sha256 from the recipe"
        )
    say(f"calibration: {len(windows)} windows of {context} tokens, {' and '.join(recipe.calibration)}")
    return windows


def calibration_windows(tokens: np.ndarray, count: int, context: int, text: str = "the calibration text") -> np.ndarray:
    """The first `count` tokens as windows [windows, context] that do not overlap; raises BadInput where there are too few."""
    windows = count // context
    if windows < 1:
        raise BadInput(
            f"{count} calibration tokens are not one window of {context}; ask for more, or a smaller context"
        )
    if len(tokens) < windows * context:
        raise BadInput(
            f"{text} has {len(tokens):,} tokens, {windows * context:,} are needed; give a longer text, add one that the model "
            f"writes (--calib self), or set calibration_tokens in the recipe to less"
        )
    return tokens[: windows * context].reshape(windows, context)
