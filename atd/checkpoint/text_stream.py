"""Turns the tokens of a running generation into text, as they come.

    stream = TextStream(tokenizer, prompt_ids)
    for token in ...:
        print(stream.add(token), end="")
    print(stream.end())

A tokenizer decodes sequences, not tokens: a blank at the beginning of a text may be dropped, and
the bytes of one character may be spread over tokens. So each step decodes a few tokens with those
behind them, and gives out what the new ones add.
"""

from collections.abc import Iterable

from atd.checkpoint.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what a character is decoded to whose bytes are not all there


class TextStream:
    """The text behind a prompt, in whole characters.

    All parts together are `tokenizer.decode([*prompt, *tokens])` without the prompt's own text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._ids = tokenizer.shown(prompt)
        # Decoding begins at `_start`; the text of `_ids[_start:_end]` is given out.
        self._start, self._end = 0, len(self._ids)

    def add(self, token: int) -> str:
        """Returns the text that the token completes; "" inside a character."""
        self._ids += self._tokenizer.shown([token])
        text = self._rest()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text

    def end(self) -> str:
        """Returns what is left: a character that never became whole, as U+FFFD."""
        text, self._end = self._rest(), len(self._ids)
        return text

    def _rest(self) -> str:
        """The text that was not given out."""
        given = self._tokenizer.decode(self._ids[self._start : self._end])
        return self._tokenizer.decode(self._ids[self._start :])[len(given) :]
