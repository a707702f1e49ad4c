"""Reads or writes the text that a conversion is calibrated on: files, the model's own, or both."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from atd.calibration.self_text import cached_self_text
from atd.calibration.windows import cut_windows, tokens_digest
from atd.checkpoint.cache import Cache
from atd.checkpoint.files import read_text
from atd.checkpoint.reader import open_tokenizer
from atd.errors import BadInput, about
from atd.ir import Graph
from atd.models.config import expects_bos
from atd.models.tokens import check_tokens
from atd.progress import Report, Say, unheard

SELF = "self"  # a file of this name: ./self


def window_length(graph: Graph, context: int) -> int:
    """Returns how many tokens a window has: `context`, or the model's where that is less."""
    return min(context, graph.config.get("max_position_embeddings") or context)


def window_count(texts: Sequence[str], tokens: int, length: int) -> int:
    """Returns how many windows of this length are cut from the texts together."""
    return len(texts) * (tokens // len(texts) // length)


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

    Of families that expect BOS in front of a text, each window begins with it.

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
        BadInput: where a text is too short (says how much is needed), its tokens lie outside the
            vocabulary, or the windows have another sha256. Files are read before the model writes.
    """
    context = window_length(graph, context)
    count = tokens // len(texts)
    sizes = {"tokens": count, "context": context}
    tokenizer, parts = open_tokenizer(source), {}
    after_bos = expects_bos(graph.config) and tokenizer.bos_id is not None
    for text in sorted(texts, key=lambda text: text == SELF):  # files are refused before it writes
        if text == SELF:
            options = {"seed": seed, "cache": cache, "after_bos": after_bos, "progress": progress}
            parts[text] = cached_self_text(graph, tokenizer, **sizes, **options)
        else:
            parts[text] = cut_windows(tokenizer.encode(read_text(text)), count, context, text)
        with about(text):
            check_tokens(parts[text], graph.vocabulary)
    windows = np.stack([parts[text] for text in texts], axis=1)  # one of each in turns
    windows = windows.reshape(-1, context)
    if after_bos:
        bos = np.full((len(windows), 1), tokenizer.bos_id, np.int32)
        windows = np.concatenate([bos, windows[:, :-1]], axis=1)
    if sha256 not in ("", digest := tokens_digest(windows)):
        raise BadInput(
            f"the recipe was calibrated on other text: {', '.join(texts)} gives tokens of sha256 "
            f"{digest[:12]}..., it names {sha256[:12]}...; give that text with --calib, or remove "
            f"calibration_sha256 from the recipe"
        )
    front = ", BOS in front" if after_bos else ""
    say(f"calibration: {len(windows)} windows of {context} tokens{front}, {' and '.join(texts)}")
    return windows
