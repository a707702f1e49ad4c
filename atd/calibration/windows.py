"""Cuts, counts and identifies windows of calibration text, int32 [windows, context]."""

import hashlib

import numpy as np

from atd.errors import BadInput


def cut_windows(
    tokens: np.ndarray, count: int, context: int, text: str = "the calibration text"
) -> np.ndarray:
    """Cuts windows that do not overlap.

    Args:
        tokens: int [n].
        count: of them that are cut.
        context: tokens per window.
        text: what the message calls them.

    Returns:
        [count // context, context].

    Raises:
        BadInput: there are too few tokens.
    """
    windows = count // context
    if windows < 1:
        raise BadInput(
            f"{count} calibration tokens are not one window of {context}; ask for more, or a "
            f"smaller context"
        )
    if len(tokens) < windows * context:
        raise BadInput(
            f"{text} has {len(tokens):,} tokens, {windows * context:,} are needed; give a longer "
            f"text, add one that the model writes (--calib self), or ask for fewer tokens "
            f"(--calibration-tokens, or calibration_tokens in the recipe)"
        )
    return tokens[: windows * context].reshape(windows, context)


def windows_holding(tokens: int, context: int) -> int:
    """Returns how many windows hold at least this many tokens: one or more."""
    return max(1, -(-tokens // context))


def tokens_digest(windows: np.ndarray) -> str:
    """Returns the SHA-256 of the windows, their shape included, in hexadecimal."""
    content = np.ascontiguousarray(windows).tobytes() + str(windows.shape).encode()
    return hashlib.sha256(content).hexdigest()
