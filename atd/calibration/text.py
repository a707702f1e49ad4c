"""Which text a conversion is calibrated on: files, text that the model writes itself, or several of them in equal parts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from atd.calibration.self_text import cached_self_text
from atd.calibration.windows import cut_windows, tokens_digest
from atd.checkpoint.files import read_text
from atd.checkpoint.reader import open_tokenizer
from atd.errors import BadInput
from atd.ir import Graph
from atd.progress import Progress

SELF = "self"  # a file of this name: ./self


def calibration_text(
    texts: Sequence[str],
    source: Path,
    graph: Graph,
    cache: Path,
    *,
    tokens: int,
    context: int,
    seed: int,
    sha256: str,
    say: Callable[[str], None],
    progress: Callable[[Progress], None],
) -> np.ndarray:
    """Windows int32 [windows, context]: `tokens` in equal parts from each of the texts, in turns.

    Raises BadInput where a text is too short (says how much is needed), or the windows are not those that `sha256`
    names ("": any).
    """
    context = min(context, graph.config.get("max_position_embeddings") or context)
    count = tokens // len(texts)

    def drawn(done: int, total: int) -> None:
        progress(Progress("writing calibration text", done, total, "tokens"))

    words, parts = open_tokenizer(source), []
    for text in texts:
        if text == SELF:
            parts.append(
                cached_self_text(
                    graph,
                    words,
                    tokens=count,
                    context=context,
                    seed=seed,
                    cache=cache,
                    progress=drawn,
                )
            )
        else:
            parts.append(cut_windows(words.encode(read_text(text)), count, context, text))
    shortest = min(map(len, parts))
    windows = np.stack([part[:shortest] for part in parts], axis=1).reshape(
        -1, context
    )  # one of each in turns
    if sha256 not in ("", digest := tokens_digest(windows)):
        raise BadInput(
            f"the recipe was calibrated on other text: {', '.join(texts)} gives tokens of sha256 {digest[:12]}..., "
            f"it names {sha256[:12]}...; give that text with --calib, or remove calibration_sha256 from the recipe"
        )
    say(f"calibration: {len(windows)} windows of {context} tokens, {' and '.join(texts)}")
    return windows
