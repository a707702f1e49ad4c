"""Reads or writes the text that a conversion is calibrated on: files, the model's own, or both."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from atd.calibration.self_text import cached_self_text
from atd.calibration.windows import cut_windows, tokens_digest
from atd.checkpoint.cache import Cache
from atd.checkpoint.files import read_text
from atd.checkpoint.reader import open_tokenizer
from atd.errors import BadInput
from atd.ir import Graph
from atd.progress import Report, Say, unheard

SELF = "self"  # a file of this name: ./self


def calibration_text(
    texts: Sequence[str],
    source: Path,
    graph: Graph,
    cache: Cache,
    *,
    tokens: int,
    context: int,
    seed: int,
    sha256: str,
    say: Say = print,
    progress: Report = unheard,
) -> np.ndarray:
    """Cuts windows from texts: `tokens` tokens in equal parts from each, in turns.

    Args:
        texts: files, or SELF for text that the model writes.
        source: the checkpoint, for its tokenizer.
        graph: its graph, which writes SELF.
        cache: where what it writes is kept.
        context: tokens per window; the model's, where that is shorter.
        seed: of what the model writes.
        sha256: that the windows must have; "": any.

    Returns:
        int32 [windows, context].

    Raises:
        BadInput: where a text is too short (says how much is needed), or the windows have another
            sha256.
    """
    context = min(context, graph.config.get("max_position_embeddings") or context)
    count = tokens // len(texts)
    sizes = {"tokens": count, "context": context}
    tokenizer, parts = open_tokenizer(source), []
    for text in texts:
        if text == SELF:
            options = {"seed": seed, "cache": cache, "progress": progress}
            parts.append(cached_self_text(graph, tokenizer, **sizes, **options))
        else:
            parts.append(cut_windows(tokenizer.encode(read_text(text)), count, context, text))
    shortest = min(map(len, parts))
    windows = np.stack([part[:shortest] for part in parts], axis=1)  # one of each in turns
    windows = windows.reshape(-1, context)
    if sha256 not in ("", digest := tokens_digest(windows)):
        raise BadInput(
            f"the recipe was calibrated on other text: {', '.join(texts)} gives tokens of sha256 "
            f"{digest[:12]}..., it names {sha256[:12]}...; give that text with --calib, or remove "
            f"calibration_sha256 from the recipe"
        )
    say(f"calibration: {len(windows)} windows of {context} tokens, {' and '.join(texts)}")
    return windows
