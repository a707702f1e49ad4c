"""atd: a JAX compiler for the weights of language models.

    atd.convert(model, out, recipe="ternary2")   checkpoint -> N-base ternary checkpoint
    atd.load(out)                                -> Flax NNX model with jitted prefill and decode
    atd.evaluate(model, tokens, against=dense)   perplexity, KL divergence, top-1 agreement
    atd.Pipeline([...])                          passes composed by hand

Names load on first use, so that `atd.kernels` needs jax and numpy alone.
"""

import importlib

__version__ = "0.1.0"
_HOME = {
    "convert": "atd.convert_adaptive",
    "load": "atd.models.model",
    "Pipeline": "atd.pipeline",
    "Pass": "atd.pipeline",
    "evaluate": "atd.evaluate",
    "generate": "atd.generate",
    "open": "atd.models.frontend",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'atd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
