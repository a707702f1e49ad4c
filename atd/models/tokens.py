"""Checks token ids where they enter: in a gather, ids beyond the vocabulary are silently the last
one.
"""

import numpy as np

from atd.errors import BadInput


def check_tokens(tokens, vocabulary: int) -> None:
    """Raises BadInput for token ids that are no integers from 0 to `vocabulary` - 1."""
    tokens = np.asarray(tokens)
    if not tokens.size:
        return
    if not np.issubdtype(tokens.dtype, np.integer):
        raise BadInput(f"token ids are {tokens.dtype}; expected integers")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise BadInput(
            f"token id {high if high >= vocabulary else low} lies outside the model's vocabulary "
            f"of {vocabulary}: the tokenizer is another model's"
        )
