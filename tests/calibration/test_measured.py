"""Measured losses against evaluating the models that they are of."""

import jax
import jax.numpy as jnp
import numpy as np

from atd.calibration.measured import logits, measured_losses, quantized_candidates
from atd.decomposition.options import ternary_types
from atd.models.execute import dense_weights
from atd.progress import Progress
from atd.weights import Dense
from tests.models.tiny import tiny_graph


def test_measured_is_the_difference_between_whole_models():
    """A choice of two nodes at their other option, against evaluating the models this makes."""
    graph = tiny_graph()
    windows = np.random.default_rng(0).integers(0, 40, (2, 16)).astype(np.int32)
    names = [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    refs, heard = dict(graph.weights()), []
    candidates = {
        name: ternary_types(refs[name].type.shape, (1, 2), ("row",), ("tied",), "f16")
        for name in names
    }
    choices = [names[:2], names[2:]]
    pair, _ = measured_losses(graph, windows, choices, candidates, progress=heard.append)
    assert heard == [Progress("measuring sensitivities", i, 2, "choices") for i in (1, 2)]
    quantized = quantized_candidates(graph, windows, candidates)

    def logp(options):
        weights = [dense_weights(unit.nodes) for unit in graph.units]
        for name, option in options.items():
            block, node = int(name.split(".")[2]) + 1, name.split(".", 3)[3]
            weights[block][node] = {
                "weight": Dense(jnp.asarray(quantized[name][option].dequantize()))
            }
        parts = [np.asarray(part) for part in logits(graph, weights, windows)]
        return np.asarray(jax.nn.log_softmax(np.concatenate(parts)), np.float64)

    exact = logp({})
    kl = [(np.exp(exact) * (exact - logp(o))).sum() / windows.size for o in (
        dict.fromkeys(names[:2], 0) | {names[2]: 1}, dict.fromkeys(names, 1), {names[2]: 1},
    )]  # fmt: skip
    np.testing.assert_allclose(pair, [kl[0] - kl[2], kl[1] - kl[2]], rtol=1e-3)
