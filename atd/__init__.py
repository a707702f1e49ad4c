"""atd: a JAX compiler for the weights of language models.

    atd.convert(path, out, recipe="ternary2")                checkpoint -> N-base ternary checkpoint
    atd.load(out)                                            -> Flax NNX model with jitted prefill and decode
    atd.evaluate(model, tokens, context=512, against=dense)  perplexity, KL divergence, top-1 agreement
    atd.generate(model, tokens, max_new_tokens=64)           greedy or sampled with a seed
    atd.Pipeline([...])(atd.open(path))                      passes composed by hand, on the graph of a checkpoint

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
