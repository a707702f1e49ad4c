"""The table of formats that `atd export --to` writes."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atd.errors import BadInput
from atd.progress import Report, Say

To = Literal["hf", "gguf", "bitnet", "bit-ttt"]


@dataclass(frozen=True)
class Format:
    """A format: the function that writes it, imported when it is used, and what it makes.

    The function is called with (model, out) and, by keyword, overwrite, ignore_extra, say, progress
    and the options of the format, which are its other parameters. It returns the path that it
    wrote.
    """

    function: str  # "module:name"
    makes: str  # "what OUT then holds"

    def load(self) -> Callable[..., Path]:
        """Imports the function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


FORMATS: dict[To, Format] = {
    "hf": Format("atd.exports.hf:export_hf", "dense weights in Hugging Face form"),
    "gguf": Format("atd.exports.gguf:export_gguf", "a GGUF file for llama.cpp"),
    "bitnet": Format(
        "atd.exports.bitnet:export_bitnet", "ternary weights in the form of Hugging Face's bitnet"
    ),
    "bit-ttt": Format(
        "atd.exports.bit_ttt:export_bit_ttt", "ternary weights in the form of Bit-TTT-Engine"
    ),
}


def export(
    model: Path,
    out: Path,
    to: To,
    options: dict[str, Any],
    *,
    overwrite: bool,
    ignore_extra: bool,
    say: Say,
    progress: Report,
) -> Path:
    """Writes a model in a format and returns the path that was written.

    Args:
      model: a checkpoint of any kind that atd reads.
      out: what to write.
      to: a name of FORMATS.
      options: those of the formats by name; None where the user gave none.
      overwrite: replace `out` if atd made it.
      ignore_extra: leave out tensors of `model` that are not part of its architecture.
      say: is told what a user should know.
      progress: is told how far it is.

    Raises:
        BadInput: an option was given that the format does not take; or as the format's function.
    """
    function = FORMATS[to].load()
    given = {name: value for name, value in options.items() if value is not None}
    takes = inspect.signature(function).parameters
    for name in given:
        if name not in takes:
            others = [other for other, f in FORMATS.items() if name in _parameters(f)]
            raise BadInput(
                f"--{name.replace('_', '-')} is no option of --to {to}; leave it out "
                f"(it is one of --to {', '.join(others)})"
            )
    common = {"overwrite": overwrite, "ignore_extra": ignore_extra}
    return function(model, out, **common, **given, say=say, progress=progress)


def _parameters(format: Format) -> set[str]:
    """The names of the parameters of the format's function."""
    return set(inspect.signature(format.load()).parameters)
