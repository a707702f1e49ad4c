"""atd: a JAX compiler for the weights of language models.

    atd.convert(path, out, recipe="ternary2")     checkpoint -> N-base ternary checkpoint
    atd.open(path)                                checkpoint -> graph, weights read when asked for
    atd.Pipeline([...])(graph)                    passes composed by hand; atd.Pass is their base
    atd.load(path_or_graph)                       -> Flax NNX model with jitted prefill and decode
    atd.evaluate(model, tokens, context=512,      perplexity, KL divergence, top-1 agreement
                 against=dense)
    atd.generate(model, tokens,                   greedy, or sampled with a seed
                 max_new_tokens=64)

These names are the public API. Each is imported when it is first used, so that `atd.kernels` needs
jax and numpy alone.
"""

import importlib
from typing import TYPE_CHECKING

from atd.version import __version__

if TYPE_CHECKING:
    from atd.models.frontend import open
    from atd.models.model import load
    from atd.pipeline import Pass, Pipeline
    from atd.pipeline.convert import convert
    from atd.runtime.evaluate import evaluate
    from atd.runtime.generate import generate

__all__ = ["Pass", "Pipeline", "__version__", "convert", "evaluate", "generate", "load", "open"]

# No name may be that of a module or folder in atd/: importing that one would hide it.
_HOME = {
    "Pass": "atd.pipeline",
    "Pipeline": "atd.pipeline",
    "convert": "atd.pipeline.convert",
    "evaluate": "atd.runtime.evaluate",
    "generate": "atd.runtime.generate",
    "load": "atd.models.model",
    "open": "atd.models.frontend",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'atd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
