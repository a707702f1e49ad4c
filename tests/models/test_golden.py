"""Logits against transformers in float32 (tests/golden/make_golden.py): every family, two real
models, and GGUF.
"""

from dataclasses import replace

import gguf
import numpy as np
import pytest

from atd.ir import Graph
from atd.models import frontend
from atd.models.model import load
from tests.golden.write_gguf import GOLDEN, write_gguf

TOLERANCE = 1e-4  # of the largest logit
FOLDERS = (
    "llama_mha",
    "llama_gqa",
    "llama_bias",
    "mistral",
    "qwen2",
    "qwen3",
)  # whose stream can be rotated
FAMILIES = (
    "llama_yarn",
    "llama32",
    "qwen3_tied",
    "smollm3",
    "phi3",
    "granite",
    "olmo2",
    "gemma2",
    "gemma3",
)


def distance(model, golden) -> float:
    """Largest difference of logits over the largest logit."""
    logits = np.asarray(load(model, dtype="float32")(golden["tokens"]))
    if "vocabulary" in golden:
        logits = logits[..., golden["vocabulary"]]
    assert logits.dtype == np.float32
    assert logits.shape == golden["logits"].shape
    return float(np.abs(logits - golden["logits"]).max() / np.abs(golden["logits"]).max())


@pytest.mark.parametrize("name", [*FOLDERS, *FAMILIES])
def test_logits_of_every_family(name):
    assert distance(GOLDEN / name, np.load(GOLDEN / name / "logits.npz")) < TOLERANCE


def test_logits_of_a_trained_model(trained):
    """The packaged model's are those of make_stories.py."""
    assert distance(trained.folder, trained.golden()) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "llama_mha",
        "llama_gqa",
        "llama_bias",
        "qwen2",
        "qwen3",
        "llama_yarn",
        "llama32",
        "qwen3_tied",
        "smollm3",
        "phi3",
        "granite",
        "olmo2",
    ],
)
def test_logits_of_gguf(tmp_path, name):
    write_gguf(tmp_path / "m.gguf", name, gguf.GGMLQuantizationType.F32)
    golden = np.load(GOLDEN / name / "logits.npz")
    if (
        name == "qwen2"
    ):  # GGUF has no window for this one: compare with the folder's model without it
        graph = with_attrs(frontend.open(GOLDEN / name), "attention", window=0)
        golden = {
            "tokens": golden["tokens"],
            "logits": np.asarray(load(graph, dtype="float32")(golden["tokens"])),
        }
    assert distance(tmp_path / "m.gguf", golden) < TOLERANCE


def with_attrs(graph: Graph, op: str, **attrs) -> Graph:
    """The graph with these attrs of every node of this op."""

    def changed(block):
        return replace(
            block,
            nodes=tuple(
                replace(n, attrs={**n.attrs, **attrs}) if n.op == op else n for n in block.nodes
            ),
        )

    return graph.with_units(tuple(changed(block) for block in graph.units))


@pytest.mark.parametrize(
    ("name", "op", "attrs"),
    [
        ("llama_mha", "rope", {"theta": 9000.0}),
        ("llama_mha", "rms_norm", {"eps": 1e-3}),
        ("llama_gqa", "rope", {"scaling": ()}),
        ("llama_gqa", "rope", {"scaling": ("llama3", 8.0, 1.0, 4.0, 48)}),
        ("llama_bias", "rope", {"scaling": ("linear", 2.6)}),
        ("mistral", "attention", {"window": 6}),
        ("mistral", "attention", {"window": 4}),
        ("qwen2", "attention", {"window": 6}),
        ("qwen2", "attention", {"window": 0}),
        ("gemma3", "rope", {"theta": 100.0}),
        ("llama_yarn", "rope", {"scaling": ("yarn", 4.0, 32, 4.0, 0.25, True, 1.0)}),
        ("llama_yarn", "rope", {"scaling": ("linear", 4.0)}),
        ("phi3", "rope", {"scaling": ()}),
        ("phi3", "attention", {"window": 0}),
        ("granite", "rms_norm", {"eps": 1e-2}),
        ("olmo2", "rms_norm", {"eps": 1e-2}),
        ("gemma2", "attention", {"softcap": 4.0}),
        ("gemma2", "attention", {"scale": 0.25}),
        ("gemma2", "attention", {"window": 0}),
        ("gemma2", "softcap", {"cap": 31.0}),
        ("gemma3", "rms_norm", {"eps": 1e-2}),
        ("gemma3", "attention", {"window": 6}),
    ],
)
def test_golden_logits_tell_such_models_apart(name, op, attrs):
    """The files are worth something: a small change of what the config says is far outside the
    tolerance.
    """
    graph = with_attrs(frontend.open(GOLDEN / name), op, **attrs)
    assert distance(graph, np.load(GOLDEN / name / "logits.npz")) > 10 * TOLERANCE
