"""Ropes scaled for long contexts, and what config.json and GGUF files may say of them.

Frequencies are compared with those of transformers by logits in `tests.models.test_golden`.
"""

import gguf
import numpy as np
import pytest

from atd.errors import BadInput
from atd.models import frontend
from atd.models.config import parse_config
from atd.models.rope import rope, rope_factor, rope_frequencies
from tests.golden.write_gguf import write_gguf

YARN = ("yarn", 4.0, 4096, 32.0, 1.0, True, 1.0)
LONGROPE = ("longrope", 16, (1.0, 1.0, 1.0, 2.0), (2.0, 2.0, 2.0, 4.0), 1.5)
BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def scaling_of(**scaling) -> tuple:
    return parse_config(BASE | {"rope_scaling": scaling}, "m").rope_scaling


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    plain, scaled = (rope_frequencies(128, 1e4, scaling) for scaling in ((), YARN))
    ratio = scaled / plain
    np.testing.assert_allclose(ratio[:20], 1)
    np.testing.assert_allclose(ratio[50:], 0.25)
    assert (np.diff(ratio) <= 1e-6).all()


def test_longrope_divides_by_the_length():
    plain = rope_frequencies(8, 1e4, ())
    np.testing.assert_allclose(rope_frequencies(8, 1e4, LONGROPE, 16), plain / LONGROPE[2])
    np.testing.assert_allclose(rope_frequencies(8, 1e4, LONGROPE, 17), plain / LONGROPE[3])
    assert rope_factor(LONGROPE) == 1.5


def test_a_part_of_each_head_is_rotated():
    x = np.random.default_rng(0).standard_normal((1, 3, 16)).astype(np.float32)
    positions = np.array([[0, 5, 9]])
    turned = np.asarray(rope(x, positions, 8, 100.0, (), 4)).reshape(1, 3, 2, 8)
    heads = x.reshape(1, 3, 2, 8)
    np.testing.assert_array_equal(turned[..., 4:], heads[..., 4:])
    alone = rope(heads[..., :4].reshape(1, 3, 8), positions, 4, 100.0)
    np.testing.assert_allclose(turned[..., :4].reshape(1, 3, 8), alone, atol=1e-6)


def test_yarn_of_a_config():
    assert scaling_of(type="yarn", factor=4) == (
        "yarn",
        4.0,
        64,
        32.0,
        1.0,
        True,
        1 + 0.1 * np.log(4),
    )
    given = {"mscale": 0.5, "mscale_all_dim": 1.0, "truncate": False, "beta_fast": 8}
    *_, fast, _, truncate, attention = scaling_of(rope_type="yarn", factor=4, **given)
    assert (fast, truncate) == (8.0, False)
    assert attention == pytest.approx((1 + 0.05 * np.log(4)) / (1 + 0.1 * np.log(4)))
    assert scaling_of(rope_type="yarn", factor=4, attention_factor=2)[-1] == 2.0


def test_longrope_of_a_config():
    lists = {"short_factor": [1, 1, 1, 2.0], "long_factor": [2, 2, 2, 4.0]}
    found = scaling_of(type="longrope", original_max_position_embeddings=16, **lists)
    assert found == (*LONGROPE[:4], pytest.approx(np.sqrt(1 + np.log(4) / np.log(16))))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn"}, "rope_scaling: factor is missing"),
        ({"rope_type": "yarn", "factor": 2, "beta_slow": 32}, "beta_slow 32.0 is not below"),
        ({"rope_type": "yarn", "factor": 2, "rope_theta": 1}, "rope_theta is 1.0; yarn needs"),
        ({"rope_type": "yarn", "factor": 2, "truncate": 1}, "truncate is 1; expected true or"),
        ({"rope_type": "longrope"}, "short_factor is missing; expected a list of 4 positive"),
        (
            {"rope_type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3]},
            r"long_factor is \[1, 2, 3\]; expected a list of 4 positive numbers",
        ),
        ({"rope_type": "longrope", "short_factor": [1, 1, 1, 0]}, "short_factor is"),
        ({"rope_type": "su"}, "rope type 'su' is not supported; supported: default"),
    ],
)
def test_what_a_config_says_wrongly(scaling, message):
    with pytest.raises(BadInput, match=message):
        scaling_of(**scaling)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "dynamic"}, "rope scaling 'dynamic' is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "rope_factors_short.weight is missing"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1; supported"),
    ],
)
def test_what_a_gguf_file_says_wrongly(tmp_path, metadata, message):
    name = "llama_yarn" if "type" not in next(iter(metadata)) else "llama_mha"
    write_gguf(tmp_path / "m.gguf", name, gguf.GGMLQuantizationType.F32, metadata)
    with pytest.raises(BadInput, match=message):
        frontend.open(tmp_path / "m.gguf")
